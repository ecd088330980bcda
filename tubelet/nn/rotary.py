"""Rotary positions in three dimensions: the angle of a channel pair is its coordinate times a rate.

The channel pairs of a head are split over time, height and width. A query-key product then depends
on coordinate differences only, so a model runs on clips longer or larger than it was trained on.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import ShapeError

BASE = 100.0
"""Ratio of the fastest rate (one radian per token) to the slowest; video grids are < 100 long."""


def rotary_table(
    coordinates: Float[Tensor, "*batch n 3"], width_per_head: int, base: float = BASE
) -> tuple[Float[Tensor, "*batch n d"], Float[Tensor, "*batch n d"]]:
    """Cosines and sines that `apply_rotary` takes.

    Args:
        coordinates: (t, y, x) of each token in token units; whole or fractional, any range.
        width_per_head: D, channels of a head; even, at least 6.
        base: Ratio of the fastest to the slowest rate, > 1.

    Returns:
        cos and sin, each [..., N, D] float32 on the device of `coordinates`. Channel i and channel
        i + D/2 form a pair and hold the same values. Of the D/2 pairs a third, rounded down, turns
        with y, as many with x, the rest with t: 6, 5, 5 at D = 32; 12, 10, 10 at D = 64.

    Raises:
        ShapeError: `coordinates` has no last axis of 3, or `width_per_head` is odd or below 6.

    Source:
        RoFormer (Su et al., 2021, arXiv:2104.09864), with one band of channels per axis.
    """
    if coordinates.ndim < 2 or coordinates.shape[-1] != 3:
        raise ShapeError(f"coordinates must be [..., tokens, 3], got {tuple(coordinates.shape)}")
    if width_per_head % 2 or width_per_head < 6:
        raise ShapeError(f"rotary positions need an even width >= 6, got {width_per_head}")
    place = coordinates.float()
    bands = [
        place[..., axis, None] * _rates(pairs, base, place.device)
        for axis, pairs in enumerate(_pairs(width_per_head))
    ]
    angle = torch.cat(bands, dim=-1)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def apply_rotary(
    x: Float[Tensor, "b h n d"], cos: Float[Tensor, "*b n d"], sin: Float[Tensor, "*b n d"]
) -> Float[Tensor, "b h n d"]:
    """Turn queries or keys by their positions.

    Args:
        x: Queries or keys.
        cos, sin: From `rotary_table`: [N, D], or [B, N, D] where samples hold other tokens.

    Returns:
        Same shape and dtype as `x`; computed in float32, because bfloat16 angles would blur.

    Raises:
        ShapeError: The tables are not for these tokens or this width.
    """
    if cos.shape[-2:] != x.shape[-2:] or cos.ndim not in (2, 3) or cos.shape != sin.shape:
        raise ShapeError(
            f"rotary tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit {tuple(x.shape)}"
        )
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def grid_coordinates(
    frames: int, height: int, width: int, device: torch.device | str | None = None
) -> Float[Tensor, "n 3"]:
    """Coordinates (t, y, x) of a grid of tokens in raster order, 0, 1, 2... on each axis."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _pairs(width: int) -> tuple[int, int, int]:
    """Channel pairs for t, y and x."""
    side = width // 2 // 3
    return width // 2 - 2 * side, side, side


def _rates(pairs: int, base: float, device: torch.device) -> Tensor:
    # Both ends are met, so that the slowest pair tells the two ends of a grid apart.
    step = torch.arange(pairs, device=device, dtype=torch.float32) / max(pairs - 1, 1)
    return base**-step
