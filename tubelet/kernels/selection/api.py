"""The block operations of `tubelet.ops.tools`, by Triton kernels for what those take."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.grid import TokenGrid
from tubelet.kernels.selection import triton_selection as fused
from tubelet.kernels.triton_support import takes, unavailable
from tubelet.ops.order import tile_runs
from tubelet.ops.tools import PlainTools


class FusedTools(PlainTools):
    """One read of the tokens, no table of logits and no sort; plain torch for everything else."""

    def means(
        self, x: Float[Tensor, "b h n d"], block: int, order: Int[Tensor, "1 n"] | None, num: int
    ) -> Float[Tensor, "b h m d"]:
        """As in `PlainTools`, without a reordered copy."""
        if not takes(x):
            return super().means(x, block, order, num)
        return fused.means(x, block, order, num, unit=False)

    def similarity(
        self, x: Float[Tensor, "b h n d"], block: int, order: Int[Tensor, "1 n"] | None, num: int
    ) -> Float[Tensor, "b h m"]:
        """As in `PlainTools`, without a copy of the unit vectors."""
        if not takes(x):
            return super().similarity(x, block, order, num)
        return fused.means(x, block, order, num, unit=True).square().sum(-1)

    def tile_means(
        self, x: Float[Tensor, "b h n d"], grid: TokenGrid, tile: tuple[int, int, int]
    ) -> Float[Tensor, "b h tiles d"]:
        """As in `PlainTools`, without a copy of the tokens by tile."""
        if not takes(x):
            return super().tile_means(x, grid, tile)
        starts, order = tile_runs(grid, tile, x.device)
        return fused.run_means(x, starts, order, math.prod(tile))

    def sub_block_scores(
        self,
        q: Float[Tensor, "b h m d"],
        k: Float[Tensor, "b g n d"],
        scale: float,
        parts: tuple[int, int],
    ) -> Float[Tensor, "b h i j"]:
        """As in `PlainTools`, float32, without the table of all pairs."""
        if not takes(q, k):
            return super().sub_block_scores(q, k, scale, parts)
        return fused.sub_block_scores(q, k, scale, parts)

    def block_mass(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        scale: float,
        block: tuple[int, int],
        counts: tuple[int, int],
        num_keys: int,
    ) -> Float[Tensor, "b h rows columns"]:
        """As in `PlainTools`, at the cost of about one dense attention call and two thirds."""
        if not takes(q, k) or any(size % 16 for size in block):
            return super().block_mass(q, k, scale, block, counts, num_keys)
        return fused.block_mass(q, k, scale, block, counts, num_keys)

    def antidiagonal_mass(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        scale: float,
        block: tuple[int, int],
        stride: int,
        counts: tuple[int, int],
    ) -> Float[Tensor, "b h rows columns"]:
        """As in `PlainTools`, the softmax and its sums in one pass over the logits."""
        group = block[1] // stride
        squares = -(-counts[1] // stride)
        if not takes(q, k) or group & (group - 1) or squares > fused.WIDEST:
            return super().antidiagonal_mass(q, k, scale, block, stride, counts)
        return fused.antidiagonal_mass(q, k, scale, block, stride, counts)

    def above_mass(self, score: Float[Tensor, "*batch n"], mass: float) -> Bool[Tensor, "*batch n"]:
        """As in `PlainTools`, by a search for the threshold instead of a sort."""
        if not 0 < mass < 1 or score.dtype != torch.float32 or not takes(score):
            return super().above_mass(score, mass)
        return fused.above(score, mass)

    def at_least(self, score: Float[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
        """As in `PlainTools`, by a search for the threshold."""
        if not 1 <= k <= score.shape[-1] or score.dtype != torch.float32 or not takes(score):
            return super().at_least(score, k)
        return fused.above(score, k)

    def max_min(
        self, x: Float[Tensor, "b n d"], k: int, weight: Float[Tensor, "b n"] | None = None
    ) -> Bool[Tensor, "b n"]:
        """As in `PlainTools`, in one launch behind one product of all pairs, which is kept."""
        if not 1 <= k <= x.shape[1] <= fused.WIDEST or not takes(x):
            return super().max_min(x, k, weight)
        return fused.max_min(x, k, weight)

    def row_totals(
        self,
        q: Float[Tensor, "h r d"],
        k: Float[Tensor, "g m d"],
        places: Int[Tensor, "r"],
        scale: float,
    ) -> Float[Tensor, "h r"]:
        """As in `PlainTools`, without a table of logits."""
        if q.shape[2] > fused.CHANNELS or not takes(q, k):
            return super().row_totals(q, k, places, scale)
        return fused.row_totals(q, k, places, scale)

    def received(
        self,
        q: Float[Tensor, "h r d"],
        k: Float[Tensor, "g m d"],
        places: Int[Tensor, "r"],
        scale: float,
        totals: Float[Tensor, "h r"],
        weight: Float[Tensor, "h r"] | None = None,
    ) -> Float[Tensor, "h m"]:
        """As in `PlainTools`, without a table of logits."""
        if q.shape[2] > fused.CHANNELS or not takes(q, k):
            return super().received(q, k, places, scale, totals, weight)
        return fused.received(q, k, places, scale, totals, weight)

    def mask(
        self,
        kept: Bool[Tensor, "b h mq mk"],
        *,
        block: tuple[int, int],
        num_queries: int,
        num_keys: int,
    ) -> BlockMask:
        """As in `PlainTools`, in one pass; what is behind the end of a list is 0."""
        if unavailable(kept.device) is not None:
            return super().mask(kept, block=block, num_queries=num_queries, num_keys=num_keys)
        counts, indices = fused.lists(kept)
        return BlockMask(
            counts=counts,
            indices=indices,
            block=block,
            num_queries=num_queries,
            num_keys=num_keys,
        )


TOOLS = FusedTools()
"""What adapters hand to recipes."""
