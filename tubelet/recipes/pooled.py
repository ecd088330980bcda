"""Pooled policies: blocks are judged by the means of their queries and keys."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import AttentionContext
from tubelet.core.grid import TokenGrid
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import Paper, param
from tubelet.ops.block_mask import spread_keys, units_in_blocks
from tubelet.ops.block_score import pooled_scores
from tubelet.ops.order import Layout, tile_counts, tile_index
from tubelet.ops.select import budget
from tubelet.recipes.block_policy import BlockPolicy, Call, OrderedPolicy
from tubelet.recipes.windows import tile_window

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class DraftAttention(BlockPolicy):
    """Keep the blocks above a quantile of the pooled attention map, one quantile per head.

    Regions of a frame are contiguous blocks; softmax rows of their mean queries and keys make
    a draft map. The threshold holds for the whole map of a head, so rows with concentrated
    attention get more blocks than others. A row's own block and its best one always stay.
    Authors' settings: density 0.25 for Wan, 0.1 for HunyuanVideo.
    Gap from paper: blocks are cut every 128 tokens of the regions' order. Where regions divide a
    frame these are the regions; elsewhere (45 rows by 8) most blocks straddle two or three of
    them, where the paper's code pads or refuses.
    Not settled: dense steps stand for the authors' "timestep > 925" at a flow shift of 5.
    """

    paper = Paper("DraftAttention", "2505.14708", year=2025)
    identity: ClassVar = {"density": 1.0}

    dense_layers: int = param(1, "first layers that stay dense", least=0)
    dense_steps: float = param(
        0.29, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    tile: tuple[int, int, int] = param(
        (1, 8, 16), "(frames, height, width) of a region in tokens", least=1
    )
    density: float = param(0.25, "share of a head's blocks kept", above=0, most=1)

    def layout(self, ctx: AttentionContext) -> Layout:
        return self.tile

    def choose(self, call: Call) -> BlockMask:
        # Logarithms rank as the softmax does and cannot underflow to ties.
        draft = call.scores().log_softmax(-1)
        flat = draft.flatten(2)
        kept = call.tools.at_least(flat, budget(flat.shape[2], self.density)).view_as(draft)
        best = torch.zeros_like(kept).scatter(-1, draft.argmax(-1, keepdim=True), True)
        return call.mask(kept | best | call.blocks.own(draft.device))


@dataclass(frozen=True, kw_only=True)
class SpargeAttention(OrderedPolicy):
    """Keep the blocks that make up most of the pooled softmax; doubtful blocks always stay.

    A block whose tokens disagree (mean cosine of its pairs at most `similarity`) cannot be judged
    by its mean: it is computed whole, as a row or as a column, and takes no part in the softmax.
    Gap from paper: the second skip, inside the kernel, on the product with the values, and the
    8-bit products are not applied.
    """

    paper = Paper("SpargeAttention", "2502.18137", "ICML", 2025)
    identity: ClassVar = {"mass": 1.0}

    block: tuple[int, int] = param((128, 64), "tokens per (query, key) block", least=1)
    similarity: float = param(
        0.6, "mean cosine up to which a block is always computed", least=-1, most=1
    )
    mass: float = param(0.98, "share of the pooled softmax kept", above=0, most=1)

    def choose(self, call: Call) -> BlockMask:
        ctx, blocks = call.ctx, call.blocks
        q, k = call.means()
        heads = ctx.query.shape[1] // ctx.key.shape[1]
        rows = call.tools.similarity(ctx.query, blocks.size[0], call.order, blocks.free_queries)
        columns = call.tools.similarity(ctx.key, blocks.size[1], call.order, blocks.free_keys)
        mixed_rows = (rows <= self.similarity)[..., :, None]
        mixed_columns = (columns <= self.similarity).repeat_interleave(heads, 1)[..., None, :]
        logits = pooled_scores(q, k, ctx.scale).masked_fill(mixed_columns, -torch.inf)
        # Without any judged block the softmax is NaN; then all blocks are kept anyway.
        weights = logits.softmax(-1).nan_to_num(0.0)
        return call.mask(call.tools.above_mass(weights, self.mass) | mixed_rows | mixed_columns)


@dataclass(frozen=True, kw_only=True)
class NABLA(BlockPolicy):
    """Keep the blocks that make up most of the pooled softmax, and a sliding window of tiles.

    Gap from paper: where tiles do not divide the grid, blocks straddle them, and the window keeps
    every block it touches.
    Not settled: defaults are remembered from the settings of Kandinsky 5; the paper was not at
    hand. The window is clamped at the borders as in `SlidingTile`.
    """

    paper = Paper("NABLA", "2507.13546", year=2025)
    identity: ClassVar = {"mass": 1.0}

    block: tuple[int, int] = param((64, 64), "tokens per (query, key) block", least=1)
    tile: tuple[int, int, int] = param(
        (1, 8, 8), "(frames, height, width) of a tile in tokens", least=1
    )
    window: tuple[int, int, int] = param(
        (11, 3, 3), "(time, height, width) of the window in tiles", least=1
    )
    mass: float = param(0.9, "share of the pooled softmax kept", above=0, most=1)

    def layout(self, ctx: AttentionContext) -> Layout:
        return self.tile

    def choose(self, call: Call) -> BlockMask:
        ctx, blocks = call.ctx, call.blocks
        static = tile_window(ctx.grid, self.tile, self.window, blocks, ctx.query.device)
        return call.mask(call.tools.above_mass(call.scores().softmax(-1), self.mass) | static)


@dataclass(frozen=True, kw_only=True)
class SolAttn(OrderedPolicy):
    """Keep the blocks whose pooled score stands out; the others count by their means.

    The threshold of a query block is the mean of its scores over all key blocks plus `deviations`
    standard deviations, with the keys' variances taken per dimension. Neighbouring blocks
    always stay. At 1.0 about 16 % of the blocks are exact, at 1.5 7 %, at 2.0 2.7 %.
    Gap from paper: the lists are made beforehand, not inside the kernel.
    Not settled: read from code; the paper's tables were not at hand.
    """

    paper = Paper("Sol-Attn", "2607.24027", year=2026)
    identity: ClassVar = {"deviations": -1e9}

    block: tuple[int, int] = param((64, 64), "tokens per (query, key) block", least=1)
    deviations: float = param(1.0, "standard deviations above the mean that keep a block")
    approximate: bool = param(True, "other blocks count by mean key and value")

    def choose(self, call: Call) -> BlockMask:
        q, k = call.means()
        scores = pooled_scores(q, k, call.ctx.scale)
        heads = q.shape[1] // k.shape[1]
        variance = k.var(2, correction=0).repeat_interleave(heads, dim=1)
        spread = (q.square() @ variance[..., None]) * call.ctx.scale**2
        threshold = scores.mean(-1, keepdim=True) + self.deviations * (spread + 1e-6).sqrt()
        return call.mask((scores > threshold) | self._near(call))

    def _near(self, call: Call) -> torch.Tensor:
        """Blocks that touch or share tokens."""
        (bq, bk), device = call.blocks.size, call.ctx.query.device
        rows = torch.arange(call.blocks.free_rows, device=device)[:, None] * bq
        columns = torch.arange(call.blocks.free_columns, device=device)[None, :] * bk
        return (rows <= columns + bk) & (columns <= rows + bq)

    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        return replace(super().plan(ctx), approximate=self.approximate)


@dataclass(frozen=True, kw_only=True)
class VMoBA(BlockPolicy):
    """Mixture of block attention: pairs of queries and tiles that make up some of a head's mass.

    Tiles change from layer to layer in turns of three: slabs in time, windows in space, boxes.
    Similarities of mean queries and tile-mean keys are scaled to [0, 1] over the whole head and
    to sum 1; the fewest pairs that reach `mass` are kept, and the own tile always.
    Gap from paper: queries choose in blocks, by their mean; the paper lets every query choose,
    which leaves no whole blocks to skip.
    """

    paper = Paper("VMoBA", "2506.23858", year=2025)
    identity: ClassVar = {"mass": 1.0}

    dense_steps: float = param(
        0.25, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    slab: int = param(2, "frames of a tile in layers 0, 3, 6, ...", least=1)
    window: tuple[int, int] = param(
        (3, 4), "(height, width) in tokens of a tile in layers 1, 4, 7, ...", least=1
    )
    box: tuple[int, int, int] = param(
        (4, 6, 4), "(frames, height, width) in tokens of a tile in layers 2, 5, 8, ...", least=1
    )
    mass: float = param(0.25, "share of a head's scaled similarities kept", above=0, most=1)

    def tile(self, layer: int, grid: TokenGrid) -> Triple:
        """(frames, height, width) of the tiles of a layer."""
        turns: tuple[Triple, Triple, Triple] = (
            (self.slab, grid.height, grid.width),
            (grid.frames, *self.window),
            self.box,
        )
        frames, height, width = turns[layer % 3]
        return min(frames, grid.frames), min(height, grid.height), min(width, grid.width)

    def layout(self, ctx: AttentionContext) -> Layout:
        return self.tile(ctx.site.layer, ctx.grid)

    def choose(self, call: Call) -> BlockMask:
        ctx, blocks = call.ctx, call.blocks
        tile = self.tile(ctx.site.layer, ctx.grid)
        q = call.tools.means(ctx.query, blocks.size[0], call.order, blocks.free_queries)
        similarity = pooled_scores(q, call.tools.tile_means(ctx.key, ctx.grid, tile), 1.0)
        flat = similarity.flatten(2)
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        unit = (flat - low) / (high - low).clamp(min=torch.finfo(flat.dtype).tiny)
        chosen = call.tools.above_mass(unit, self.mass).reshape(similarity.shape)
        units = tile_index(ctx.grid, tile, q.device).sort().values
        counts = tile_counts(ctx.grid, tile)
        num = counts[0] * counts[1] * counts[2]
        own = units_in_blocks(units, num, blocks.size[0], blocks.free_queries)
        columns = units_in_blocks(units, num, blocks.size[1], blocks.free_keys)
        return call.mask(spread_keys(chosen | own, columns))
