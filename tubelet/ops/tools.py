"""Block operations in plain torch, in one place, so that fused kernels can stand in for them."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.grid import TokenGrid
from tubelet.ops import block_score, causal_rows, select


class PlainTools:
    """The block operations of a selection, for any device; see `core.context.BlockTools`."""

    def means(
        self, x: Float[Tensor, "b h n d"], block: int, order: Int[Tensor, "1 n"] | None, num: int
    ) -> Float[Tensor, "b h m d"]:
        """See `tubelet.ops.block_score.block_means`."""
        return block_score.block_means(x, block, order, num)

    def similarity(
        self, x: Float[Tensor, "b h n d"], block: int, order: Int[Tensor, "1 n"] | None, num: int
    ) -> Float[Tensor, "b h m"]:
        """See `tubelet.ops.block_score.block_similarity`."""
        return block_score.block_similarity(x, block, order, num)

    def tile_means(
        self, x: Float[Tensor, "b h n d"], grid: TokenGrid, tile: tuple[int, int, int]
    ) -> Float[Tensor, "b h tiles d"]:
        """See `tubelet.ops.block_score.tile_means`."""
        return block_score.tile_means(x, grid, tile)

    def sub_block_scores(
        self,
        q: Float[Tensor, "b h m d"],
        k: Float[Tensor, "b g n d"],
        scale: float,
        parts: tuple[int, int],
    ) -> Float[Tensor, "b h i j"]:
        """See `tubelet.ops.block_score.sub_block_scores`."""
        return block_score.sub_block_scores(q, k, scale, parts)

    def block_mass(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        scale: float,
        block: tuple[int, int],
        counts: tuple[int, int],
        num_keys: int,
    ) -> Float[Tensor, "b h rows columns"]:
        """See `tubelet.ops.block_score.block_mass`."""
        return block_score.block_mass(q, k, scale, block, counts, num_keys)

    def antidiagonal_mass(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        scale: float,
        block: tuple[int, int],
        stride: int,
        counts: tuple[int, int],
    ) -> Float[Tensor, "b h rows columns"]:
        """See `tubelet.ops.block_score.antidiagonal_mass`."""
        return block_score.antidiagonal_mass(q, k, scale, block, stride, counts)

    def above_mass(self, score: Float[Tensor, "*batch n"], mass: float) -> Bool[Tensor, "*batch n"]:
        """See `tubelet.ops.select.above_mass`."""
        return select.above_mass(score, mass)

    def at_least(self, score: Float[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
        """See `tubelet.ops.select.at_least`."""
        return select.at_least(score, k)

    def max_min(
        self, x: Float[Tensor, "b n d"], k: int, weight: Float[Tensor, "b n"] | None = None
    ) -> Bool[Tensor, "b n"]:
        """See `tubelet.ops.select.max_min`."""
        return select.max_min(x, k, weight)

    def row_totals(
        self,
        q: Float[Tensor, "h r d"],
        k: Float[Tensor, "g m d"],
        places: Int[Tensor, "r"],
        scale: float,
    ) -> Float[Tensor, "h r"]:
        """See `tubelet.ops.causal_rows.row_totals`."""
        return causal_rows.row_totals(q, k, places, scale)

    def received(
        self,
        q: Float[Tensor, "h r d"],
        k: Float[Tensor, "g m d"],
        places: Int[Tensor, "r"],
        scale: float,
        totals: Float[Tensor, "h r"],
        weight: Float[Tensor, "h r"] | None = None,
    ) -> Float[Tensor, "h m"]:
        """See `tubelet.ops.causal_rows.received`."""
        return causal_rows.received(q, k, places, scale, totals, weight)

    def mask(
        self,
        kept: Bool[Tensor, "b h mq mk"],
        *,
        block: tuple[int, int],
        num_queries: int,
        num_keys: int,
    ) -> BlockMask:
        """See `BlockMask.from_dense`."""
        return BlockMask.from_dense(kept, block=block, num_queries=num_queries, num_keys=num_keys)


PLAIN = PlainTools()
"""Where no fused kernels run."""
