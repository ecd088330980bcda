"""Token orders: permutations that put tokens which attend to each other into common blocks.

An order lists the video tokens first, in the order of a layout, then the tokens in front of the
video, then those behind it. Padding, which is always last in the sequence, stays last.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid

AXES = ("thw", "twh", "htw", "hwt", "wth", "wht")
"""Axis orders, slowest axis first: "thw" is frame-major (raster), "hwt" token-major."""

LAYOUTS = (*AXES, "hilbert")
"""Named layouts; a tile (frames, height, width) in tokens is a layout too."""

Layout = str | tuple[int, int, int]


@lru_cache(maxsize=64)
def token_order(
    grid: TokenGrid, layout: Layout, device: torch.device | str | None = None
) -> Int[Tensor, "1 n"] | None:
    """The whole sequence in the order of `layout`, built once per geometry.

    Args:
        grid: Geometry of the sequence.
        layout: One of `LAYOUTS`, or a tile (frames, height, width) in tokens: tiles in raster
            order, raster order within each; tiles at the far edges may be smaller.
        device: Where the order is needed.

    Returns:
        Position in the sequence of each ordered token; None when the order changes nothing.

    Raises:
        ShapeError: The layout is unknown, or a side of the tile is below 1.
    """
    if layout == "thw" and grid.before == 0:
        return None
    # A tensor cached in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        video = torch.argsort(_keys(grid, layout, device), stable=True) + grid.before
        head = torch.arange(grid.before, device=device)
        tail = torch.arange(grid.before + grid.num_video, grid.num_tokens, device=device)
        return torch.cat([video, head, tail])[None]


def tile_index(
    grid: TokenGrid, tile: tuple[int, int, int], device: torch.device | str | None = None
) -> Int[Tensor, "v"]:
    """Raster number of the tile of each video token, in raster order of the tokens."""
    t, h, w = (x // side for x, side in zip(_coordinates(grid, device), tile, strict=True))
    return _mixed_radix(t, h, w, tile_counts(grid, tile))


def tile_members(
    grid: TokenGrid, tile: tuple[int, int, int], device: torch.device | str | None = None
) -> tuple[Int[Tensor, "tiles size"], Bool[Tensor, "tiles size"]]:
    """The video tokens of each tile, and which places are taken; tiles at the edges lack some."""
    places = math.prod(tile_counts(grid, tile)) * math.prod(tile)
    slots = _keys(grid, tile, device)
    members = torch.zeros(places, dtype=torch.int64, device=device)
    members = members.scatter(0, slots, torch.arange(grid.num_video, device=device))
    taken = torch.zeros(places, dtype=torch.bool, device=device).scatter(0, slots, True)
    return members.unflatten(0, (-1, math.prod(tile))), taken.unflatten(0, (-1, math.prod(tile)))


@lru_cache(maxsize=64)
def tile_runs(
    grid: TokenGrid, tile: tuple[int, int, int], device: torch.device | str | None = None
) -> tuple[Int[Tensor, "runs"], Int[Tensor, "1 n"]]:
    """Where each tile starts in the order of the tile, with the end behind the last one, int32,
    and that order; built once per geometry."""
    with torch.inference_mode(False):
        order = token_order(grid, tile, device)
        if order is None:
            order = torch.arange(grid.num_tokens, device=device)[None]
        # Searching instead of counting: counting would wait for the device.
        held = tile_index(grid, tile, device).sort().values
        ends = torch.arange(math.prod(tile_counts(grid, tile)) + 1, device=device)
        return torch.searchsorted(held, ends).to(torch.int32), order


def tile_counts(grid: TokenGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles along time, height and width; the last of each axis may be smaller.

    Raises:
        ShapeError: A side of the tile is below 1.
    """
    if min(tile) < 1:
        raise ShapeError(f"a tile needs at least 1 token per axis, got {tile}")
    frames, height, width = tile
    return -(-grid.frames // frames), -(-grid.height // height), -(-grid.width // width)


def _keys(grid: TokenGrid, layout: Layout, device: torch.device | str | None) -> Tensor:
    """[V] numbers by which the video tokens are sorted."""
    axes = _coordinates(grid, device)
    sizes = (grid.frames, grid.height, grid.width)
    if isinstance(layout, tuple):
        t, h, w = (x % side for x, side in zip(axes, layout, strict=True))
        return tile_index(grid, layout, device) * math.prod(layout) + _mixed_radix(t, h, w, layout)
    if layout in AXES:
        a, b, c = ("thw".index(axis) for axis in layout)
        return _mixed_radix(axes[a], axes[b], axes[c], (sizes[a], sizes[b], sizes[c]))
    if layout == "hilbert":
        return _hilbert(axes, max(sizes))
    raise ShapeError(f"unknown layout {layout!r}; use a tile or one of {', '.join(LAYOUTS)}")


def _coordinates(grid: TokenGrid, device: torch.device | str | None) -> list[Tensor]:
    return list(grid.coordinates(device).unbind(-1))


def _mixed_radix(a: Tensor, b: Tensor, c: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    return (a * sizes[1] + b) * sizes[2] + c


def _hilbert(axes: list[Tensor], side: int) -> Tensor:
    """Place of each point along the Hilbert curve through the enclosing cube.

    Neighbours on the curve are neighbours in space; where the box is smaller than its cube the
    curve leaves it and comes back elsewhere.

    Source: transposed form of Skilling, "Programming the Hilbert curve", 2004.
    """
    bits = max(side - 1, 1).bit_length()
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(3):
            up = (axes[i] >> bit) & 1
            swap = (axes[0] ^ axes[i]) & (low * (1 - up))
            axes[i] = axes[i] ^ swap
            axes[0] = axes[0] ^ swap ^ (up * low)
    axes[1] = axes[1] ^ axes[0]
    axes[2] = axes[2] ^ axes[1]
    flip = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        flip = flip ^ ((axes[2] >> bit) & 1) * ((1 << bit) - 1)
    code = torch.zeros_like(flip)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            code = (code << 1) | (((axis ^ flip) >> bit) & 1)
    return code
