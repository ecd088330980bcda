"""The shell game: three identical sprites, one marked at first, two swaps behind bars."""

from itertools import product

import torch
from torch import Tensor

from tubelet.train.clips.canvas import Canvas
from tubelet.train.clips.dice import constant
from tubelet.train.clips.scenery import panning
from tubelet.train.clips.scenes import Shot
from tubelet.train.clips.sprites import dots, sprites

SLOTS = 3
SWAPS = 2
MARK_FRAMES = 2
REST_FRAMES = 2
"""Frames at the end in which everything is in its final slot."""

PAIRS = ((0, 1), (1, 2), (0, 2))
_SPACING = 20.0
_RADIUS = (5.0, 6.0)
_ARC = (12.0, 14.0)
_DOT = 2.5
_BAR = 4.0
_BARS = (-_SPACING / 2, _SPACING / 2)


def shells(shot: Shot) -> tuple[Canvas, Tensor]:
    """The marked sprite changes places twice; in which slot does it end?"""
    dice, batch = shot.dice, shot.batch
    labels = dice.balanced(SLOTS, batch)
    scenery = panning(dice, shot.kinds, shot.scale)
    canvas = shot.canvas(scenery)
    pairs = dice.integers(len(PAIRS), batch, SWAPS)
    path = _paths(shot, pairs)
    start = _start(labels, pairs)
    image = sprites(dice, dice.uniform(0, 1, batch), shot.scale)
    radius = dice.uniform(*_RADIUS, batch)
    for item in range(SLOTS):
        shot.stamp(canvas, image, path[:, :, item], radius, _RADIUS[1], relevant=True)
    everyone = torch.arange(batch, device=dice.device)
    marked = (torch.arange(shot.frames, device=dice.device) < MARK_FRAMES).expand(batch, -1)
    shot.stamp(
        canvas,
        dots(batch, shot.scale, dice.device),
        path[everyone, :, start],
        torch.full_like(radius, _DOT),
        _DOT,
        shown=marked,
        relevant=True,
    )
    _bars(shot, canvas)
    return shot.finish(canvas, scenery, labels)


def shuffled_floor() -> float:
    """Best accuracy when the frames are known but not their order, by enumeration.

    What remains visible is the start slot and which pairs swap, not which pair comes first; a
    swap looks the same played backwards.
    """
    seen: dict[tuple, list[int]] = {}
    for start, *pairs in product(range(SLOTS), *[PAIRS] * SWAPS):
        slot = start
        for a, b in pairs:
            slot = {a: b, b: a}.get(slot, slot)
        seen.setdefault((start, *sorted(pairs)), []).append(slot)
    best = sum(max(ends.count(slot) for slot in range(SLOTS)) for ends in seen.values())
    return best / sum(len(ends) for ends in seen.values())


def _start(labels: Tensor, pairs: Tensor) -> Tensor:
    """Slot in which the sprite starts that the swaps bring to its label."""
    table = constant(PAIRS, labels.device)
    for swap in reversed(range(SWAPS)):
        first, second = table[pairs[:, swap]].unbind(-1)
        at_first, at_second = labels == first, labels == second
        labels = torch.where(at_first, second, torch.where(at_second, first, labels))
    return labels


def _paths(shot: Shot, pairs: Tensor) -> Tensor:
    """Centres `[B, T, SLOTS, 2]` of the sprites, named by the slot they start in."""
    dice, batch = shot.dice, shot.batch
    columns = constant((-_SPACING, 0.0, _SPACING), dice.device)
    row = dice.uniform(-4, 4, batch, 1)
    slots = torch.stack([columns.expand(batch, -1), row.expand(-1, SLOTS)], dim=-1)
    slots = slots + dice.uniform(-1.5, 1.5, batch, SLOTS, 2)
    table = constant(PAIRS, dice.device)
    length = (shot.frames - MARK_FRAMES - REST_FRAMES) // SWAPS
    holds = torch.arange(SLOTS, device=dice.device).expand(batch, -1)
    place = slots
    parts = [place[:, None].expand(-1, MARK_FRAMES, -1, -1)]
    for swap in range(SWAPS):
        pair = table[pairs[:, swap]]
        swaps = (holds[:, :, None] == pair[:, None]).any(-1)
        holds = torch.where(swaps, pair.sum(-1, keepdim=True) - holds, holds)
        target = slots.gather(1, holds[..., None].expand(-1, -1, 2))
        parts.append(_arcs(shot, place, target, swaps, length))
        place = target
    rest = shot.frames - MARK_FRAMES - SWAPS * length
    parts.append(place[:, None].expand(-1, rest, -1, -1))
    return torch.cat(parts, dim=1)


def _arcs(shot: Shot, place: Tensor, target: Tensor, swaps: Tensor, length: int) -> Tensor:
    """One swap `[B, length, SLOTS, 2]`: one of the pair goes above the row, the other below."""
    dice = shot.dice
    progress = torch.arange(1, length + 1, device=dice.device)[:, None, None] / length
    path = torch.lerp(place[:, None], target[:, None], progress)
    side = torch.where(dice.uniform(0, 1, shot.batch, 1) < 0.5, 1.0, -1.0)
    rightwards = torch.sign(target[..., 0] - place[..., 0]) * swaps
    height = dice.uniform(*_ARC, shot.batch, 1) * side * rightwards
    bulge = torch.sin(torch.pi * progress[..., 0]) * height[:, None]
    return path + torch.stack([torch.zeros_like(bulge), bulge], dim=-1)


def _bars(shot: Shot, canvas: Canvas) -> None:
    """Grey bars between the slots; fixed, so they do not tell which pair will swap."""
    column = (torch.arange(shot.size, device=shot.dice.device) - (shot.size - 1) / 2) / shot.scale
    inside = torch.stack([_BAR / 2 - (column - bar).abs() for bar in _BARS]).amax(0)
    alpha = (inside * shot.scale + 0.5).clamp(0, 1)
    shade = 0.25 + 0.3 * (inside / (_BAR / 2)).clamp(0, 1)
    canvas.pixels.lerp_(shade.expand_as(canvas.pixels), alpha)
