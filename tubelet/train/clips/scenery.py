"""Backgrounds: black, a still texture, a noisy texture, a panning texture."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from tubelet.train.clips.dice import Dice, constant

BACKGROUNDS = ("black", "static", "noise", "pan")
MIXED = "mixed"

NOISE = 0.02
"""Standard deviation of the pixel noise."""

PAN = 1.0
"""Speed of a panning texture in pixels per frame at size 64."""

_CELLS = ((22.0, 0.9), (10.0, 0.8), (4.5, 0.75))
"""Lattice spacing in pixels at size 64, and strength, of each octave."""


@dataclass(frozen=True)
class Scenery:
    """Background settings of every clip.

    Attributes:
        kind: int64 `[B]`, index into `BACKGROUNDS`.
        camera: float32 `[B, 2]`, (x, y) pixels per frame by which the view moves over the texture.
        fastest: Upper bound of the camera's speed, known without asking the device.
    """

    kind: Int[Tensor, " b"]
    camera: Float[Tensor, "b 2"]
    fastest: float


def choose_kinds(dice: Dice, batch: int, background: str, allowed: tuple[str, ...]) -> Tensor:
    """int64 `[batch]`: the named background, or one of the allowed ones per clip."""
    if background != MIXED:
        return torch.full((batch,), BACKGROUNDS.index(background), device=dice.device)
    numbers = constant(tuple(BACKGROUNDS.index(name) for name in allowed), dice.device)
    return numbers[dice.integers(len(allowed), batch)]


def panning(dice: Dice, kind: Int[Tensor, " b"], scale: float) -> Scenery:
    """A camera that moves under `pan` and rests otherwise."""
    speed = PAN * scale * (kind == BACKGROUNDS.index("pan"))
    return Scenery(kind, dice.heading(len(kind)) * speed[:, None], PAN * scale)


def paint_background(
    dice: Dice, scenery: Scenery, frames: int, size: int
) -> Float[Tensor, "b t 3 h w"]:
    """Frames before any object is painted."""
    batch, scale = len(scenery.kind), size / 64
    side = size + 2 * math.ceil(scenery.fastest * (frames - 1) / 2) + 4
    texture = _texture(dice, batch, side, scale)
    texture *= (scenery.kind != BACKGROUNDS.index("black"))[:, None, None, None]
    time = torch.arange(frames, device=dice.device) - (frames - 1) / 2
    centre = scenery.camera[:, None] * time[:, None]
    line = torch.arange(size, device=dice.device) - (size - 1) / 2
    across = ((centre[..., 0, None] + line) * (2 / side))[:, :, None, :]
    down = ((centre[..., 1, None] + line) * (2 / side))[:, :, :, None]
    shape = (batch, frames, size, size)
    grid = torch.stack([across.expand(shape), down.expand(shape)], dim=-1).flatten(1, 2)
    views = grid_sample(texture, grid, align_corners=False)
    return views.unflatten(2, (frames, size)).transpose(1, 2).contiguous()


def finish(dice: Dice, scenery: Scenery, pixels: Tensor, noisy: bool) -> Tensor:
    """Adds the noise of the noisy clips to the finished frames, in place, and clamps.

    Args:
        noisy: Whether any clip can be noisy; saves drawing numbers where none is.
    """
    if noisy:
        sigma = NOISE * (scenery.kind == BACKGROUNDS.index("noise"))
        pixels.addcmul_(dice.normal(*pixels.shape), sigma[:, None, None, None, None])
    return pixels.clamp_(0, 1)


def _texture(dice: Dice, batch: int, side: int, scale: float) -> Float[Tensor, "b 3 m m"]:
    """Smooth coloured noise of several octaves, mostly between 0.1 and 0.8."""
    total = torch.zeros(batch, 4, side, side, device=dice.device)
    for spacing, strength in _CELLS:
        count = math.ceil(side / (spacing * scale)) + 2
        lattice = dice.uniform(-strength, strength, batch, 4, count, count)
        total += interpolate(lattice, size=(side, side), mode="bicubic", align_corners=True)
    base = dice.uniform(0.3, 0.55, batch, 1, 1, 1) + dice.uniform(-0.06, 0.06, batch, 3, 1, 1)
    # One channel of brightness and three weaker ones of colour keep the scene less
    # saturated than the sprites.
    return (base + 0.23 * total[:, :1] + 0.06 * total[:, 1:]).clamp(0.02, 0.95)
