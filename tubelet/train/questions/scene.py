"""Clips of one to four named objects that appear one after the other and move straight on."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.errors import ClipError, UnsupportedError
from tubelet.train.clips import TEST_SEED
from tubelet.train.clips.dice import Dice, constant
from tubelet.train.clips.scenery import BACKGROUNDS, MIXED, choose_kinds, panning
from tubelet.train.clips.scenes import DIRECTIONS, Shot, heading
from tubelet.train.clips.sprites import figures
from tubelet.train.world import ATTRIBUTES

MOST_OBJECTS = 4
COLOURS, SHAPES, HEADINGS = (ATTRIBUTES[name] for name in ("colour", "shape", "direction"))
THIRDS = ((0.0, 0.22), (0.4, 0.6), (0.7, 0.8))
"""When an object appears, as shares of the clip: clearly in one third, and seen for a while."""

RADIUS, SPEED = (7.5, 9.5), (1.2, 2.2)
"""Reach of a figure from its middle, and pixels per frame, at size 64."""


@dataclass(frozen=True)
class Objects:
    """What the clips show. An object that is not present has the values of one that could be.

    Attributes:
        pixels: float32 `[B, T, 3, H, W]`, RGB in [0, 1].
        present: bool `[B, 4]`.
        colour, shape: int64 `[B, 4]`, into `COLOURS` and `SHAPES`; no two of a clip are equal.
        direction: int64 `[B, 4]`, heading of k * 45 degrees clockwise: 0 right, 2 down.
        start: int64 `[B, 4]`, first frame in which the object is there; it stays to the end.
        third: int64 `[B, 4]`, 0 to 2, the part of the clip in which it appears.
        absent: int64 `[B, 2]`, colour and shape that no object of the clip has.
        path: float32 `[B, 4, T, 2]`, centre (x, y) from the middle of the frame at size 64; the
            object is there from `start` on.
    """

    pixels: Float[Tensor, "b t 3 h w"]
    present: Bool[Tensor, "b o"]
    colour: Int[Tensor, "b o"]
    shape: Int[Tensor, "b o"]
    direction: Int[Tensor, "b o"]
    start: Int[Tensor, "b o"]
    third: Int[Tensor, "b o"]
    absent: Int[Tensor, "b 2"]
    path: Float[Tensor, "b o t 2"]

    def to(self, device: torch.device | str) -> "Objects":
        """The same clips on another device."""
        return Objects(*(getattr(self, field.name).to(device) for field in fields(self)))

    def texts(self, clip: int) -> list[str]:
        """What each object of a clip looks like and does."""
        rows = (x[clip].tolist() for x in (self.present, self.colour, self.shape, self.direction))
        return [
            f"a {COLOURS[colour]} {SHAPES[shape]} goes {HEADINGS[direction]} from frame {start}"
            for present, colour, shape, direction, start in zip(
                *rows, self.start[clip].tolist(), strict=True
            )
            if present
        ]


def sample_objects(frames: int, size: int) -> Objects:
    """One clip to try questions on: the first test clip of three objects with a red square.

    Args:
        frames, size: As for `make_objects`.
    """
    drawn = make_objects(64, TEST_SEED, background="static", frames=frames, size=size)
    named = (drawn.colour == COLOURS.index("red")) & (drawn.shape == SHAPES.index("square"))
    wanted = (named & drawn.present).any(1) & (drawn.present.sum(1) == 3)
    first = int(wanted.int().argmax())
    return Objects(*(getattr(drawn, field.name)[first : first + 1] for field in fields(drawn)))


@torch.no_grad()
def make_objects(
    batch: int,
    seed: int,
    *,
    background: str = MIXED,
    device: torch.device | str = "cpu",
    frames: int = 16,
    size: int = 64,
) -> Objects:
    """Draw clips of named objects; nothing waits for the device.

    Args:
        batch: Number of clips; one, two, three and four objects are equally frequent.
        seed: From 0; the same seed gives the same clips on the same type of device.
        background: One of `tubelet.train.clips.BACKGROUNDS`, or `mixed`.
        frames: Length, from 8 on.
        size: Side in pixels, from 32 on.

    Raises:
        ClipError: A number is out of range.
        UnsupportedError: An unknown background.
    """
    if batch < 1 or seed < 0 or frames < 8 or size < 32:
        raise ClipError(
            f"object clips need batch >= 1, seed >= 0, frames >= 8, size >= 32; got {batch}, "
            f"{seed}, {frames}, {size}"
        )
    if background not in (*BACKGROUNDS, MIXED):
        known = ", ".join((*BACKGROUNDS, MIXED))
        raise UnsupportedError(f"unknown background {background!r}; known: {known}")
    device = torch.device(device)
    dice = Dice("objects", seed, device)
    with torch.autocast(device.type, enabled=False):
        kinds = choose_kinds(dice, batch, background, BACKGROUNDS)
        shot = Shot(dice, kinds, frames, size, background in ("noise", MIXED))
        return _film(shot)


def _film(shot: Shot) -> Objects:
    dice, batch, frames = shot.dice, shot.batch, shot.frames
    each = (batch, MOST_OBJECTS)
    count = dice.balanced(MOST_OBJECTS, batch) + 1
    present = torch.arange(MOST_OBJECTS, device=dice.device) < count[:, None]
    colours, shapes = (
        dice.uniform(0, 1, batch, len(values)).argsort(1) for values in (COLOURS, SHAPES)
    )
    colour, shape = colours[:, :MOST_OBJECTS], shapes[:, :MOST_OBJECTS]
    absent = torch.stack([colours[:, MOST_OBJECTS], shapes[:, MOST_OBJECTS]], dim=1)
    direction, third = dice.integers(DIRECTIONS, *each), dice.integers(len(THIRDS), *each)
    low, high = constant(THIRDS, dice.device)[third].unbind(-1)
    start = ((low + (high - low) * dice.uniform(0, 1, *each)) * frames).long()
    radius = dice.uniform(*RADIUS, *each)
    path = _paths(dice, direction, start, radius, frames)
    scenery = panning(dice, shot.kinds, shot.scale)
    canvas = shot.canvas(scenery)
    time = torch.arange(frames, device=dice.device)
    for item in range(MOST_OBJECTS):
        hue = colour[:, item] / len(COLOURS) + dice.uniform(-0.02, 0.02, batch)
        shot.stamp(
            canvas,
            figures(dice, shape[:, item], hue % 1, shot.scale),
            path[:, item],
            radius[:, item],
            RADIUS[1],
            shown=(time >= start[:, item, None]) & present[:, item, None],
            relevant=True,
        )
    shot.finish(canvas, scenery, count)
    return Objects(canvas.pixels, present, colour, shape, direction, start, third, absent, path)


def _paths(
    dice: Dice, direction: Tensor, start: Tensor, radius: Tensor, frames: int
) -> Float[Tensor, "b o t 2"]:
    """Straight paths that stay in view from `start` on; where they lie does not tell the way."""
    lasts = frames - 1 - start
    speed = torch.minimum(dice.uniform(*SPEED, *start.shape), 0.9 * (64 - 2 * radius) / lasts)
    room = (32 - radius - speed * lasts / 2).clamp(min=0)[..., None]
    middle = dice.uniform(-1, 1, *start.shape, 2) * room
    time = torch.arange(frames, device=dice.device) - (start + lasts / 2)[..., None]
    velocity = heading(direction) * speed[..., None]
    return middle[:, :, None] + velocity[:, :, None] * time[..., None]
