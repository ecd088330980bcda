"""Around a policy: earlier plans that serve again, and terms for what a plan leaves out."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.context import AttentionContext, Site
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import AttentionCompensation, AttentionReuse, Paper, param
from tubelet.ops.tools import PLAIN

BLOCK = 128
"""Tokens per mean that drift is measured on."""


@dataclass(frozen=True, kw_only=True)
class MaskReuse(AttentionReuse):
    """Keep the last plan until it is old or queries and keys have drifted.

    Drift is the relative change |m - m0| / |m0| of the block means of queries and keys since the
    plan was made, the largest over samples and heads. Measuring it reads queries and keys once
    and hands one number to the host, which waits for it: about a tenth of a millisecond, and no
    tracing. Without a `tolerance` age alone decides, and nothing is read. Kept lists take up to
    four bytes per block pair, head, layer and branch: 4.5 GB for Wan 14B at 720p with guidance and
    128-token blocks, four times that with 64.
    Not settled: known from a survey of code, not from a paper; the tolerance is ours.
    """

    paper = Paper("AdaSpa", "2502.21079", "ICCV", 2025)
    identity: ClassVar = {"most": 0}

    most: int = param(4, "calls that one plan serves again at most", least=0)
    tolerance: float | None = param(
        0.2, "relative drift of pooled queries and keys up to which a plan serves", least=0
    )

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint"

    def reuses(self, ctx: AttentionContext) -> bool:
        age = ctx.state.get("age", self.most)
        means = [] if self.tolerance is None else _pooled(ctx)
        # A drift of NaN is no permission.
        near = self.tolerance is None or (
            age < self.most and _drift(means, ctx.state["means"]) <= self.tolerance
        )
        if age < self.most and near:
            ctx.state["age"] = age + 1
            return True
        ctx.state.update(age=0, means=means)
        return False


def _pooled(ctx: AttentionContext) -> list[Tensor]:
    tools = ctx.tools or PLAIN
    return [tools.means(x, BLOCK, None, ctx.keys) for x in (ctx.query, ctx.key)]


def _drift(means: list[Tensor], before: list[Tensor]) -> float:
    tiny = torch.finfo(torch.float32).tiny
    changes = []
    for now, old in zip(means, before, strict=True):
        size = old.square().sum((2, 3)).clamp(min=tiny)
        changes.append(((now - old).square().sum((2, 3)) / size).sqrt().max())
    return float(torch.stack(changes).max())


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(AttentionCompensation):
    """Let key blocks that a plan leaves out count by their mean key and mean value.

    Each counts as often as it has tokens. The result lies between sparse and dense attention at
    the cost of one more key per block.
    """

    paper = Paper("Sol-Attn", "2607.24027", year=2026)
    identity: ClassVar = {"first_layer": 2**31}

    first_layer: int = param(0, "first layer that is compensated, 0-based", least=0)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer >= self.first_layer

    def compensate(self, ctx: AttentionContext, plan: AttentionPlan) -> AttentionPlan:
        return plan if plan.mask is None else replace(plan, approximate=True)


@dataclass(frozen=True, kw_only=True)
class DeltaRows(AttentionCompensation):
    """Compute every n-th query densely and give what it gains to the queries behind it."""

    paper = Paper("Delta Attention", "2505.11254", year=2025)
    identity: ClassVar = {"stride": None}

    stride: int | None = param(64, "one dense query in so many; None adds nothing", least=2)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint"

    def compensate(self, ctx: AttentionContext, plan: AttentionPlan) -> AttentionPlan:
        return plan if plan.mask is None else replace(plan, delta_rows=self.stride)


@dataclass(frozen=True, kw_only=True)
class Rettention(AttentionCompensation):
    """Re-ttention: restore the scale of a sparse softmax and add what it lost at a dense step.

    Every `refresh` calls are done densely as well. There rho = exp(lse_sparse - lse_dense) is the
    share of the softmax that the plan keeps, and the residual O_dense - rho O_sparse what it
    misses. Later calls give min(1, rho + growth k) O_sparse + residual, k calls after the dense
    one. The state is one output-sized tensor per layer and branch, in the output's dtype: 774 MB
    for a layer of Wan 14B at 720p, 31 GB for all 40 layers, twice that with guidance and four
    times with two experts.
    Gap from paper: the residual is taken before the output projection.
    """

    paper = Paper("Re-ttention", "2505.22918", "NeurIPS", 2025)
    identity: ClassVar = {"refresh": 1}

    refresh: int = param(5, "one dense call in so many", least=1)
    growth: float = param(0.04, "added to rho at each call after the dense one", least=0)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint"

    def wants_dense(self, ctx: AttentionContext) -> bool:
        return ctx.state.get("age", self.refresh) >= self.refresh - 1

    def compensate(self, ctx: AttentionContext, plan: AttentionPlan) -> AttentionPlan:
        if self.wants_dense(ctx) or plan.mask is None:
            return plan
        ctx.state["age"] += 1
        gain = (ctx.state["rho"] + self.growth * ctx.state["age"]).clamp(max=1)
        return replace(plan, gain=gain, residual=ctx.state["residual"])

    def observe(self, ctx: AttentionContext, plan: AttentionPlan, out: Tensor, lse: Tensor) -> None:
        if "dense" not in ctx.state:
            return
        dense, whole = ctx.state.pop("dense")
        rho = (lse - whole).exp()
        residual = (dense.float() - rho[..., None] * out.float()).to(dense.dtype)
        ctx.state.update(age=0, rho=rho.float(), residual=residual)
