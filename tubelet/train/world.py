"""A small world with known answers: one coloured shape that drifts over a muted background.

Five attributes say what a clip shows, so a generator can be asked for a clip and its answer can be
read back without any learning (`tubelet.train.detector`). Everything is drawn in one go on the
device; the few random numbers come from a CPU generator, so a seed means the same clips everywhere.
"""

import difflib
import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError, UnsupportedError

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("disc", "square", "triangle", "cross", "ring"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "magenta"),
    "direction": (
        "right",
        "down-right",
        "down",
        "down-left",
        "left",
        "up-left",
        "up",
        "up-right",
    ),
    "background": ("dark", "gradient", "stripes", "checker"),
    "size": ("small", "large"),
}
"""Attributes in the order of the columns, each with the names of its values."""

COUNTS: tuple[int, ...] = tuple(len(values) for values in ATTRIBUTES.values())

RADII = (10.0, 17.0)
"""Radius of the disc of equal area for small and large, in pixels of a 128-pixel frame."""

SPEEDS = (2.0, 3.0)
"""Pixels of a 128-pixel frame that the shape moves per frame; slower in clips over 16 frames."""

REACH = 1.56
"""No shape reaches farther from its centre than this, in radii of the disc of equal area."""

CELL = 16
"""Width of a stripe or checker cell in pixels of a 128-pixel frame."""

_FILLERS = {"a", "an", "the", "moving", "on", "over", "in", "to", "and", "background", "shape"}


@dataclass(frozen=True)
class WorldBatch:
    """Clips and what they show."""

    pixels: Float[Tensor, "b t 3 h w"]
    """float32 in [0, 1], RGB."""

    attributes: Int[Tensor, "b a"]
    """int64, one column for each of `ATTRIBUTES`."""


def make_world(
    batch: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    frames: int = 16,
    size: int = 128,
    attributes: Int[Tensor, "b a"] | None = None,
) -> WorldBatch:
    """Draw clips.

    Args:
        batch: How many.
        seed: From 0 on. The same seed and batch give the same clips on every device.
        device: Where to draw.
        frames: From 2 on. Clips over 16 frames move slower, so that the shape stays in view.
        size: Height and width in pixels, from 32 on; everything scales with it.
        attributes: What to draw; default is uniformly random.

    Raises:
        UnsupportedError: A number is out of range.
        ShapeError: `attributes` have the wrong shape or unknown values.
    """
    if batch < 1 or seed < 0 or frames < 2 or size < 32:
        raise UnsupportedError(
            f"a world needs batch >= 1, seed >= 0, frames >= 2, size >= 32; got {batch}, {seed}, "
            f"{frames}, {size}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(batch, len(COUNTS), generator=generator)
    luck = torch.rand(batch, 8, generator=generator).to(device)
    if attributes is None:
        attributes = (drawn * torch.tensor(COUNTS)).long()
    _check_values(attributes, batch)
    attributes = attributes.to(device)
    shape, colour, direction, background, scale = attributes.unbind(1)
    radius = torch.tensor(RADII, device=device)[scale] * size / 128
    centre = _paths(direction, radius, luck[:, :3], frames, size)
    cover = _cover(shape, radius, centre, size)[:, :, None]
    scene = _backgrounds(background, luck[:, 3:6], size)[:, None]
    paint = _colours(colour, luck[:, 6:8])[:, None, :, None, None]
    return WorldBatch(torch.lerp(scene, paint, cover), attributes)


def parse_attributes(text: str) -> Int[Tensor, "a"]:
    """Attributes that a text such as "red disc moving left on stripes, large" names.

    Returns:
        int64, -1 where the text says nothing.

    Raises:
        UnsupportedError: An unknown word, or two values of one attribute.
    """
    known = {
        word: (kind, value)
        for kind, words in enumerate(ATTRIBUTES.values())
        for value, word in enumerate(words)
    }
    found = [-1] * len(COUNTS)
    for word in re.findall(r"[^\s,.;]+", text.lower()):
        if word in _FILLERS:
            continue
        if word not in known:
            raise UnsupportedError(_unknown(word, list(known)))
        kind, value = known[word]
        if found[kind] not in (-1, value):
            name, words = list(ATTRIBUTES.items())[kind]
            raise UnsupportedError(
                f"{text!r} names two values of {name}: {words[found[kind]]} and {word}"
            )
        found[kind] = value
    return torch.tensor(found)


def complete_attributes(attributes: Int[Tensor, "b a"], seed: int) -> Int[Tensor, "b a"]:
    """Attributes with each -1 replaced by a random value."""
    drawn = torch.rand(attributes.shape, generator=torch.Generator().manual_seed(seed))
    chosen = (drawn * torch.tensor(COUNTS)).long().to(attributes.device)
    return torch.where(attributes < 0, chosen, attributes)


def describe(attributes: Int[Tensor, "a"]) -> str:
    """What attributes say in words that `parse_attributes` reads; -1 is left out.

    Raises:
        ShapeError: Not one row of attributes, or unknown values.
    """
    if attributes.ndim != 1:
        raise ShapeError(f"describe takes one row of attributes, got {tuple(attributes.shape)}")
    _check_values(attributes[None], 1, lowest=-1)
    values = attributes.tolist()
    named = {
        name: words[value]
        for (name, words), value in zip(ATTRIBUTES.items(), values, strict=True)
        if value >= 0
    }
    parts = [named.get(name, "") for name in ("size", "colour", "shape")]
    parts[2] = parts[2] or "shape"
    moving = f"moving {named['direction']}" if "direction" in named else ""
    behind = f"on {named['background']}" if "background" in named else ""
    return " ".join(part for part in (*parts, moving, behind) if part)


def distances(
    x: Float[Tensor, "*grid"], y: Float[Tensor, "*grid"]
) -> Float[Tensor, "shapes *grid"]:
    """Signed distance to the edge of each shape, inside negative, all of the area of a unit disc.

    Args:
        x, y: Offsets from the centre of mass, right and down, in radii of that disc.
    """
    across, along, far = x.abs(), y.abs(), torch.hypot(x, y)
    side = math.sqrt(math.pi) / 2
    square = torch.maximum(across, along) - side
    inner = math.sqrt(math.pi / (3 * math.sqrt(3)))
    slanted = across * math.sqrt(3) / 2 - y / 2
    triangle = torch.maximum(y, slanted) - inner
    arm = math.sqrt(math.pi / 2.31)
    thick = 0.35 * arm
    upright = torch.maximum(across - thick, along - arm)
    level = torch.maximum(across - arm, along - thick)
    cross = torch.minimum(upright, level)
    outer = 1 / math.sqrt(1 - 0.55**2)
    ring = torch.maximum(far - outer, 0.55 * outer - far)
    return torch.stack([far - 1, square, triangle, cross, ring])


def hues() -> Float[Tensor, "colours"]:
    """Hue of each colour in turns: red 0, green 1/3, blue 2/3."""
    return torch.arange(COUNTS[1]) / COUNTS[1]


def _paths(
    direction: Tensor, radius: Tensor, luck: Tensor, frames: int, size: int
) -> Float[Tensor, "b t 2"]:
    """Centre (x, y) of the shape in each frame; every frame shows it whole."""
    slower = min(1.0, 15 / (frames - 1))
    speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * luck[:, 0]
    angle = direction * (2 * math.pi / COUNTS[2])
    step = torch.stack([angle.cos(), angle.sin()], -1) * speed[:, None] * (slower * size / 128)
    way = step * (frames - 1)
    edge = (REACH * radius + 1)[:, None]
    low, high = edge - way.clamp(max=0), size - edge - way.clamp(min=0)
    start = low + (high - low) * luck[:, 1:]
    when = torch.arange(frames, device=step.device)
    return start[:, None] + when[None, :, None] * step[:, None]


def _cover(shape: Tensor, radius: Tensor, centre: Tensor, size: int) -> Float[Tensor, "b t h w"]:
    """Share of each pixel that the shape covers: an edge is one pixel wide."""
    pixel = torch.arange(size, device=centre.device) + 0.5
    unit = radius[:, None, None, None]
    x = (pixel - centre[..., 0, None])[:, :, None, :] / unit
    y = (pixel - centre[..., 1, None])[:, :, :, None] / unit
    every = distances(*torch.broadcast_tensors(x, y))
    own = every[shape, torch.arange(len(shape), device=shape.device)]
    return (0.5 - own * unit).clamp(0, 1)


def _backgrounds(kind: Tensor, luck: Tensor, size: int) -> Float[Tensor, "b 3 h w"]:
    """Still and muted scenes: the channels of a pixel differ by 0.06 at most."""
    device = kind.device
    place = (torch.arange(size, device=device) + 0.5) * 128 / size
    x, y = place[None, None, :], place[None, :, None]
    one, two, three = (luck[:, i, None, None] for i in range(3))
    turn = one * 2 * math.pi
    slope = ((x - 64) * turn.cos() + (y - 64) * turn.sin()) / 64
    contrast = 0.09 + 0.05 * three
    column, row = _wave(x + one * 2 * CELL), _wave(y + two * 2 * CELL)
    flat = torch.ones(1, size, size, device=device)
    scenes = torch.stack(
        [
            (0.10 + 0.08 * three) * flat,
            0.70 + 0.04 * two + contrast * slope,
            0.42 + 0.04 * two + contrast * column * flat,
            0.46 + 0.04 * three + contrast * column * row,
        ]
    )
    tints = torch.tensor(
        [[0.0, 0.0, 0.04], [0.03, 0.02, 0.0], [0.0, 0.02, 0.05], [0.05, 0.02, 0.0]], device=device
    )
    own = scenes[kind, torch.arange(len(kind), device=device)]
    return own[:, None] + tints[kind][:, :, None, None]


def _wave(x: Tensor) -> Tensor:
    """+-1 in turns of CELL, with edges one pixel wide."""
    return (((x % (2 * CELL)) - CELL).abs() - CELL / 2).mul(2).clamp(-1, 1)


def _colours(colour: Tensor, luck: Tensor) -> Float[Tensor, "b 3"]:
    """RGB of nearly full saturation, with a little play in brightness and purity."""
    phase = torch.tensor([0.0, 1 / 3, 2 / 3], device=colour.device)
    away = (hues().to(colour.device)[colour][:, None] - phase).abs()
    away = torch.minimum(away, 1 - away)
    pure = (2 - 6 * away).clamp(0, 1)
    bright = 0.88 + 0.1 * luck[:, :1]
    dull = 0.04 + 0.08 * luck[:, 1:]
    return bright * (dull + (1 - dull) * pure)


def _check_values(attributes: Tensor, batch: int, lowest: int = 0) -> None:
    if attributes.shape != (batch, len(COUNTS)) or attributes.is_floating_point():
        raise ShapeError(
            f"attributes must be whole numbers [{batch}, {len(COUNTS)}], got {attributes.dtype} "
            f"{tuple(attributes.shape)}"
        )
    for row in attributes.tolist():
        for (name, words), value in zip(ATTRIBUTES.items(), row, strict=True):
            if not lowest <= value < len(words):
                raise ShapeError(f"{name} must be {lowest} to {len(words) - 1}, got {value}")


def _unknown(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    offered = "; ".join(f"{name}: {', '.join(words)}" for name, words in ATTRIBUTES.items())
    return f"unknown word {word!r}{hint} Known are {offered}"
