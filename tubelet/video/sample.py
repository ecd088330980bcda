"""A procedural demo clip: no download, the same pixels for the same seed."""

import math

import torch
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.video import scenery
from tubelet.video.clip import Clip

_NOISE_SIGMA = 1.5 / 255
_MIN_SIDE = 32
# Motion is written for this height, in pixels per frame, and scales with the picture.
_REFERENCE_HEIGHT = 256.0


def render_sample_clip(
    *, frames: int = 48, height: int = 256, width: int = 320, fps: float = 24.0, seed: int = 0
) -> Clip:
    """Renders a short clip with a camera pan, a still camera, moving objects and a cut.

    The first two thirds show a landscape. The camera pans one pixel per frame during their first
    half and stands still during the second, while a ball bounces, a kite sways and a small disc
    flies through. A hard cut leads to an indoor scene with a still camera, a pendulum, a rolling
    ball and a spinning tile. Every frame has a little sensor noise, as a camera would add.

    Args:
        frames: number of frames, from 1.
        height: height in pixels, from 32.
        width: width in pixels, from 32.
        fps: frames per second, above 0; spaces the times and does not change the pictures.
        seed: chooses the textures and the noise.

    Returns:
        A clip of uint8 ``[frames, 3, height, width]``, starting at 0 seconds.

    Raises:
        ShapeError: an argument is out of range.
    """
    if frames < 1 or min(height, width) < _MIN_SIDE:
        raise ShapeError(
            f"a sample clip needs at least 1 frame of {_MIN_SIDE}x{_MIN_SIDE} pixels,"
            f" got {frames} of {width}x{height}"
        )
    if not (math.isfinite(fps) and fps > 0):
        raise ShapeError(f"fps must be a positive number, got {fps}")
    generator = torch.Generator().manual_seed(seed)
    outdoor = shot_length(frames)
    pan = (outdoor + 1) // 2
    landscape = scenery.landscape(height, width + pan, generator)
    room = scenery.room(height, width, generator)
    pictures = torch.empty(frames, 3, height, width, dtype=torch.uint8)
    for number in range(frames):
        if number < outdoor:
            left = min(number, pan)
            picture = landscape[:, :, left : left + width].clone()
            _draw_outdoor(picture, number, left)
        else:
            picture = room.clone()
            _draw_indoor(picture, number - outdoor)
        picture += _NOISE_SIGMA * torch.randn(picture.shape, generator=generator)
        pictures[number] = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    times = torch.arange(frames, dtype=torch.float64) / fps
    return Clip(frames=pictures, times=times, source=f"sample clip, seed {seed}", fps=float(fps))


def shot_length(frames: int) -> int:
    """Number of frames before the cut in a sample clip of ``frames`` frames."""
    return max(1, round(frames * 2 / 3))


def _draw_outdoor(picture: Tensor, step: int, left: int) -> None:
    """Draws the objects of the landscape into ``[3, H, W]`` seen from ``left`` pixels in."""
    height, width = picture.shape[1:]
    unit = height / _REFERENCE_HEIGHT
    floor = 0.90 * height

    kite_x = (0.70 * width + 34 * unit * math.sin(step / 9)) - 0.35 * left
    kite_y = 0.26 * height + 16 * unit * math.sin(step / 6 + 1)
    scenery.shadow(picture, kite_x, 0.80 * height, 26 * unit, 0.16)
    scenery.tail(picture, kite_x, kite_y, 17 * unit, step / 4)
    scenery.tile(picture, kite_x, kite_y, 20 * unit, 0.785 + 0.35 * math.sin(step / 7), warm=True)

    radius = 23 * unit
    ball_x = 0.16 * width + 3.2 * unit * step - left
    hop = abs(math.cos(step * math.pi / 15)) * 92 * unit
    scenery.shadow(picture, ball_x, floor, radius * (1.15 - 0.003 * hop / unit), 0.5)
    scenery.ball(picture, ball_x, floor - radius - hop, radius, (0.86, 0.20, 0.14), step / 8)

    disc_x = (width * 0.95 - 7.5 * unit * step) % (width + 40 * unit) - 20 * unit
    disc_y = 0.56 * height + 0.09 * height * math.sin(disc_x / width * math.pi)
    scenery.shadow(picture, disc_x, 0.84 * height, 9 * unit, 0.3)
    scenery.ball(picture, disc_x, disc_y, 7.5 * unit, (0.98, 0.83, 0.16), 0.0)


def _draw_indoor(picture: Tensor, step: int) -> None:
    """Draws the objects of the room into ``[3, H, W]``."""
    height, width = picture.shape[1:]
    unit = height / _REFERENCE_HEIGHT
    table = 0.86 * height

    swing = 0.62 * math.cos(step * math.pi / 11)
    length = 0.46 * height
    bob_x, bob_y = 0.5 * width + length * math.sin(swing), length * math.cos(swing)
    scenery.shadow(picture, bob_x, 0.78 * height, 24 * unit, 0.35)
    scenery.rod(picture, (0.5 * width, 0.0), (bob_x, bob_y), 1.4 * unit)
    scenery.ball(picture, bob_x, bob_y, 20 * unit, (0.90, 0.68, 0.25), 0.0)

    tile_x = 0.80 * width
    scenery.shadow(picture, tile_x, table, 30 * unit, 0.45)
    scenery.tile(picture, tile_x, table - 33 * unit, 21 * unit, step * 0.16, warm=False)

    radius = 26 * unit
    ball_x = 0.10 * width + 4.0 * unit * step
    scenery.shadow(picture, ball_x, 0.93 * height, radius * 1.1, 0.55)
    turn = 4.0 * step / 26
    scenery.ball(picture, ball_x, 0.93 * height - radius, radius, (0.16, 0.62, 0.66), turn)
