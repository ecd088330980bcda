"""Reads the attributes of a world clip back from its pixels, by image processing alone.

The world (`tubelet.train.world`) paints its one object in strong colours on muted backgrounds, so
the object is where the channels of a pixel differ. What is left measures size, path, hue, outline
and background. Nothing is learned: the answer on a generated clip is a measurement of that clip.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.train.world import CELL, COUNTS, RADII, distances, hues

MIN_CHROMA = 0.3
"""Largest minus smallest channel of an object, at least; backgrounds stay below 0.07."""

MIN_SHARE, MAX_SHARE = 0.003, 0.2
"""Share of a frame that an object covers; small ones of the world 0.019, large ones 0.055."""

MIN_OVERLAP = 0.65
"""Intersection over union with the best outline, at least; world clips of 128 pixels reach 0.93,
slightly blurred ones 0.86."""

HUE_TOLERANCE = 1 / 15
"""Turns of hue from the nearest colour, at most; neighbours are 1/6 apart."""

MIN_SPEED = 0.5
"""Pixels of a 128-pixel frame per frame (of a clip of at most 16) that count as motion."""

PATCH, SPAN = 48, 2.0
"""Outlines are compared on PATCH x PATCH samples reaching SPAN disc radii from the centre."""


def detect(pixels: Float[Tensor, "b t 3 h w"]) -> Int[Tensor, "b a"]:
    """Attributes of clips.

    Args:
        pixels: RGB in [0, 1] (values outside count as the nearest end), at least 2 frames.

    Returns:
        int64, a column for each of `world.ATTRIBUTES`; -1 where nothing was found that fits: no
        object in at least half of the frames, an outline unlike all shapes, no motion, an area or
        hue between two values, or a background of another kind.

    Raises:
        ShapeError: Not [batch, frames >= 2, 3, height >= 32, width >= 32], or NaN in it.
    """
    _check(pixels)
    pixels = pixels.float().clamp(0, 1)
    chroma = pixels.amax(2) - pixels.amin(2)
    strength = _strength(chroma)
    cover = ((chroma / strength[:, None, None, None] - 0.25) * 2).clamp(0, 1)
    cover = _near_the_object(cover)
    area = cover.sum((2, 3))
    share = area / cover[0, 0].numel()
    seen = (share > MIN_SHARE) & (share < MAX_SHARE)
    found = (strength >= MIN_CHROMA) & (seen.float().mean(1) >= 0.5)
    centre = _centroid(cover, area)
    radius = _mean(area, seen).div(math.pi).sqrt().clamp(min=1)
    columns = [
        _shape(cover, centre, radius, seen),
        _colour(pixels, cover, seen),
        _direction(centre, seen, _unit(pixels)),
        _background(pixels, chroma < MIN_CHROMA / 2),
        _size(radius / _unit(pixels)),
    ]
    told = torch.stack(columns, dim=1)
    needs_object = torch.tensor([True, True, True, False, True], device=told.device)
    return told.masked_fill(~found[:, None] & needs_object, -1)


def _check(pixels: Tensor) -> None:
    shape = tuple(pixels.shape)
    fits = len(shape) == 5 and shape[2] == 3 and shape[1] >= 2 and min(shape[3:]) >= 32
    if not fits or shape[0] < 1:
        raise ShapeError(
            f"clips must be [batch, frames >= 2, 3, height >= 32, width >= 32], got {shape}"
        )
    if not pixels.is_floating_point() or bool(pixels.isnan().any()):
        raise ShapeError("clips must be floating point in [0, 1] without NaN")


def _unit(pixels: Tensor) -> float:
    """Pixels of these clips per pixel of a 128-pixel frame."""
    return pixels.shape[-1] / 128


def _strength(chroma: Tensor) -> Float[Tensor, "b"]:
    """Chroma inside the object, which covers MIN_SHARE of the clip at least."""
    sample = chroma[:, :, ::2, ::2].flatten(1)
    rank = max(1, round((1 - 0.7 * MIN_SHARE) * sample.shape[1]))
    return sample.kthvalue(rank, dim=1).values.clamp(min=1e-3)


def _near_the_object(cover: Tensor) -> Tensor:
    """Cover without specks that are farther from the object than an object reaches."""
    area = cover.sum((2, 3))
    centre = _centroid(cover, area)
    radius = area.median(1, keepdim=True).values.div(math.pi).sqrt()
    x, y = _offsets(cover, centre)
    reach = (2.2 * radius + 2)[:, :, None, None]
    return cover * (torch.hypot(x, y) <= reach)


def _centroid(cover: Tensor, area: Tensor) -> Float[Tensor, "b t 2"]:
    """Centre of mass (x, y) in pixels; pixel i spans i to i + 1."""
    y, x = (torch.arange(n, device=cover.device) + 0.5 for n in cover.shape[-2:])
    total = area.clamp(min=1e-6)
    return torch.stack([(cover.sum(2) @ x) / total, (cover.sum(3) @ y) / total], dim=-1)


def _offsets(cover: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    y, x = (torch.arange(n, device=cover.device) + 0.5 for n in cover.shape[-2:])
    return (
        (x - centre[..., 0, None])[:, :, None, :],
        (y - centre[..., 1, None])[:, :, :, None],
    )


def _mean(x: Float[Tensor, "b t"], seen: Bool[Tensor, "b t"]) -> Float[Tensor, "b"]:
    return (x * seen).sum(1) / seen.sum(1).clamp(min=1)


def _shape(cover: Tensor, centre: Tensor, radius: Tensor, seen: Tensor) -> Int[Tensor, "b"]:
    """The shape whose outline overlaps most with the object, averaged over frames."""
    batch, frames, height, width = cover.shape
    steps = torch.linspace(-SPAN, SPAN, PATCH, device=cover.device)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    place = centre[:, :, None, None] + radius[:, None, None, None, None] * torch.stack([x, y], -1)
    extent = torch.tensor([width, height], device=cover.device)
    patches = F.grid_sample(
        cover.reshape(-1, 1, height, width),
        (2 * place / extent - 1).reshape(-1, PATCH, PATCH, 2),
        align_corners=False,
    ).reshape(batch, frames, 1, PATCH, PATCH)
    # Edges of the templates are as soft as those of the sampled cover: one pixel.
    outlines = (0.5 - distances(x, y) * radius[:, None, None, None]).clamp(0, 1)[:, None]
    both = torch.minimum(patches, outlines).sum((3, 4))
    either = torch.maximum(patches, outlines).sum((3, 4))
    overlap = ((both / either) * seen[:, :, None]).sum(1) / seen.sum(1).clamp(min=1)[:, None]
    best, index = overlap.max(1)
    return index.masked_fill(best < MIN_OVERLAP, -1)


def _colour(pixels: Tensor, cover: Tensor, seen: Tensor) -> Int[Tensor, "b"]:
    """The colour nearest in hue to the mean of the object."""
    weight = (cover > 0.9) * seen[:, :, None, None]
    mean = (pixels * weight[:, :, None]).sum((1, 3, 4)) / weight.sum((1, 2, 3)).clamp(min=1)[
        :, None
    ]
    red, green, blue = mean.unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    away = (hue[:, None] - hues().to(hue.device) + 0.5) % 1 - 0.5
    best, index = away.abs().min(1)
    return index.masked_fill(best > HUE_TOLERANCE, -1)


def _direction(centre: Tensor, seen: Tensor, unit: float) -> Int[Tensor, "b"]:
    """The compass direction nearest to the least-squares velocity of the centre."""
    frames = centre.shape[1]
    weight = seen.to(centre.dtype)
    when = (
        torch.arange(frames, device=centre.device)
        - _mean(torch.arange(frames, device=centre.device).expand_as(weight), seen)[:, None]
    )
    spread = (weight * when.square()).sum(1).clamp(min=1e-6)
    velocity = (weight[..., None] * when[..., None] * centre).sum(1) / spread[:, None]
    sector = 2 * math.pi / COUNTS[2]
    index = (torch.atan2(velocity[:, 1], velocity[:, 0]) / sector).round().long() % COUNTS[2]
    slower = min(1.0, 15 / (frames - 1))
    return index.masked_fill(velocity.norm(dim=1) < MIN_SPEED * unit * slower, -1)


def _size(radius: Tensor) -> Int[Tensor, "b"]:
    """Small or large, by the radius of the disc of equal area in pixels of a 128-pixel frame."""
    # Worlds keep the two apart by a factor of 1.7; areas far outside are neither.
    large = radius > math.sqrt(RADII[0] * RADII[1])
    neither = (radius < 0.6 * RADII[0]) | (radius > 1.5 * RADII[1])
    return large.long().masked_fill(neither, -1)


def _background(pixels: Tensor, muted: Tensor) -> Int[Tensor, "b"]:
    """The kind of scene behind the object, from the mean over time of what it left visible."""
    grey = pixels.mean(2)
    times = muted.sum(1)
    still = (grey * muted).sum(1) / times.clamp(min=1)
    still = _filled(still, times > 0)
    level = still.mean((1, 2))
    centred = still - level[:, None, None]
    power = centred.square().mean((1, 2)).clamp(min=1e-12)
    shares = [_plane(centred), _columns(centred), _checker(centred)]
    plane, columns, checker = (share / power for share in shares)
    textured = power.sqrt() > 0.05
    scores = torch.stack([plane, columns, checker], dim=1)
    best, index = scores.max(1)
    kind = (index + 1).masked_fill(best < 0.5, -1)
    kind = torch.where((index == 0) & (level < 0.5), -1, kind)
    flat = torch.where(level < 0.3, 0, -1)
    return torch.where(textured, kind, flat)


def _filled(still: Tensor, known: Tensor) -> Tensor:
    """Places that the object never left hold the mean of the others."""
    count = known.sum((1, 2)).clamp(min=1)
    level = (still * known).sum((1, 2)) / count
    return torch.where(known, still, level[:, None, None])


def _plane(centred: Tensor) -> Float[Tensor, "b"]:
    """Power of the best plane through the picture."""
    power = torch.zeros(len(centred), device=centred.device)
    for mean in (centred.mean(1), centred.mean(2)):
        ramp = torch.linspace(-1, 1, mean.shape[1], device=mean.device)
        ramp = ramp / ramp.square().mean().sqrt()
        power = power + (mean * ramp).mean(1).square()
    return power


def _columns(centred: Tensor) -> Float[Tensor, "b"]:
    """Power of what is constant down each column and has no slope across them."""
    mean = centred.mean(1)
    ramp = torch.linspace(-1, 1, mean.shape[1], device=mean.device)
    ramp = ramp / ramp.square().mean().sqrt()
    slope = (mean * ramp).mean(1)
    return (mean - slope[:, None] * ramp).square().mean(1)


def _checker(centred: Tensor) -> Float[Tensor, "b"]:
    """Power of the checker pattern of the world's cell at its best phase."""
    width = centred.shape[2]
    # A checker changes sign by one cell across or down and returns to itself by one of both.
    cell = round(CELL * width / 128)
    across = (centred[:, :, cell:] * centred[:, :, :-cell]).mean((1, 2))
    down = (centred[:, cell:] * centred[:, :-cell]).mean((1, 2))
    both = (centred[:, cell:, cell:] * centred[:, :-cell, :-cell]).mean((1, 2))
    return torch.minimum(torch.minimum(-across, -down), both).clamp(min=0)
