"""Images with opacity that scenes stamp on their frames: sprites, discs, marks, glyphs.

Every image is float32 `[B, 4, A, A]`, RGB and opacity. Its side spans `2 * MARGIN` radii, so the
outline stays clear of the border.
"""

import random

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from tubelet.train.clips.dice import Dice, constant
from tubelet.train.world import REACH, distances

MARGIN = 1.25
"""Half the side of an image, in radii."""

RED, GREEN, BLUE = 0.0, 0.36, 0.61
"""Hues of discs and of the cued sprite, in turns."""

GLYPHS = 10
_GLYPH_SEED = 2575
_GLYPH_POINTS = 5
_STROKE = 0.18
_PLATE = 1.09
_YELLOW = (1.0, 0.85, 0.1)


def hsv(hue: Tensor, saturation: float, value: float) -> Float[Tensor, "*b 3"]:
    """RGB of a hue in turns; saturation and value in [0, 1]."""
    turns = constant((5.0, 3.0, 1.0), hue.device)
    k = (turns + hue[..., None] * 6) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


def sprites(dice: Dice, hue: Float[Tensor, " b"], scale: float) -> Float[Tensor, "b 4 a a"]:
    """Random star-shaped or polygonal outlines, filled with a random texture of one hue."""
    batch = len(hue)
    x, y = _coordinates(scale, dice.device)
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)
    outline = torch.where(
        (dice.uniform(0, 1, batch) < 0.5)[:, None, None],
        _star(dice, batch, angle),
        _polygon(dice, batch, angle),
    )
    inside = (outline - radius) * MARGIN_RADIUS * scale
    return _filled(dice, hue, inside, 0.45)


def discs(
    dice: Dice, hue: Float[Tensor, " b"], scale: float, *, ring: bool = False
) -> Float[Tensor, "b 4 a a"]:
    """Round objects of one hue; with a white ring if marked."""
    x, y = _coordinates(scale, dice.device)
    inside = (1 - (x**2 + y**2).sqrt()) * MARGIN_RADIUS * scale
    image = _filled(dice, hue, inside.expand(len(hue), -1, -1), 0.2)
    if ring:
        band = (1.6 - (inside / scale - 2.7).abs()).clamp(0, 1)
        image[:, :3] = torch.lerp(image[:, :3], torch.ones_like(image[:, :3]), band)
    return image


def figures(
    dice: Dice, shape: Int[Tensor, " b"], hue: Float[Tensor, " b"], scale: float
) -> Float[Tensor, "b 4 a a"]:
    """Figures that have names: the shapes of `tubelet.train.world`, all of the same area."""
    x, y = _coordinates(scale, dice.device)
    # The farthest corner of any shape lies one radius from the middle, as other sprites do.
    inside = -distances(x * REACH, y * REACH)[shape] / REACH * MARGIN_RADIUS * scale
    return _filled(dice, hue, inside, 0.25)


def dots(batch: int, scale: float, device: torch.device) -> Float[Tensor, "b 4 a a"]:
    """White dots with a dark rim."""
    x, y = _coordinates(scale, device)
    radius = (x**2 + y**2).sqrt()
    alpha = ((1 - radius) * 4 + 0.5).clamp(0, 1)
    white = ((0.72 - radius) * 5 + 0.5).clamp(0, 1)
    return torch.stack([white, white, white, alpha]).expand(batch, -1, -1, -1)


def glyphs(kind: Int[Tensor, " b"], scale: float) -> Float[Tensor, "b 4 a a"]:
    """Yellow plates with dark strokes: the fixed polyline of each kind, 0 to `GLYPHS` - 1."""
    distance = glyph_distance(scale, kind.device)[kind]
    x, y = _coordinates(scale, kind.device)
    stroke = ((_STROKE - distance) / 0.08 + 0.5).clamp(0, 1)
    alpha = ((_PLATE - torch.maximum(x.abs(), y.abs())) / 0.08 + 0.5).clamp(0, 1)
    colours = [channel + (0.05 - channel) * stroke for channel in _YELLOW]
    return torch.stack([*colours, alpha.expand_as(stroke)], dim=1)


def glyph_distance(scale: float, device: torch.device) -> Float[Tensor, "g a a"]:
    """Distance of every point of the image to the polyline of each glyph, in radii."""
    points = constant(glyph_points(), device)
    start, step = points[:, :-1], points[:, 1:] - points[:, :-1]
    x, y = _coordinates(scale, device)
    place = torch.stack([x, y], dim=-1)[None, None]
    start, step = start[:, :, None, None], step[:, :, None, None]
    along = ((place - start) * step).sum(-1) / (step**2).sum(-1)
    nearest = start + along.clamp(0, 1)[..., None] * step
    return (place - nearest).square().sum(-1).sqrt().amin(1)


def glyph_points() -> tuple[tuple[tuple[float, float], ...], ...]:
    """Corners of the glyphs, in radii. Python's generator draws the same ones everywhere."""
    draw = random.Random(_GLYPH_SEED)
    levels = (-0.85, -0.28, 0.28, 0.85)
    lattice = [(x, y) for x in levels for y in levels]
    orders = [sorted(lattice, key=lambda _: draw.random()) for _ in range(GLYPHS)]
    return tuple(tuple(order[:_GLYPH_POINTS]) for order in orders)


MARGIN_RADIUS = 6.0
"""Typical radius in pixels at size 64: outlines are softened over one pixel of it."""


def _coordinates(scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns and rows of the image's texels, in radii."""
    side = round(32 * max(scale, 1))
    line = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    return (
        (line * MARGIN)[None].expand(side, side),
        (line * MARGIN)[:, None].expand(side, side),
    )


def _star(dice: Dice, batch: int, angle: Tensor) -> Tensor:
    waves = torch.arange(2, 6, device=dice.device)[None, :, None, None]
    height = dice.uniform(0, 0.16, batch, 4, 1, 1)
    phase = dice.uniform(0, 2 * torch.pi, batch, 4, 1, 1)
    outline = 1 + (height * torch.cos(waves * angle + phase)).sum(1)
    return outline / outline.amax((1, 2), keepdim=True)


def _polygon(dice: Dice, batch: int, angle: Tensor) -> Tensor:
    wedge = 2 * torch.pi / (4 + dice.integers(3, batch, 1, 1))
    turned = angle + dice.uniform(0, 2 * torch.pi, batch, 1, 1)
    return torch.cos(wedge / 2) / torch.cos(turned % wedge - wedge / 2)


def _filled(dice: Dice, hue: Tensor, inside: Tensor, contrast: float) -> Tensor:
    """An image from the signed distance to its outline in pixels, positive inside."""
    batch, side = len(hue), inside.shape[-1]
    grain = interpolate(
        dice.uniform(0, 1, batch, 1, 7, 7), size=(side, side), mode="bicubic", align_corners=True
    )
    shade = 1 - contrast * grain.clamp(0, 1)
    rim = 0.35 + 0.65 * (inside / 1.2).clamp(0, 1)[:, None]
    colour = hsv(hue, 0.85, 0.98)[:, :, None, None] * shade * rim
    return torch.cat([colour, (inside + 0.5).clamp(0, 1)[:, None]], dim=1)
