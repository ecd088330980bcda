"""The clip that every reader returns and every model wrapper takes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.errors import ClipError, ShapeError

MIN_SIDE = 2


@dataclass(frozen=True)
class Clip:
    """A few RGB frames with the time at which each one is shown.

    Attributes:
        frames: uint8 ``[T, 3, H, W]``, RGB, 0 to 255, at least one frame of 2x2 pixels.
        times: float64 ``[T]``, presentation time of each frame in seconds. Never decreasing;
            a frame that stays on screen for several sampling instants appears several times.
        source: where the clip came from, a path or a short description.
        fps: frames per second of these frames, or None when they have no steady rate.

    Raises:
        ShapeError: a tensor has the wrong type, shape or values.
        ClipError: the clip is empty or smaller than 2x2 pixels.
    """

    frames: Tensor
    times: Tensor
    source: str
    fps: float | None

    def __post_init__(self) -> None:
        check_frames(self.frames, "Clip.frames")
        self._check_times()
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ShapeError(f"Clip.fps must be a positive number or None, got {self.fps}")

    def _check_times(self) -> None:
        times, count = self.times, self.frames.shape[0]
        if not isinstance(times, Tensor) or times.dtype != torch.float64:
            found = times.dtype if isinstance(times, Tensor) else type(times).__name__
            raise ShapeError(f"Clip.times must be a float64 tensor of seconds, got {found}")
        if tuple(times.shape) != (count,):
            raise ShapeError(
                f"Clip.times must hold one time per frame, shape [{count}], got {list(times.shape)}"
            )
        if not bool(torch.isfinite(times).all()):
            raise ShapeError("Clip.times must be finite")
        if bool((times.diff() < 0).any()):
            raise ShapeError("Clip.times must be in ascending order")


def check_frames(frames: Tensor, name: str = "frames") -> None:
    """Checks that ``frames`` is a usable uint8 ``[T, 3, H, W]`` tensor.

    Args:
        frames: the tensor to check.
        name: how to call it in the message.

    Raises:
        ShapeError: not a uint8 tensor of shape ``[T, 3, H, W]``.
        ClipError: no frame, or frames smaller than 2x2 pixels.
    """
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        found = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise ShapeError(f"{name} must be a uint8 tensor, got {found}")
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ShapeError(f"{name} must have shape [T, 3, H, W], got {list(frames.shape)}")
    if frames.shape[0] == 0:
        raise ClipError(f"{name} holds no frame; at least one is needed")
    if min(frames.shape[2:]) < MIN_SIDE:
        height, width = frames.shape[2:]
        raise ClipError(
            f"{name} are {width}x{height} pixels; the smallest usable clip is {MIN_SIDE}x{MIN_SIDE}"
        )
