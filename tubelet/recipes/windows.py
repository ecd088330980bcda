"""Static patterns: blocks that follow from the geometry alone, and a random control."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import AttentionContext
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Paper, param
from tubelet.ops.block_mask import (
    Blocks,
    any_per_tile,
    axis_window,
    box,
    frame_bands,
    spread,
    spread_keys,
    units_in_blocks,
)
from tubelet.ops.order import Layout, tile_counts, tile_index
from tubelet.ops.score import white_noise
from tubelet.ops.select import budget
from tubelet.recipes.block_policy import BlockPolicy, Call
from tubelet.recipes.profiles import profile_of

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class StaticPolicy(BlockPolicy):
    """A block policy that looks at no tensor; its lists are built once per geometry."""

    @abstractmethod
    def kept(self, grid: TokenGrid, blocks: Blocks, device: torch.device) -> Tensor:
        """Table of the free blocks, bool [free rows, free columns]."""

    def choose(self, call: Call) -> BlockMask:
        return _static_mask(self, call.ctx.grid, call.blocks, call.ctx.query.device)


@lru_cache(maxsize=64)
def _static_mask(
    recipe: StaticPolicy, grid: TokenGrid, blocks: Blocks, device: torch.device
) -> BlockMask:
    # A tensor cached in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        return blocks.mask(recipe.kept(grid, blocks, device)[None, None])


def tiles_in_blocks(kept: Tensor, grid: TokenGrid, tile: Triple, blocks: Blocks) -> Tensor:
    """Free block pairs, in the order of a tile, that hold any kept pair of tiles."""
    unit = tile_index(grid, tile, kept.device).sort().values
    rows = units_in_blocks(unit, kept.shape[0], blocks.size[0], blocks.free_queries)
    columns = units_in_blocks(unit, kept.shape[1], blocks.size[1], blocks.free_keys)
    return spread_keys(spread(kept, rows), columns)


@lru_cache(maxsize=64)
def tile_window(
    grid: TokenGrid, tile: Triple, window: Triple, blocks: Blocks, device: torch.device
) -> Tensor:
    """Free block pairs, in the order of a tile, that hold a pair of tiles within a window.

    The window is counted in tiles, centred and clamped on each axis; built once per geometry.
    """
    with torch.inference_mode(False):
        counts = tile_counts(grid, tile)
        axes = (axis_window(n, w, device) for n, w in zip(counts, window, strict=True))
        return tiles_in_blocks(box(*axes), grid, tile, blocks)


@dataclass(frozen=True, kw_only=True)
class SlidingTile(StaticPolicy):
    """Sliding tile attention: each tile of tokens attends to a box of tiles around it.

    The box is centred on the tile and moved inwards at the borders, so that every tile sees
    equally many. Tokens are ordered tile by tile; any tile goes with any grid and any block: a
    block pair is computed when it holds any pair of tiles of the window, which is exact when
    tiles are whole blocks and more than the window otherwise. `search` finds a window for each
    head as the paper does, by the error against dense attention; `save_profile` in
    `tubelet.recipes.profiles` keeps what it found.
    Gap from paper: one window per (layer, head), not one per denoising step.
    """

    paper = Paper("Fast Video Generation with Sliding Tile Attention", "2502.04507", "ICML", 2025)
    identity: ClassVar = {"window": (2**31, 2**31, 2**31), "profile": None}

    dense_steps: float = param(
        0.24, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    tile: tuple[int, int, int] = param(
        (6, 8, 8), "(frames, height, width) of a tile in tokens", least=1
    )
    window: tuple[int, int, int] = param(
        (3, 3, 3), "(time, height, width) of the window in tiles", least=1
    )
    profile: str | None = param(None, "file with a window per head; replaces `window`")

    def layout(self, ctx: AttentionContext) -> Layout:
        return self.tile

    def kept(self, grid: TokenGrid, blocks: Blocks, device: torch.device) -> Tensor:
        return tile_window(grid, self.tile, self.window, blocks, device)

    def choose(self, call: Call) -> BlockMask:
        if self.profile is None:
            return super().choose(call)
        layer, heads = call.ctx.site.layer, call.ctx.query.shape[1]
        windows = profile_of(self.profile, self.name, layer, heads)
        masks = [self._with(window).choose(call) for window in windows]
        return dataclasses.replace(
            masks[0],
            counts=torch.cat([mask.counts for mask in masks], dim=1),
            indices=torch.cat([mask.indices for mask in masks], dim=1),
        )

    def search(
        self, ctx: AttentionContext, windows: Sequence[Triple], rows: int = 64, seed: int = 0
    ) -> list[Triple]:
        """The window of each head with the least relative error on some sampled queries.

        Args:
            ctx: A call to calibrate on; the error is averaged over its samples.
            windows: Candidates of about equal cost; a larger one always has the smaller error.
            rows: Sampled queries.
            seed: Which of them.
        """
        call = self.arrange(ctx)
        tables = [
            self._with(window).kept(ctx.grid, call.blocks, ctx.query.device)[None, None]
            for window in windows
        ]
        best = call.errors(tables, rows, seed).mean(1).argmin(0)
        return [windows[i] for i in best.tolist()]

    def _with(self, window: Triple) -> "SlidingTile":
        try:
            return dataclasses.replace(self, window=window, profile=None)
        except RecipeError as error:
            raise RecipeError(f"profile {self.profile}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class NeighborhoodAttention(StaticPolicy):
    """Each token attends to a box of tokens around it, centred and clamped on each axis.

    Tokens are ordered in tiles so that a block is a compact box; a block pair is computed when
    any of its token pairs is inside a window, so more than the window is attended to, and less
    the smaller the tile.
    Gap from paper: no dilation, no stride, and no mask inside computed blocks.
    """

    paper = Paper("Generalized Neighborhood Attention", "2504.16922", year=2025)
    identity: ClassVar = {"window": (2**31, 2**31, 2**31)}

    tile: tuple[int, int, int] = param(
        (2, 8, 8), "(frames, height, width) of a tile in tokens", least=1
    )
    window: tuple[int, int, int] = param(
        (13, 25, 25), "(time, height, width) of the window in tokens", least=1
    )

    def layout(self, ctx: AttentionContext) -> Layout:
        return self.tile

    def kept(self, grid: TokenGrid, blocks: Blocks, device: torch.device) -> Tensor:
        sizes = (grid.frames, grid.height, grid.width)
        axes = [
            any_per_tile(axis_window(n, window, device), side)
            for n, window, side in zip(sizes, self.window, self.tile, strict=True)
        ]
        return tiles_in_blocks(box(*axes), grid, self.tile, blocks)


@dataclass(frozen=True, kw_only=True)
class RadialAttention(StaticPolicy):
    """Attention that narrows with distance in time: the band halves when the distance doubles.

    Frames at distance 0 and 1 see each other whole. At distance r the half width of the band of
    places is 2^bits(tokens per frame) / 2^bits(r) * decay, bits(r) being the bit length of r.
    Where that is less than a block, one block is kept, at every n-th distance only, n being how
    often the band fits into a block. The first frame is seen by all, as the authors do for Wan.
    Authors' settings: decay 0.2 for Wan2.1, 0.95 for HunyuanVideo, 0.8 for Wan2.2.
    Gap from paper: a block pair is computed when any of its token pairs is in the band; the
    authors drop blocks that are covered thinly.
    """

    paper = Paper("Radial Attention", "2506.19852", "NeurIPS", 2025)
    identity: ClassVar = {"decay": 1e12}

    dense_layers: int = param(1, "first layers that stay dense", least=0)
    dense_steps: float = param(
        0.24, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    decay: float = param(0.2, "factor on the width of all bands beyond distance 1", above=0)
    sink: bool = param(True, "every token sees the first frame")

    def kept(self, grid: TokenGrid, blocks: Blocks, device: torch.device) -> Tensor:
        widths = radial_widths(grid, self.decay, blocks.size[1])
        kept = frame_bands(blocks, grid.per_frame, torch.tensor(widths, device=device))
        return kept | (self.sink & first_frame(grid, blocks, device))


def radial_widths(grid: TokenGrid, decay: float, least: int) -> list[float]:
    """Half width of the band in tokens at each distance in frames; -1 where nothing is kept."""
    widths = []
    for distance in range(grid.frames):
        width = 2.0 ** (grid.per_frame.bit_length() - distance.bit_length()) * decay
        if distance <= 1:
            widths.append(float(grid.per_frame))
        elif width >= least:
            widths.append(width)
        else:
            widths.append(float(least) if distance % int(least / width) == 0 else -1.0)
    return widths


def first_frame(grid: TokenGrid, blocks: Blocks, device: torch.device) -> Tensor:
    """True for free key blocks, in raster order, that hold a token of the first frame."""
    starts = torch.arange(blocks.free_columns, device=device) * blocks.size[1]
    return (starts < grid.per_frame).expand(blocks.free_rows, -1)


@dataclass(frozen=True, kw_only=True)
class EfficientVDiT(StaticPolicy):
    """Attention tile: frames see themselves and a few reference frames, which see all.

    The cost grows with the number of frames, not with its square. References are spread evenly
    from the first frame on.
    Gap from paper: training-free, one number of references for all layers; the paper searches it
    layer by layer and distils the sparse model.
    """

    paper = Paper("Efficient-vDiT", "2502.06155", year=2025)
    identity: ClassVar = {"references": 2**31}

    references: int = param(4, "frames whose rows and columns are kept", least=1)

    def kept(self, grid: TokenGrid, blocks: Blocks, device: torch.device) -> Tensor:
        num = min(self.references, grid.frames)
        frame = torch.arange(grid.frames, device=device)
        # Frames at which the running share of references steps up, the first one included.
        global_frame = (frame * num + num - 1) // grid.frames != (frame * num - 1) // grid.frames
        pairs = global_frame[:, None] | global_frame | (frame[:, None] == frame)
        return tiles_in_blocks(pairs, grid, (1, grid.height, grid.width), blocks)


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(BlockPolicy):
    """Random blocks at a density: the control that every policy has to beat.

    Each query block keeps the same number of key blocks, drawn anew for every head, layer and
    step from a seed; every sample, device and run draws the same.
    """

    paper = Paper("Big Bird", "2007.14062", "NeurIPS", 2020)
    identity: ClassVar = {"density": 1.0}

    density: float = param(0.25, "share of the key blocks kept", above=0, most=1)
    seed: int = param(0, "which random choice")

    def choose(self, call: Call) -> BlockMask:
        ctx, blocks = call.ctx, call.blocks
        heads, step = ctx.query.shape[1], 0 if ctx.step is None else ctx.step.step
        seed = (self.seed * 1009 + step) * 1009 + ctx.site.layer
        shape = (1, heads, blocks.free_rows, blocks.free_columns)
        noise = white_noise(heads * shape[2] * shape[3], seed, ctx.query.device)
        k = budget(blocks.free_columns, self.density)
        return blocks.lists_from_topk(noise.reshape(shape), k)
