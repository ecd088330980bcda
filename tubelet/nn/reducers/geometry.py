"""Where tokens and their pooled cells sit in the clip."""

from functools import cache
from math import log

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid

OCTAVES = 6
PLACE_FEATURES = 3 * 2 * OCTAVES
"""Width of `place_features`: sine and cosine, six octaves, three axes."""


def coordinates(place: Int[Tensor, "b n"], grid: TokenGrid) -> Float[Tensor, "b n 3"]:
    """(t, y, x) in token units of positions in the raster of the video tokens."""
    t, rest = place // grid.per_frame, place % grid.per_frame
    return torch.stack([t, rest // grid.width, rest % grid.width], dim=-1).float()


def place_features(
    where: Float[Tensor, "*b n 3"], grid: TokenGrid, like: Tensor
) -> Float[Tensor, "*b n 36"]:
    """Sines and cosines of coordinates relative to the clip, in the dtype of `like`."""
    sides = torch.tensor([grid.frames, grid.height, grid.width], device=where.device)
    rates = torch.pi * 2.0 ** torch.arange(OCTAVES, device=where.device)
    angle = ((where + 0.5) / sides)[..., None] * rates
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(like.dtype)


@cache
def cell_shape(sides: tuple[int, int, int], num: int) -> tuple[int, int, int]:
    """The grid of at most `num` cells to pool a grid of the given sides to.

    Args:
        sides: (frames, height, width) before, each >= 1.
        num: Cells allowed, >= 1.

    Returns:
        (frames, height, width) after. As many cells as possible, unless a slightly smaller grid is
        much more even: 2 % fewer cells outweigh axes whose ratios differ by a factor of e. Time is
        thinned last.
    """
    frames, height, width = sides
    best, shape = float("inf"), (1, 1, 1)
    for t in range(min(frames, num), 0, -1):
        for h in range(min(height, num // t), 0, -1):
            w = min(width, num // (t * h))
            ratios = [log(t / frames), log(h / height), log(w / width)]
            uneven = max(ratios) - min(ratios) + abs(ratios[1] - ratios[2])
            cost = (num - t * h * w) / num + 0.02 * uneven
            if cost < best - 1e-9:
                best, shape = cost, (t, h, w)
    return shape


class Cells:
    """The whole grid of video tokens, cut into boxes of nearly equal size.

    Args:
        grid: Geometry of the video tokens.
        num: Cells allowed; see `cell_shape`.
        tokens: [B, N, C] video tokens in raster order, for batch, device and a check.

    Raises:
        UnsupportedError: Tokens are missing from the grid.
    """

    def __init__(self, grid: TokenGrid, num: int, tokens: Float[Tensor, "b n c"]) -> None:
        if tokens.shape[1] != grid.num_video:
            raise UnsupportedError(
                f"this learned reduction pools the whole grid of {grid.num_video} video tokens, "
                f"and only {tokens.shape[1]} are left; put it before other reductions"
            )
        sides, device = (grid.frames, grid.height, grid.width), tokens.device
        self.shape = cell_shape(sides, num)
        axes = [_axis(n, k, device) for n, k in zip(sides, self.shape, strict=True)]
        labels, middles, lengths = zip(*axes, strict=True)
        batch = tokens.shape[0]
        index = _combined(labels, self.shape).flatten()
        anchor = _combined(middles, sides).flatten()
        t, h, w = (length.float() for length in lengths)
        size = (t[:, None, None] * h[:, None] * w).flatten()
        self.assignment = TokenAssignment(
            index=index.expand(batch, -1),
            weight=(1 / size)[index].expand(batch, -1),
            anchor=anchor.expand(batch, -1),
            size=size.expand(batch, -1),
        )
        self.centre = coordinates(anchor, grid)
        self.sides = torch.tensor(
            [n / k for n, k in zip(sides, self.shape, strict=True)], device=device
        )

    @property
    def num(self) -> int:
        """How many there are."""
        return self.assignment.num_out


def _axis(num: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cell of each entry of an axis; middle entry and length of each cell."""
    label = torch.arange(num, device=device) * cells // num
    edges = -(-torch.arange(cells + 1, device=device) * num // cells)
    return label, (edges[:-1] + edges[1:] - 1) // 2, edges.diff()


def _combined(axes: tuple[Tensor, ...], sides: tuple[int, int, int]) -> Tensor:
    t, h, w = axes
    return (t[:, None, None] * sides[1] + h[:, None]) * sides[2] + w


def spread(table: Float[Tensor, "m c"], num: int) -> Float[Tensor, "k c"]:
    """`num` rows of a learned table: evenly spaced ones, interpolated when it is too short."""
    most = table.shape[0]
    if num > most:
        wide = F.interpolate(table.T[None].float(), num, mode="linear", align_corners=False)
        return wide[0].T.to(table.dtype)
    rows = (2 * torch.arange(num, device=table.device) + 1) * most // (2 * num)
    return table[rows]
