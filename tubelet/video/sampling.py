"""Choosing frames by presentation time."""

import math

import torch
from torch import Tensor

from tubelet.core.errors import ClipError, ShapeError

# Matroska and FLV round times to the millisecond, so a frame may start that much late.
_ROUNDING = 1e-3


def sample_indices(
    times: Tensor, num_frames: int, *, rate: float | None = None, duration: float | None = None
) -> Tensor:
    """Chooses which frames to take from a list of presentation times.

    Each target time takes the frame on screen at that moment, the last with ``time <= target``.
    With ``rate``, a frame that starts up to a millisecond after the target counts as on screen,
    because containers round times.

    Args:
        times: float64 ``[N]``, ascending presentation times in seconds.
        num_frames: how many frames to choose, from 1.
        rate: None puts the targets at the centres of ``num_frames`` equal slices of the duration;
            a number puts them ``1 / rate`` seconds apart from the first frame on.
        duration: seconds from ``times[0]`` to the end of the last frame. None assumes that the
            last frame stays for the median gap.

    Returns:
        int64 ``[num_frames]``, ascending indices into ``times``.

    Raises:
        ShapeError: an argument has the wrong shape or is out of range.
        ClipError: fewer than ``num_frames`` times, or the last target is past the end.
    """
    check_request(num_frames, rate)
    _check_times(times)
    if times.numel() < num_frames:
        raise ClipError(
            f"has {_frame_count(times.numel())} but {num_frames} are wanted;"
            " use a longer clip or a smaller num_frames"
        )
    length = _duration(times, duration)
    steps = torch.arange(num_frames, dtype=torch.float64)
    if rate is None:
        targets = times[0] + (steps + 0.5) * (length / num_frames)
    else:
        slack = min(_ROUNDING, median_gap(times) / 4)
        targets = times[0] + steps / rate + slack
        if num_frames > 1 and float(targets[-1] - times[0]) >= length:
            raise ClipError(
                f"lasts {length:.2f} s but {num_frames} frames at {rate:g} per second need"
                f" more than {(num_frames - 1) / rate:.2f} s; use a higher rate or fewer frames"
            )
    return (torch.searchsorted(times, targets, right=True) - 1).clamp_min(0)


def check_request(num_frames: int, rate: float | None) -> None:
    """Checks what the caller asked for.

    Args:
        num_frames: number of frames, from 1.
        rate: frames per second above 0, or None.

    Raises:
        ShapeError: either is out of range.
    """
    if int(num_frames) != num_frames or num_frames < 1:
        raise ShapeError(f"num_frames must be a whole number from 1, got {num_frames}")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ShapeError(f"rate must be a positive number of frames per second, got {rate}")


def _check_times(times: Tensor) -> None:
    if times.ndim != 1 or times.numel() == 0 or times.dtype != torch.float64:
        raise ShapeError(f"times must be float64 [N], got {times.dtype} {list(times.shape)}")
    if not bool(torch.isfinite(times).all()) or bool((times.diff() < 0).any()):
        raise ShapeError("times must be finite and in ascending order")


def _duration(times: Tensor, duration: float | None) -> float:
    span = float(times[-1] - times[0])
    if duration is None:
        return span + median_gap(times)
    if not math.isfinite(duration) or duration < span:
        raise ShapeError(f"duration must reach the last frame at {span:g} s, got {duration:g} s")
    return duration


def median_gap(times: Tensor) -> float:
    """Median distance between neighbours of ``times`` [N] in seconds; 0 for a single time."""
    return float(times.diff().median()) if times.numel() > 1 else 0.0


def _frame_count(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
