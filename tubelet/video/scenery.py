"""Textures and objects for the demo clip; all images are float32 ``[3, H, W]``, 0 to 1."""

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

Colour = tuple[float, float, float]

_LIGHT = (-0.45, -0.65, 0.61)


def value_noise(
    height: int, width: int, cells: tuple[int, int], octaves: int, generator: torch.Generator
) -> Tensor:
    """Multi-octave value noise.

    Args:
        height: rows in pixels.
        width: columns in pixels.
        cells: lattice cells down and across in the first octave; doubled in each further one.
        octaves: how many layers, each half as strong as the one before.
        generator: source of the lattice values.

    Returns:
        float32 ``[height, width]``, stretched to 0 to 1.
    """
    total = torch.zeros(height, width)
    for octave in range(octaves):
        lattice = torch.rand(
            1, 1, (cells[0] << octave) + 1, (cells[1] << octave) + 1, generator=generator
        )
        layer = interpolate(lattice, size=(height, width), mode="bicubic", align_corners=True)
        total += layer[0, 0] / 2**octave
    total -= total.min()
    return total / total.max().clamp_min(1e-6)


def landscape(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Sky with clouds and a sun, three ranges of hills, and a meadow.

    Args:
        height: rows in pixels.
        width: columns in pixels, the whole range of the camera pan.
        generator: source of the textures.

    Returns:
        float32 ``[3, height, width]``.
    """
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    image = _sky(rows, generator)
    ranges: tuple[tuple[float, float, int, Colour], ...] = (
        (0.56, 0.26, 3, (0.50, 0.56, 0.68)),
        (0.63, 0.16, 4, (0.33, 0.46, 0.47)),
        (0.70, 0.11, 3, (0.22, 0.40, 0.26)),
    )
    for base, relief, cells, colour in ranges:
        _hills(image, rows, base, relief, cells, colour, generator)
    _meadow(image, rows, generator)
    return image


def room(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A plastered wall in evening light over a wooden table.

    Args:
        height: rows in pixels.
        width: columns in pixels.
        generator: source of the textures.

    Returns:
        float32 ``[3, height, width]``.
    """
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 1, width)[None].expand(height, width)
    plaster = value_noise(height, width, (5, 6), 5, generator)
    bands = 0.5 + 0.5 * torch.sin(9 * columns + 5 * rows + 7 * plaster)
    image = _blend((0.17, 0.16, 0.33), (0.42, 0.25, 0.45), 0.65 * plaster + 0.35 * bands)
    glow = torch.exp(-((columns - 0.30) ** 2 / 0.10 + (rows - 0.30) ** 2 / 0.14))
    image = image + 0.42 * glow * torch.tensor((1.0, 0.72, 0.50)).view(3, 1, 1)
    grain = value_noise(height, width, (48, 2), 3, generator)
    streaks = 0.5 + 0.5 * torch.sin(70 * rows + 11 * grain)
    wood = _blend((0.30, 0.16, 0.09), (0.66, 0.42, 0.23), 0.55 * grain + 0.45 * streaks)
    wood *= 0.75 + 0.5 * (rows - 0.72)
    edge = ((rows - 0.72) * height).clamp(0, 1)
    image = image + (wood - image) * edge
    image *= 1 - 0.35 * torch.exp(-(((rows - 0.72) / 0.018) ** 2))
    vignette = 1 - 0.55 * ((columns - 0.5) ** 2 + 0.8 * (rows - 0.5) ** 2)
    return (image * vignette).clamp(0, 1)


def ball(image: Tensor, x: float, y: float, radius: float, colour: Colour, turn: float) -> None:
    """Draws a lit sphere with one stripe into ``image`` in place.

    Args:
        image: float32 ``[3, H, W]``.
        x: column of the centre in pixels.
        y: row of the centre in pixels.
        radius: in pixels.
        colour: of the surface, 0 to 1.
        turn: angle of the stripe in radians.
    """
    dx, dy = _offsets(image, x, y)
    u, v = dx / radius, dy / radius
    depth = (1 - u**2 - v**2).clamp_min(0).sqrt()
    light = (u * _LIGHT[0] + v * _LIGHT[1] + depth * _LIGHT[2]).clamp_min(0)
    stripe = _step((u * math.sin(turn) + v * math.cos(turn)).abs() * radius, 0.22 * radius)
    surface = _blend(colour, (0.96, 0.94, 0.88), 0.9 * stripe)
    shaded = surface * (0.34 + 0.74 * light) + 0.55 * light**24
    _over(image, shaded, _step((u**2 + v**2).sqrt() * radius, radius))


def tile(image: Tensor, x: float, y: float, half: float, angle: float, *, warm: bool) -> None:
    """Draws a turned, chequered square into ``image`` in place.

    Args:
        image: float32 ``[3, H, W]``.
        x: column of the centre in pixels.
        y: row of the centre in pixels.
        half: half the side in pixels.
        angle: in radians.
        warm: red and cream if true, else blue and mint.
    """
    dx, dy = _offsets(image, x, y)
    u = dx * math.cos(angle) + dy * math.sin(angle)
    v = dy * math.cos(angle) - dx * math.sin(angle)
    cells = torch.sin(u * math.pi / half * 1.5) * torch.sin(v * math.pi / half * 1.5)
    check = (cells * 4 + 0.5).clamp(0, 1)
    pair = (
        ((0.80, 0.16, 0.22), (0.98, 0.90, 0.74))
        if warm
        else ((0.15, 0.28, 0.62), (0.66, 0.90, 0.80))
    )
    paint = _blend(*pair, check) * (0.92 - 0.16 * (u + v) / half)
    outside = torch.maximum(u.abs(), v.abs())
    paint *= 1 - 0.55 * (1 - _step(outside, 0.88 * half))
    _over(image, paint, _step(outside, half))


def tail(image: Tensor, x: float, y: float, length: float, phase: float) -> None:
    """Draws the waving tail of a kite into ``image`` in place.

    Args:
        image: float32 ``[3, H, W]``.
        x: column of the kite's centre in pixels.
        y: row of the kite's centre in pixels.
        length: a third of the tail in pixels.
        phase: of the wave, in radians.
    """
    dx, dy = _offsets(image, x, y)
    along = dy / length
    wave = torch.sin(along * 2.2 - phase) * 0.22 * length * (along - 1).clamp(0, 1.5)
    inside = ((along - 1.2).clamp(0, 0.1) * 10) * ((4.2 - along).clamp(0, 0.1) * 10)
    colour = torch.tensor((0.80, 0.16, 0.22)).view(3, 1, 1)
    _over(image, colour.expand_as(image), _step((dx - wave).abs(), 0.09 * length) * inside)


def rod(image: Tensor, start: tuple[float, float], end: tuple[float, float], half: float) -> None:
    """Draws a straight dark rod into ``image`` in place.

    Args:
        image: float32 ``[3, H, W]``.
        start: column and row of one end in pixels.
        end: column and row of the other end in pixels.
        half: half the thickness in pixels.
    """
    dx, dy = _offsets(image, *start)
    run, fall = end[0] - start[0], end[1] - start[1]
    along = ((dx * run + dy * fall) / (run**2 + fall**2)).clamp(0, 1)
    distance = ((dx - along * run) ** 2 + (dy - along * fall) ** 2).sqrt()
    colour = torch.tensor((0.12, 0.10, 0.14)).view(3, 1, 1)
    _over(image, colour.expand_as(image), _step(distance, half))


def shadow(image: Tensor, x: float, y: float, radius: float, strength: float) -> None:
    """Darkens a soft, flat ellipse of ``image`` in place.

    Args:
        image: float32 ``[3, H, W]``.
        x: column of the centre in pixels.
        y: row of the centre in pixels.
        radius: half the width in pixels.
        strength: how much light it takes away, 0 to 1.
    """
    dx, dy = _offsets(image, x, y)
    spread = (dx / radius) ** 2 + (dy / (0.28 * radius)) ** 2
    image *= 1 - strength * torch.exp(-1.1 * spread)


def _sky(rows: Tensor, generator: torch.Generator) -> Tensor:
    height, width = rows.shape
    image = _blend((0.20, 0.44, 0.78), (0.99, 0.86, 0.70), (rows / 0.62).clamp(0, 1) ** 1.3)
    dx, dy = _offsets(image, 0.34 * width, 0.30 * height)
    distance = (dx**2 + dy**2).sqrt() / height
    warmth = torch.tensor((1.0, 0.86, 0.58)).view(3, 1, 1)
    image = image + warmth * 0.38 * torch.exp(-distance / 0.12)
    _over(image, (warmth + 0.1).expand_as(image), _step(distance * height, 0.055 * height))
    cloud = value_noise(height, width, (7, 4), 5, generator)
    cover = ((cloud - 0.50) / 0.28).clamp(0, 1) * (1 - (rows / 0.58).clamp(0, 1) ** 3)
    _over(image, _blend((1.0, 0.98, 0.96), (0.78, 0.79, 0.86), cloud), 0.85 * cover)
    return image


def _hills(
    image: Tensor,
    rows: Tensor,
    base: float,
    relief: float,
    cells: int,
    colour: Colour,
    generator: torch.Generator,
) -> None:
    height, width = rows.shape
    ridge = base - relief * (value_noise(2, width, (1, cells), 6, generator)[0] - 0.35)
    below = ((rows - ridge) * height + 0.5).clamp(0, 1)
    texture = value_noise(height, width, (14, 18), 5, generator)
    slope = torch.diff(texture, dim=1, prepend=texture[:, :1]) * width / 18
    shade = 0.80 + 0.35 * texture + (0.22 * slope).clamp(-0.25, 0.25)
    haze = (1 - (rows - ridge) / 0.22).clamp(0.55, 1.15)
    paint = torch.tensor(colour).view(3, 1, 1) * (shade * haze)
    _over(image, paint, below)


def _meadow(image: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    height, width = rows.shape
    horizon = 0.735
    depth = (rows - horizon).clamp_min(0) / (1 - horizon)
    flat = value_noise(2 * height, 2 * width, (24, 24), 6, generator)
    # Rows far away are seen from further off, so they take a wider stretch of the texture.
    reach = 0.35 + 0.65 * (1 - depth)
    across = torch.linspace(-1, 1, width) * reach
    down = 1.6 * (1 / (1 + 2.2 * depth)) - 0.8
    grid = torch.stack([across, down.expand_as(across)], dim=-1)[None]
    grass = grid_sample(flat[None, None], grid, align_corners=True, padding_mode="reflection")
    paint = _blend((0.22, 0.37, 0.13), (0.70, 0.67, 0.30), grass[0, 0])
    paint *= 0.78 + 0.30 * depth
    _over(image, paint, ((rows - horizon) * height + 0.5).clamp(0, 1))


def _offsets(image: Tensor, x: float, y: float) -> tuple[Tensor, Tensor]:
    """Distance of every pixel centre from a point, as a row and a column that broadcast."""
    dx = torch.arange(image.shape[2], dtype=torch.float32)[None] + 0.5 - x
    dy = torch.arange(image.shape[1], dtype=torch.float32)[:, None] + 0.5 - y
    return dx, dy


def _step(distance: Tensor, edge: float) -> Tensor:
    """1 inside ``edge``, 0 outside, one pixel of transition against jagged outlines."""
    return (edge - distance + 0.5).clamp(0, 1)


def _blend(first: Colour, second: Colour, weight: Tensor) -> Tensor:
    start, end = torch.tensor(first).view(3, 1, 1), torch.tensor(second).view(3, 1, 1)
    return start + (end - start) * weight


def _over(image: Tensor, paint: Tensor, cover: Tensor) -> None:
    image += (paint - image) * cover
