"""Discs that bounce off each other and off the walls, many worlds at once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SUBSTEPS = 4
"""Steps per frame; the fastest pair closes by 1.25 px in one."""


@dataclass(frozen=True)
class Motion:
    """What happened in `M` worlds of `N` discs over `S` steps, `SUBSTEPS` per frame.

    Attributes:
        path: float32 `[M, T, N, 2]`, centres at each frame.
        hits: bool `[S, M, N, N]`, pairs that bounced in this step.
        gaps: float32 `[S, M, N, N]`, distance between outlines, in pixels; below 0 where they
            overlap. Infinite where a disc is missing or paired with itself.
        kicks: float32 `[S, M, N, N]`, closing speed of the pairs that bounced, else 0.
    """

    path: Float[Tensor, "m t n 2"]
    hits: Bool[Tensor, "s m n n"]
    gaps: Float[Tensor, "s m n n"]
    kicks: Float[Tensor, "s m n n"]


def simulate(
    position: Float[Tensor, "m n 2"],
    velocity: Float[Tensor, "m n 2"],
    radius: Float[Tensor, "m n"],
    present: Bool[Tensor, "m n"],
    frames: int,
    wall: float,
) -> Motion:
    """Elastic collisions of discs whose mass is their area.

    Args:
        position: Centres, (x, y) from the middle of the frame, pixels.
        velocity: Pixels per frame.
        radius: Pixels.
        present: Discs that are there; the others pass through everything.
        frames: Length of the path, the starting positions included.
        wall: Distance of the walls from the middle, pixels.
    """
    reach, share = _pairs(radius, present)
    limit = (wall - radius)[..., None]
    path, hits, squares, pushes = [position], [], [], []
    zero = position.new_zeros(())
    half = 0.5 / SUBSTEPS
    for step in range((frames - 1) * SUBSTEPS):
        between = position[:, :, None] - position[:, None]
        closing = velocity[:, :, None] - velocity[:, None]
        # Half a step ahead is where outlines touch on average, not already overlap.
        between = torch.add(between, closing, alpha=half)
        square = (between * between).sum(-1)
        along = (between * closing).sum(-1)
        hit = (square < reach) & (along < 0)
        push = torch.where(hit, along / square, zero)
        velocity = velocity - ((push * share)[..., None] * between).sum(2)
        inward = torch.copysign(velocity, -position)
        velocity = torch.where(position.abs() > limit, inward, velocity)
        position = torch.add(position, velocity, alpha=1 / SUBSTEPS)
        hits.append(hit)
        squares.append(square)
        pushes.append(push)
        if step % SUBSTEPS == SUBSTEPS - 1:
            path.append(position)
    distance = torch.stack(squares).sqrt_()
    return Motion(
        torch.stack(path, 1),
        torch.stack(hits),
        (distance - reach.sqrt()).nan_to_num_(nan=torch.inf),
        torch.stack(pushes).mul_(distance).neg_(),
    )


def _pairs(radius: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Squared touching distance of each pair, negative where there is none, and mass shares."""
    count = radius.shape[1]
    real = present[:, :, None] & present[:, None]
    real = real & ~torch.eye(count, dtype=torch.bool, device=radius.device)
    reach = torch.where(real, (radius[:, :, None] + radius[:, None]).square(), -1.0)
    mass = radius.square()
    return reach, 2 * mass[:, None] / (mass[:, :, None] + mass[:, None])
