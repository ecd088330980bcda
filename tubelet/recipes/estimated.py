"""Estimated block mass: policies that look inside the blocks, not at their means only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import StepContext
from tubelet.core.errors import RecipeError
from tubelet.core.recipe import Paper, param
from tubelet.ops.score import rank_of
from tubelet.ops.select import budget
from tubelet.recipes.block_policy import BlockPolicy, Call, OrderedPolicy


@dataclass(frozen=True, kw_only=True)
class SubBlock(OrderedPolicy):
    """Keep the best key blocks of each query block by the log-sum-exp over sub-block means.

    Plain means average away a few strong keys; the log-sum-exp over pairs of 16-token means
    estimates the un-normalised softmax mass of a block pair and lets them count.
    Not settled: read from pull requests; there is no paper. Authors' settings: density 0.2 to
    0.25, the first 10 of 50 steps dense.
    """

    paper = Paper("SubBlock (SGLang, pull request 34148)", year=2026)
    identity: ClassVar = {"density": 1.0}

    dense_steps: float = param(
        0.2, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    block: tuple[int, int] = param((64, 64), "tokens per (query, key) block", least=1)
    parts: tuple[int, int] = param((4, 4), "sub-blocks per (query, key) block", least=1)
    density: float = param(0.25, "share of the key blocks kept", above=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size % parts for size, parts in zip(self.block, self.parts, strict=True)):
            raise RecipeError(
                f"SubBlock.parts must divide the block {self.block}, got {self.parts}"
            )

    def choose(self, call: Call) -> BlockMask:
        q, k = call.means(self.parts)
        # The products rank blocks; the host's precision is enough and much faster than float32.
        dtype = call.ctx.query.dtype
        scores = call.tools.sub_block_scores(q.to(dtype), k.to(dtype), call.ctx.scale, self.parts)
        return call.blocks.lists_from_topk(scores, budget(call.blocks.free_columns, self.density))


@dataclass(frozen=True, kw_only=True)
class XAttention(OrderedPolicy):
    """Keep the blocks that make up most of the softmax over antidiagonal sums.

    Each stride x stride square of the map is scored by its antidiagonal, which every vertical
    and every slanted stripe crosses.
    Authors' settings: stride 8 and mass 0.9 or 0.95 for HunyuanVideo, 5 to 10 dense steps of 50.
    """

    paper = Paper("XAttention", "2503.16428", "ICML", 2025)
    identity: ClassVar = {"mass": 1.0}

    dense_steps: float = param(
        0.1, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    stride: int = param(8, "side of the scored squares in tokens; divides the block", least=1)
    mass: float = param(0.9, "share of the estimated softmax kept", above=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size % self.stride for size in self.block):
            raise RecipeError(
                f"XAttention.stride must divide the block {self.block}, got {self.stride}"
            )

    def choose(self, call: Call) -> BlockMask:
        q, k, _ = call.tokens()
        blocks = call.blocks
        counts = (blocks.free_queries, blocks.free_keys)
        mass = call.tools.antidiagonal_mass(q, k, call.ctx.scale, blocks.size, self.stride, counts)
        return call.mask(call.tools.above_mass(mass, self.mass))


@dataclass(frozen=True, kw_only=True)
class AdaSpa(BlockPolicy):
    """Keep the blocks with the most softmax mass, measured on all pairs at a few steps of the run.

    A search sums exp(z - lse) over every block pair; each query block keeps its best key blocks.
    Heads then share the budget: of the n heads that recall more than `recall` of their mass, the
    n best (half of all at most) give half of what they keep to the n worst, so that the mean
    stays. The lists serve until the next search.
    Gap from paper: every search computes the log-sum-exp anew, where the paper keeps it from the
    first one.
    """

    paper = Paper("AdaSpa", "2502.21079", "ICCV", 2025)
    identity: ClassVar = {"density": 1.0}

    dense_steps: float = param(
        0.2, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    block: tuple[int, int] = param((64, 64), "tokens per (query, key) block", least=1)
    density: float = param(0.2, "mean share of the key blocks kept", above=0, most=1)
    recall: float = param(0.8, "share of its mass above which a head can do with less", least=0)
    searches: tuple[float, ...] = param(
        (0.2, 0.6), "when blocks are searched, as shares of the run", least=0, most=1
    )

    def choose(self, call: Call) -> BlockMask:
        state, due = call.ctx.state, self._due(call.ctx.step)
        if state.get("due") != due:
            state.update(due=due, mask=self._search(call))
        return state["mask"]

    def _due(self, step: StepContext | None) -> int:
        """Searches that belong before this step."""
        if step is None or step.num_steps is None:
            return 0
        return sum(step.step >= round(share * step.num_steps) for share in self.searches)

    def _search(self, call: Call) -> BlockMask:
        blocks = call.blocks
        q, k, _ = call.tokens()
        counts = (blocks.free_queries, blocks.free_keys)
        mass = call.tools.block_mass(q, k, call.ctx.scale, blocks.size, counts, blocks.num_keys)
        few, middle, many = self.budgets(blocks.free_columns)
        best = mass.topk(many, dim=-1).values
        recall = best[..., :middle].sum((2, 3)) / mass.sum((2, 3))
        return blocks.lists_from_topk(mass, many, self._shares(recall, few, middle, many))

    def budgets(self, columns: int) -> tuple[int, int, int]:
        """Key blocks per row of the best, the middle and the worst heads; the mean is exact."""
        middle = budget(columns, self.density)
        shift = min(middle // 2, columns - middle)
        return middle - shift, middle, middle + shift

    def _shares(self, recall: Tensor, few: int, middle: int, many: int) -> Tensor:
        """[B, H] key blocks per row of each head."""
        heads = recall.shape[1]
        num = (recall > self.recall).sum(1, keepdim=True).clamp(max=heads // 2)
        rank = rank_of(recall)
        shares = torch.where(rank < num, few, middle)
        return torch.where(rank >= heads - num, many, shares)
