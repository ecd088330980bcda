"""Scenes of sprites that move in straight lines: direction, needle, ego-motion, mask.

Lengths are given in pixels at size 64 and scale with the size. Positions are measured from the
middle of the frame until they are stamped.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.train.clips.canvas import Canvas
from tubelet.train.clips.dice import Dice, unit_vector
from tubelet.train.clips.scenery import (
    BACKGROUNDS,
    Scenery,
    finish,
    paint_background,
    panning,
)
from tubelet.train.clips.sprites import GLYPHS, MARGIN, RED, glyphs, sprites

DIRECTIONS = 8
"""Label k is a heading of k * 45 degrees: 0 right, 2 down, 4 left, 6 up."""

RADIUS, SPEED = (5.0, 8.0), (1.0, 2.0)
EGO_RADIUS, EGO_SPEED = (5.0, 6.0), (1.0, 1.5)
CAMERA, FAST_CAMERA = (0.5, 1.25), (1.0, 1.75)
"""Speeds of the camera in ego-motion; the fast one under `pan`."""

GLYPH_SIDE = (10.0, 11.0)
GLYPH_FRAMES = 2


@dataclass(frozen=True)
class Shot:
    """One batch to be painted: the dice, the background kinds and the geometry."""

    dice: Dice
    kinds: Tensor
    frames: int
    size: int
    noisy: bool
    exposure: tuple[int, int] = (GLYPH_FRAMES, GLYPH_FRAMES)

    @property
    def batch(self) -> int:
        return len(self.kinds)

    @property
    def scale(self) -> float:
        return self.size / 64

    def canvas(self, scenery: Scenery) -> Canvas:
        """Frames that show only the background."""
        return Canvas(paint_background(self.dice, scenery, self.frames, self.size))

    def stamp(
        self,
        canvas: Canvas,
        image: Tensor,
        path: Float[Tensor, "b t 2"],
        radius: Float[Tensor, " b"],
        largest: float,
        **options,
    ) -> None:
        """`Canvas.stamp` for a path from the middle of the frame, lengths at size 64."""
        factor = MARGIN * self.scale
        centre = path * self.scale + (self.size - 1) / 2
        canvas.stamp(image, centre, radius * factor, largest * factor, **options)

    def finish(self, canvas: Canvas, scenery: Scenery, labels: Tensor) -> tuple[Canvas, Tensor]:
        finish(self.dice, scenery, canvas.pixels, self.noisy)
        return canvas, labels


def direction(shot: Shot) -> tuple[Canvas, Tensor]:
    """A red sprite crosses among two of other colours; which way does it go?"""
    dice, batch = shot.dice, shot.batch
    labels = dice.balanced(DIRECTIONS, batch)
    scenery = panning(dice, shot.kinds, shot.scale)
    canvas = shot.canvas(scenery)
    for _ in range(2):
        other = (labels + 1 + dice.integers(DIRECTIONS - 1, batch)) % DIRECTIONS
        _moving_sprite(shot, canvas, heading(other), dice.uniform(0.2, 0.8, batch))
    # Painted last, so that nothing hides the sprite that is asked for.
    red = (RED + dice.uniform(-0.02, 0.02, batch)) % 1
    _moving_sprite(shot, canvas, heading(labels), red, relevant=True)
    return shot.finish(canvas, scenery, labels)


def needle(shot: Shot) -> tuple[Canvas, Tensor]:
    """A glyph flashes up somewhere, for two frames unless asked otherwise; which one?"""
    dice, batch, frames = shot.dice, shot.batch, shot.frames
    labels = dice.balanced(GLYPHS, batch)
    scenery = panning(dice, shot.kinds, shot.scale)
    canvas = shot.canvas(scenery)
    for _ in range(2):
        # No distractor is yellow like the plate of the glyph.
        _moving_sprite(shot, canvas, dice.heading(batch), dice.uniform(0.25, 1.0, batch))
    low, high = shot.exposure
    long = (low * (high / low) ** dice.uniform(0, 1, batch)).round()
    start = (dice.uniform(0, 1, batch) * (frames - long + 1)).floor()[:, None]
    time = torch.arange(frames, device=dice.device)
    shown = (time >= start) & (time < start + long[:, None])
    radius = dice.uniform(*GLYPH_SIDE, batch) / 2
    place = _midpoint(dice, radius * MARGIN)[:, None].expand(-1, frames, -1)
    shot.stamp(
        canvas,
        glyphs(labels, shot.scale),
        place,
        radius,
        GLYPH_SIDE[1] / 2,
        shown=shown,
        relevant=True,
    )
    return shot.finish(canvas, scenery, labels)


def ego_motion(shot: Shot) -> tuple[Canvas, Tensor]:
    """The camera moves and so does a sprite; which way does it go in the world?"""
    dice, batch = shot.dice, shot.batch
    labels = dice.balanced(DIRECTIONS, batch)
    radius = dice.uniform(*EGO_RADIUS, batch)
    fast = shot.kinds == BACKGROUNDS.index("pan")
    own, view = ego_velocities(dice, labels, fast, radius, shot.frames)
    scenery = Scenery(shot.kinds, view * shot.scale, FAST_CAMERA[1] * shot.scale)
    canvas = shot.canvas(scenery)
    # The margin is that of the fastest heading, so where the path lies does not tell the label.
    fastest = own.norm(dim=-1) + view.norm(dim=-1)
    middle = _midpoint(dice, radius + fastest * (shot.frames - 1) / 2)
    image = sprites(dice, dice.uniform(0, 1, batch), shot.scale)
    path = straight(middle, own - view, shot.frames)
    shot.stamp(canvas, image, path, radius, EGO_RADIUS[1], relevant=True)
    return shot.finish(canvas, scenery, labels)


def ego_velocities(
    dice: Dice, labels: Tensor, fast: Tensor, radius: Tensor | float, frames: int
) -> tuple[Tensor, Tensor]:
    """Velocities `[B, 2]` over the ground of the sprites and of the camera."""
    batch = len(labels)
    own = dice.uniform(*EGO_SPEED, batch)
    camera = torch.where(fast, dice.uniform(*FAST_CAMERA, batch), dice.uniform(*CAMERA, batch))
    # Both are slowed alike where a long clip would carry the sprite out of view.
    room = 2 * (31.0 - radius) / ((own + camera) * (frames - 1))
    slower = room.clamp(max=1)
    return heading(labels) * (own * slower)[:, None], dice.heading(batch) * (camera * slower)[
        :, None
    ]


def mask(shot: Shot) -> tuple[Canvas, Tensor]:
    """Two or three sprites move; where are they?"""
    dice, batch = shot.dice, shot.batch
    scenery = panning(dice, shot.kinds, shot.scale)
    canvas = shot.canvas(scenery)
    third = (dice.uniform(0, 1, batch) < 0.5)[:, None].expand(-1, shot.frames)
    for shown in (None, None, third):
        hue, way = dice.uniform(0, 1, batch), dice.heading(batch)
        _moving_sprite(shot, canvas, way, hue, relevant=True, shown=shown)
    return shot.finish(canvas, scenery, torch.zeros(batch, dtype=torch.long, device=dice.device))


def heading(labels: Tensor) -> Float[Tensor, "*b 2"]:
    """Unit vectors of direction labels."""
    return unit_vector(labels * (2 * torch.pi / DIRECTIONS))


def straight(
    middle: Float[Tensor, "b 2"], velocity: Float[Tensor, "b 2"], frames: int
) -> Float[Tensor, "b t 2"]:
    """Straight paths at constant speed with the given midpoint in time."""
    time = torch.arange(frames, device=middle.device) - (frames - 1) / 2
    return middle[:, None] + velocity[:, None] * time[:, None]


def _moving_sprite(
    shot: Shot, canvas: Canvas, way: Float[Tensor, "b 2"], hue: Tensor, **options
) -> None:
    """A sprite that stays in view and whose midpoint does not depend on its heading."""
    dice, batch = shot.dice, shot.batch
    radius = dice.uniform(*RADIUS, batch)
    speed = dice.uniform(*SPEED, batch)
    speed = torch.minimum(speed, 0.9 * (64 - 2 * radius) / (shot.frames - 1))
    middle = _midpoint(dice, radius + speed * (shot.frames - 1) / 2)
    path = straight(middle, way * speed[:, None], shot.frames)
    shot.stamp(canvas, sprites(dice, hue, shot.scale), path, radius, RADIUS[1], **options)


def _midpoint(dice: Dice, margin: Float[Tensor, " b"]) -> Float[Tensor, "b 2"]:
    """Uniform in the frame, at least `margin` from its border."""
    room = (32 - margin).clamp(min=0)[:, None]
    return dice.uniform(-1, 1, len(margin), 2) * room
