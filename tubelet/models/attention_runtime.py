"""Attention recipes at work in a generator: plans, warm-up, reuse, compensation, verification."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import AttentionContext, Site, StepContext
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import AttentionCompensation, AttentionReuse, Recipe, SparseAttention
from tubelet.kernels.attention import attention, choose
from tubelet.kernels.selection import TOOLS
from tubelet.models.verify import Checked, check_rows


@dataclass(frozen=True)
class _Crew:
    """The recipes at one site."""

    policy: SparseAttention
    reuse: AttentionReuse | None
    term: AttentionCompensation | None


class AttentionRuntime:
    """What an adapter of a generator keeps while recipes are on a model.

    The adapter calls `begin` before each forward pass of the host, `attend` in place of each
    attention call at a site, and `end_run` when a run (a call of the pipeline) is over.

    Raises:
        UnsupportedError: A recipe reuses or compensates plans that no other recipe makes.
    """

    def __init__(self, recipes: Sequence[Recipe], sites: Sequence[Site], handle: Handle) -> None:
        self.handle, self.options = handle, handle.options
        self.crews = {site.name: crew for site in sites if (crew := _crew(recipes, site))}
        _check_company(recipes, [site for site in sites if site.name in self.crews])
        self.grid: TokenGrid | None = None
        self.step: StepContext | None = None
        self.lengths: tuple[int, ...] | None = None
        self._state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        self._draws = 0

    def begin(
        self, grid: TokenGrid, step: StepContext | None, lengths: Sequence[int] | None = None
    ) -> None:
        """A forward pass begins.

        Args:
            grid: Geometry of the sequence that the attention calls will have.
            step: Denoising step and branch; None when unknown.
            lengths: Real tokens of each sample, the padding being at the end; None without any.

        Raises:
            ShapeError: A sample has no video tokens left, or more tokens than the sequence.
        """
        if lengths is not None:
            least = grid.before + grid.num_video
            if min(lengths) < least or max(lengths) > grid.num_tokens:
                raise ShapeError(
                    f"samples have {list(lengths)} real tokens; each needs between {least} and "
                    f"{grid.num_tokens}, since only text may be padded"
                )
        if grid != self.grid:
            self.handle.record_grid(grid)
        self.grid, self.step = grid, step
        self.lengths = None if lengths is None else tuple(lengths)
        self.handle.report().start_run(grid.num_tokens)

    def end_run(self) -> None:
        """Forget everything that belongs to the run."""
        self._state.clear()
        self.grid = self.step = self.lengths = None
        self._draws = 0

    def attend(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, host: Callable[[], Tensor]
    ) -> Tensor:
        """Attention output [B, H, N, D] for q, k, v [B, H, N, D]; `host()` does it as before."""
        crew, report = self.crews.get(site.name), self.handle.report()
        if crew is None:
            return host()
        if self.grid is None or q.shape[2] != self.grid.num_tokens:
            raise ShapeError(
                f"{site.name} attends over {q.shape[2]} tokens, the geometry is {self.grid}"
            )
        if crew.policy.warming_up(self.step):
            report.fallbacks[f"{crew.policy.name}: dense while warming up"] += 1
            return host()
        outs = []
        for part, (rows, keys) in enumerate(self._parts(len(q))):
            ctx = AttentionContext(
                site=site,
                grid=self.grid,
                query=q[rows],
                key=k[rows],
                value=v[rows],
                scale=scale,
                num_keys=keys,
                step=self.step,
                tools=TOOLS,
            )
            outs.append(self._call(crew, ctx, part))
        if any(out is None for out in outs):
            # One sample that falls back takes its batch along: the host has one call for all.
            return host()
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _parts(self, batch: int) -> list[tuple[slice, int | None]]:
        """Samples that one call serves, with their number of keys."""
        if self.lengths is None:
            return [(slice(None), None)]
        if len(set(self.lengths)) == 1:
            return [(slice(None), self.lengths[0])]
        return [(slice(i, i + 1), self.lengths[i]) for i in range(batch)]

    def _call(self, crew: _Crew, ctx: AttentionContext, part: int) -> Tensor | None:
        """Output of one call; None when the host has to do it densely."""
        report = self.handle.report()
        plan = self._plan(crew, ctx, part)
        if plan.is_dense:
            report.fallbacks[f"{crew.policy.name}: its plan is dense"] += 1
            return None
        if plan.mask is None:
            plan = _without_padding(ctx, plan)
        term, compared = crew.term, False
        if term is not None:
            own = self._context(ctx, term, part)
            compared, added = term.wants_dense(own), term.compensate(own, plan)
            report.attention[f"{term}: applied"] += added is not plan
            plan = added
        qkv = ctx.query, ctx.key, ctx.value
        impl = choose(*qkv, plan, impl=self.options.impl)
        out, lse = attention(*qkv, plan, scale=ctx.scale, impl=impl)
        report.attention[f"{crew.policy}: {impl}"] += 1
        if plan.mask is not None:
            report.sparse_call(ctx.site.layer, ctx.step, _shares(plan.mask))
        if compared:
            assert term is not None
            return self._both(self._context(ctx, term, part), plan, out, lse, term)
        if self.options.verify and self._too_wrong(ctx, plan, out, lse):
            report.fallbacks[f"{crew.policy.name}: error above {self.options.max_error:g}"] += 1
            return _dense(ctx)[0]
        return out

    def _plan(self, crew: _Crew, ctx: AttentionContext, part: int) -> AttentionPlan:
        kept = self._state[self._place(ctx, part)]
        reuse = crew.reuse
        if reuse is not None and reuse.reuses(self._context(ctx, reuse, part)) and "plan" in kept:
            self.handle.report().attention[f"{reuse}: plan reused"] += 1
            return kept["plan"]
        plan = crew.policy.plan(self._context(ctx, crew.policy, part))
        if reuse is not None:
            kept["plan"] = plan
        return plan

    def _both(
        self,
        ctx: AttentionContext,
        plan: AttentionPlan,
        out: Tensor,
        lse: Tensor,
        term: AttentionCompensation,
    ) -> Tensor:
        """The dense output, after the term that asked for it saw both."""
        ctx.state["dense"] = dense = _dense(ctx)
        term.observe(ctx, plan, out, lse)
        self.handle.report().fallbacks[f"{term.name}: dense to compare with"] += 1
        return dense[0]

    def _too_wrong(
        self, ctx: AttentionContext, plan: AttentionPlan, out: Tensor, lse: Tensor
    ) -> bool:
        self._draws += 1
        checked = check_rows(ctx, plan, out, lse, blocks=self.options.verify, seed=self._draws)
        self._record(ctx, checked)
        limit = self.options.max_error
        # Reading the error waits for the device: the price of a limit.
        return limit is not None and not float(checked.error) <= limit

    def _record(self, ctx: AttentionContext, checked: Checked) -> None:
        self.handle.report().verified_call(
            ctx.site.layer, ctx.step, checked.error, checked.recall, checked.cost
        )

    def _place(self, ctx: AttentionContext, part: int) -> tuple[Any, ...]:
        branch = None if ctx.step is None else ctx.step.branch
        # What was kept for other tokens or another batch does not fit.
        return branch, ctx.site.name, ctx.grid, ctx.keys, len(ctx.query), part

    def _context(self, ctx: AttentionContext, recipe: Recipe, part: int) -> AttentionContext:
        """The context with the state of this recipe here."""
        return replace(ctx, state=self._state[(*self._place(ctx, part), str(recipe))])


def _without_padding(ctx: AttentionContext, plan: AttentionPlan) -> AttentionPlan:
    """The plan with padded keys excluded, which only a mask does by itself."""
    if ctx.num_keys is None:
        return plan
    bias = torch.zeros(ctx.key.shape[0], ctx.key.shape[2], device=ctx.key.device)
    bias[:, ctx.num_keys :] = -torch.inf
    return replace(plan, bias=bias if plan.bias is None else bias + plan.bias)


def _shares(mask: BlockMask) -> Tensor:
    """[H] share of the block pairs computed by each head, mean over samples."""
    return mask.counts.float().mean((0, 2)) / mask.grid[1]


def _dense(ctx: AttentionContext) -> tuple[Tensor, Tensor]:
    keys = ctx.keys
    return attention(ctx.query, ctx.key[:, :, :keys], ctx.value[:, :, :keys], scale=ctx.scale)


def _crew(recipes: Sequence[Recipe], site: Site) -> _Crew | None:
    here = [recipe for recipe in recipes if recipe.acts_on(site)]
    policy = next((r for r in here if isinstance(r, SparseAttention)), None)
    if policy is None:
        return None
    reuse = next((r for r in here if isinstance(r, AttentionReuse)), None)
    term = next((r for r in here if isinstance(r, AttentionCompensation)), None)
    return _Crew(policy, reuse, term)


def _check_company(recipes: Sequence[Recipe], served: Sequence[Site]) -> None:
    for recipe in recipes:
        extra = isinstance(recipe, AttentionReuse | AttentionCompensation)
        if extra and not any(recipe.acts_on(site) for site in served):
            raise UnsupportedError(
                f"{recipe} works on the plans of a sparse attention recipe, and none acts where "
                "it does; give one beside it"
            )
