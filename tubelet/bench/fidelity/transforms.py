"""What is done to a clip before the model sees it: baselines of the input, and controls.

Fewer frames takes whole tubelets (pairs of frames) at even distances, so motion inside a tubelet
keeps its speed and the clip as a whole becomes faster and shorter; the model numbers the frames it
gets from 0. Lower resolution averages areas, down to a whole number of tokens per side; the model
sees a smaller picture. In both, positions are those of the smaller clip.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tubelet.bench.fidelity.oracle import evenly
from tubelet.core.grid import TokenGrid

Transform = Callable[[Tensor], Tensor]
"""[B, T, 3, H, W] pixels to the same of another length or size."""


def fewer_frames(keep: float, tubelet: tuple[int, int, int]) -> Transform:
    """Every k-th tubelet of frames: round(keep * tubelets) of them, evenly spaced."""

    def apply(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b s 3 h w"]:
        depth = tubelet[0]
        first = torch.tensor(evenly(pixels.shape[1] // depth, keep)) * depth
        chosen = (first[:, None] + torch.arange(depth)).flatten()
        return pixels[:, chosen.to(pixels.device)]

    return apply


def lower_resolution(keep: float, tubelet: tuple[int, int, int], grid: TokenGrid) -> Transform:
    """Area-resized to the square share of tokens that is nearest to `keep`."""
    height, width = smaller_sides(keep, grid)

    def apply(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 y x"]:
        size = (height * tubelet[1], width * tubelet[2])
        return F.interpolate(pixels.flatten(0, 1), size, mode="area").unflatten(0, pixels.shape[:2])

    return apply


def smaller_sides(keep: float, grid: TokenGrid) -> tuple[int, int]:
    """Token rows and columns of the picture whose token share is nearest to `keep`."""
    sides = [
        (rows, max(round(rows * grid.width / grid.height), 1)) for rows in range(1, grid.height + 1)
    ]
    return min(sides, key=lambda side: abs(side[0] * side[1] / grid.per_frame - keep))


def shuffled_frames(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """Each clip's frames in a random order of its own, the same in every run."""
    batch, frames = pixels.shape[:2]
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(batch, frames, generator=generator).argsort(1).to(pixels.device)
    return pixels.gather(1, order[:, :, None, None, None].expand_as(pixels))


def single_frame(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """The middle frame, repeated."""
    middle = pixels.shape[1] // 2
    return pixels[:, middle : middle + 1].expand_as(pixels)
