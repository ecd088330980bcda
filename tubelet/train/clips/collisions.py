"""Discs that collide: did red hit blue, how many collisions, what if one were not there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.train.clips.canvas import Canvas
from tubelet.train.clips.dice import Dice
from tubelet.train.clips.physics import SUBSTEPS, Motion, simulate
from tubelet.train.clips.scenery import panning
from tubelet.train.clips.scenes import Shot
from tubelet.train.clips.sprites import BLUE, GREEN, RED, discs

DISCS = 4
MAX_COUNT = 4
"""Label of the clips with this many collisions or more."""

PROPOSALS, CANDIDATES = 64, 12
_RADIUS = (5.0, 6.0)
_SPEED = (1.5, 2.5)
_NEAR = (1.0, 5.0)
_SOFTEST_KICK = 1.0
_SLOWEST_MEETING = 1.2
_LATEST = 14.0  # frames; who meets later would have to start out of view
_WALL = 31.5
_RED, _BLUE, _MARKED = 0, 1, 2
_HUES = (RED, BLUE, GREEN, 0.14)


@dataclass(frozen=True)
class Worlds:
    """Starting states of `P` worlds per clip: `[B, P, DISCS(, 2)]`, radii and presence per clip."""

    position: Tensor
    velocity: Tensor
    radius: Tensor
    present: Tensor

    def take(self, index: Tensor) -> "Worlds":
        """The worlds `index [B, K]` of each clip, with every disc inside the walls."""
        which = index[:, :, None, None].expand(-1, -1, DISCS, 2)
        return Worlds(
            self.position.gather(1, which),
            self.velocity.gather(1, which),
            self.radius,
            self.present,
        )

    def run(self, frames: int, without: int | None = None) -> Motion:
        """Simulate all worlds, all clips together; one disc can be taken out."""
        count = self.position.shape[1]
        present = self.present.clone()
        if without is not None:
            present[:, without] = False
        radius, present = (
            x[:, None].expand(-1, count, -1).flatten(0, 1) for x in (self.radius, present)
        )
        return simulate(
            self.position.flatten(0, 1), self.velocity.flatten(0, 1), radius, present, frames, _WALL
        )


def collisions(shot: Shot) -> tuple[Canvas, Tensor]:
    """Does the red disc hit the blue one? Where it does not, it nearly does."""
    wanted = shot.dice.balanced(2, shot.batch)
    worlds = _aimed(shot, wanted.bool())
    motion = worlds.run(shot.frames)
    hit, nice = _red_blue(motion, shot.frames)
    score = 2.0 * (hit == _each(wanted.bool())) + nice
    labels, path = _choose(shot, score, hit.long(), motion)
    return _paint(shot, worlds, path, labels)


def collision_count(shot: Shot) -> tuple[Canvas, Tensor]:
    """How many collisions are there between any two discs? `MAX_COUNT` stands for all above."""
    wanted = shot.dice.balanced(MAX_COUNT + 1, shot.batch)
    worlds = _likely(_scattered(shot.dice, shot.batch), 3 * CANDIDATES)
    motion = worlds.run(shot.frames)
    events = motion.hits.sum((-1, -2)) / 2
    count = events.sum(0).long().clamp(max=MAX_COUNT)
    seen = ~events[-SUBSTEPS:].any(0)
    firm = ~(motion.hits & (motion.kicks < _SOFTEST_KICK / 2)).any(0).flatten(1).any(1)
    score = -3.0 * (count - _each(wanted, 3 * CANDIDATES)).abs() + seen + firm
    labels, path = _choose(shot, score, count, motion)
    return _paint(shot, worlds, path, labels)


def counterfactual(shot: Shot) -> tuple[Canvas, Tensor]:
    """Without the ringed disc, would red hit blue?"""
    wanted = shot.dice.balanced(4, shot.batch)
    would, does = (wanted % 2).bool(), (wanted // 2).bool()
    worlds = _aimed(shot, would, meddle=True)
    real, imagined = worlds.run(shot.frames), worlds.run(shot.frames, without=_MARKED)
    hit, _ = _red_blue(real, shot.frames)
    answer, nice = _red_blue(imagined, shot.frames)
    # What happens in the clip is balanced too, so it does not give the answer away.
    score = 4.0 * (answer == _each(would)) + 2.0 * (hit == _each(does)) + nice
    labels, path = _choose(shot, score, answer.long(), real)
    return _paint(shot, worlds, path, labels, ringed=True)


def _each(wanted: Tensor, count: int = CANDIDATES) -> Tensor:
    """One entry per candidate, as in a `Motion`."""
    return wanted.repeat_interleave(count)


def _choose(shot: Shot, score: Tensor, answer: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """Answer and path of the best candidate of each clip; the first of equals."""
    score = score.unflatten(0, (shot.batch, -1))
    order = torch.arange(score.shape[1], device=score.device)
    best = (score - order * 1e-3).argmax(1)
    clips = torch.arange(shot.batch, device=score.device)
    path = motion.path.unflatten(0, (shot.batch, -1))
    return answer.unflatten(0, (shot.batch, -1))[clips, best], path[clips, best]


def _red_blue(motion: Motion, frames: int) -> tuple[Tensor, Tensor]:
    """Whether red touches blue `[M]`, and whether that is easy to see, or else nearly happens."""
    hits, gaps = motion.hits[:, :, _RED, _BLUE], motion.gaps[:, :, _RED, _BLUE]
    hit, closest = hits.any(0), gaps.amin(0)
    falling = torch.arange(len(hits), 0, -1, device=hits.device)[:, None]
    first = (hits * falling).argmax(0)
    frame = (first + 0.5) / SUBSTEPS
    timely = (frame >= 2) & (frame <= frames - 3)
    firm = motion.kicks[:, :, _RED, _BLUE].amax(0) >= _SOFTEST_KICK
    near = (closest >= _NEAR[0]) & (closest <= _NEAR[1])
    return hit, torch.where(hit, timely & firm, near)


def _aimed(shot: Shot, hit: Tensor, meddle: bool = False) -> Worlds:
    """Worlds in which red and blue are on their way to meet, or to miss by a few pixels.

    Where they meet is drawn first and the start follows, so that clips with and without a hit
    start alike.
    """
    dice, batch = shot.dice, shot.batch
    worlds = _scattered(dice, batch, optional=True)
    position, velocity = worlds.position, worlds.velocity
    reach = (worlds.radius[:, _RED] + worlds.radius[:, _BLUE])[:, None]
    shape = (batch, PROPOSALS)
    miss = torch.where(
        hit[:, None], dice.uniform(0, 0.75, *shape) * reach, reach + dice.uniform(*_NEAR, *shape)
    )
    closing = velocity[:, :, _RED] - velocity[:, :, _BLUE]
    speed = closing.square().sum(-1).sqrt().clamp(min=0.1)
    aside = torch.stack([-closing[..., 1], closing[..., 0]], dim=-1) / speed[..., None]
    aside = aside * (miss * torch.where(dice.uniform(0, 1, *shape) < 0.5, 0.5, -0.5))[..., None]
    # Outlines touch before centres are closest; without that the time would tell hits from misses.
    late = (reach.square() - miss.square()).clamp(min=0).sqrt() / speed
    time = (dice.uniform(2.5, min(shot.frames - 4, _LATEST), *shape) + late)[..., None]
    meeting = dice.uniform(-_WALL + 6, _WALL - 6, *shape, 2)
    position[:, :, _RED] = meeting + aside - velocity[:, :, _RED] * time
    position[:, :, _BLUE] = meeting - aside - velocity[:, :, _BLUE] * time
    if meddle:
        _meddle(dice, worlds, time)
    return _likely(worlds, CANDIDATES, speed > _SLOWEST_MEETING)


def _meddle(dice: Dice, worlds: Worlds, time: Tensor) -> None:
    """Send the ringed disc towards red or blue before they meet, in place."""
    shape = time.shape[:2]
    position, velocity = worlds.position, worlds.velocity
    to_red = dice.uniform(0, 1, *shape, 1) < 0.5
    early = time * dice.uniform(0.3, 0.9, *shape, 1)
    red, blue = (position[:, :, d] + velocity[:, :, d] * early for d in (_RED, _BLUE))
    target = torch.where(to_red, red, blue) + dice.uniform(-6, 6, *shape, 2)
    position[:, :, _MARKED] = target - velocity[:, :, _MARKED] * early


def _scattered(dice: Dice, batch: int, optional: bool = False) -> Worlds:
    """Discs anywhere, moving anywhere; the last one is missing in half the clips if optional."""
    shape = (batch, PROPOSALS, DISCS)
    radius = dice.uniform(*_RADIUS, batch, DISCS)
    present = torch.ones(batch, DISCS, dtype=torch.bool, device=dice.device)
    if optional:
        present[:, -1] = dice.uniform(0, 1, batch) < 0.5
    position = dice.uniform(-1, 1, *shape, 2) * (_WALL - radius)[:, None, :, None]
    velocity = dice.heading(*shape) * dice.uniform(*_SPEED, *shape, 1)
    return Worlds(position, velocity, radius, present)


def _likely(worlds: Worlds, count: int, also: Tensor | None = None) -> Worlds:
    """Of each clip the first worlds that start apart from each other and inside the walls."""
    radius, present = worlds.radius[:, None], worlds.present[:, None]
    inside = (worlds.position.abs() <= (_WALL - radius)[..., None]).all(-1) | ~present
    apart = worlds.position[:, :, :, None] - worlds.position[:, :, None]
    reach = radius[..., :, None] + radius[..., None, :] + 1.0
    other = ~torch.eye(DISCS, dtype=torch.bool, device=radius.device)
    real = present[..., :, None] & present[..., None, :] & other
    touching = (apart.square().sum(-1) < reach.square()) & real
    good = inside.all(-1) & ~touching.flatten(2).any(2)
    if also is not None:
        good = good & also
    return worlds.take((~good).byte().argsort(dim=1, stable=True)[:, :count])


def _paint(
    shot: Shot, worlds: Worlds, path: Tensor, labels: Tensor, ringed: bool = False
) -> tuple[Canvas, Tensor]:
    dice, batch = shot.dice, shot.batch
    scenery = panning(dice, shot.kinds, shot.scale)
    canvas = shot.canvas(scenery)
    for number, hue in enumerate(_HUES):
        tint = (hue + dice.uniform(-0.02, 0.02, batch)) % 1
        image = discs(dice, tint, shot.scale, ring=ringed and number == _MARKED)
        shot.stamp(
            canvas,
            image,
            path[:, :, number],
            worlds.radius[:, number],
            _RADIUS[1],
            shown=worlds.present[:, number, None].expand(-1, shot.frames),
            relevant=True,
        )
    return shot.finish(canvas, scenery, labels)
