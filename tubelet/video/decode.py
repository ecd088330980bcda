"""Reading clips by presentation time, in memory that holds only the chosen frames."""

import math
import os
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tubelet.core.errors import ClipError
from tubelet.video.clip import MIN_SIDE, Clip
from tubelet.video.orientation import read_orientation
from tubelet.video.sampling import check_request, sample_indices
from tubelet.video.source import Health, decode_frames, open_video
from tubelet.video.transform import check_size, resize

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_DEFAULT_RATE = 25.0
# Containers count their duration in these.
_MICROSECOND = Fraction(1, 1_000_000)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video, before reading all of it.

    Attributes:
        width: width in pixels as displayed, after rotation.
        height: height in pixels as displayed, after rotation.
        frames: number of frames the container declares, or None.
        duration: length in seconds the container declares, or None.
        fps: average frames per second, or None.
        codec: name of the codec, for instance ``h264``.
        rotation: counter-clockwise degrees that the display applies: 0, 90, 180 or 270.
        mirrored: whether the display also flips left and right, before rotating.
    """

    width: int
    height: int
    frames: int | None
    duration: float | None
    fps: float | None
    codec: str
    rotation: int
    mirrored: bool


@dataclass(frozen=True)
class _Timeline:
    """When every frame is shown: float64 ``[N]`` seconds, the end, and any damage found."""

    times: Tensor
    duration: float
    damage: str | None


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Reads size, length and codec of a video; decodes only its first frame.

    Args:
        path: the video file.

    Returns:
        What the file declares; see :class:`VideoInfo`.

    Raises:
        ClipError: the file is missing, is no video, or its first frame does not decode.
    """
    with open_video(path) as (container, stream):
        health = Health()
        frame = next(decode_frames(container, stream, health), None)
        if frame is None:
            raise ClipError(_nothing_decoded(path, health))
        way = read_orientation(path, frame)
        width, height = way.displayed_size(frame.width, frame.height)
        return VideoInfo(
            width=width,
            height=height,
            frames=stream.frames or None,
            duration=_declared_duration(container, stream),
            fps=float(stream.average_rate) if stream.average_rate else None,
            codec=stream.codec_context.name,
            rotation=way.degrees,
            mirrored=way.mirrored,
        )


def read_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int = 16,
    rate: float | None = None,
    size: tuple[int, int] | None = None,
    crop: str = "center",
) -> Clip:
    """Reads a fixed number of frames from a video, chosen by presentation time.

    The file is decoded twice, once for the times and once for the chosen frames, so memory holds
    the chosen frames only. Frames come out upright: rotation and mirroring are applied. Stored
    pixels are taken as square. Damage that leaves enough frames gives a ``UserWarning``.

    Args:
        path: the video file, in any container and codec that PyAV decodes.
        num_frames: how many frames to return, from 1.
        rate: None spreads the frames over the whole clip, each taken at the centre of one of
            ``num_frames`` equal slices of its duration. A number takes that many frames per
            second from the beginning; frames repeat where the video has fewer.
        size: ``(height, width)`` of the result in pixels, or None for the size in the file.
        crop: ``"center"`` covers ``size`` and cuts the rest, ``"none"`` stretches.

    Returns:
        A clip of ``num_frames`` frames. Its ``times`` are those of the file; its ``fps`` is
        ``rate``, or ``num_frames`` over the duration.

    Raises:
        ShapeError: ``num_frames``, ``rate``, ``size`` or ``crop`` is out of range.
        ClipError: the file is missing, is no video, is damaged beyond use, has fewer frames than
            wanted, ends before the last one, or is smaller than 2x2 pixels.
    """
    check_request(num_frames, rate)
    if size is not None:
        check_size(size, crop)
    line = _read_timeline(path, num_frames, rate)
    try:
        indices = sample_indices(line.times, num_frames, rate=rate, duration=line.duration)
    except ClipError as error:
        damage = f" ({line.damage})" if line.damage else ""
        raise ClipError(f"{path}: {error}{damage}") from None
    if line.damage:
        warnings.warn(f"{path}: {line.damage}", stacklevel=2)
    frames = _read_frames(path, indices.tolist(), size, crop)
    fps = rate if rate is not None else num_frames / line.duration
    return Clip(frames=frames, times=line.times[indices], source=os.fspath(path), fps=float(fps))


def _read_timeline(path: str | os.PathLike[str], num_frames: int, rate: float | None) -> _Timeline:
    """Decodes without converting pixels, and stops early once ``rate`` is served."""
    needed = math.inf if rate is None else (num_frames - 1) / rate
    health = Health()
    stamps: list[float | None] = []
    last, complete = None, True
    with open_video(path) as (container, stream):
        for last in decode_frames(container, stream, health):
            stamps.append(_seconds(last.pts, last.time_base))
            if len(stamps) > num_frames and _passed(stamps, needed):
                complete = False
                break
        if last is None:
            raise ClipError(_nothing_decoded(path, health))
        step = 1.0 / float(stream.guessed_rate or _DEFAULT_RATE)
        times, damage = _usable_times(stamps, step)
        stay = _seconds(last.duration, last.time_base) or step
        duration = float(times[-1] - times[0]) + stay
        if complete:
            # Some containers count their duration from 0, others from the first frame.
            reached = max(duration, float(times[0]) + duration)
            declared = _declared_duration(container, stream)
            damage = _damage(health, len(stamps), stream.frames, reached, declared) or damage
    return _Timeline(times, duration, damage)


def _passed(stamps: list[float | None], needed: float) -> bool:
    first, latest = stamps[0], stamps[-1]
    return first is not None and latest is not None and latest - first > needed


def _usable_times(stamps: list[float | None], step: float) -> tuple[Tensor, str | None]:
    """Times to sample by; frames are counted ``step`` seconds apart if the file's do not serve."""
    counted = torch.arange(len(stamps), dtype=torch.float64) * step
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps):
        return counted, None
    times = torch.tensor(known, dtype=torch.float64)
    if bool((times.diff() < 0).any()):
        return counted, "its timestamps run backwards, so frames are counted instead"
    return times, None


def _damage(
    health: Health, count: int, declared_frames: int, reached: float, declared: float | None
) -> str | None:
    """Says what is missing from a clip that was decoded to its end, or None."""
    expected = declared_frames - health.hidden
    if count < expected:
        return f"damaged: only {count} of the {expected} frames it declares decode"
    if health.failures:
        packets = "1 packet" if len(health.failures) == 1 else f"{len(health.failures)} packets"
        return f"damaged: {packets} could not be decoded ({health.failures[0]})"
    # Sound may outlast the picture a little; a file cut short misses more.
    if not declared_frames and declared is not None and reached < 0.95 * declared - 0.5:
        return f"its video ends at {reached:.2f} s of the {declared:.2f} s it declares"
    return None


def _declared_duration(container: "InputContainer", stream: "VideoStream") -> float | None:
    own = _seconds(stream.duration, stream.time_base)
    return own if own is not None else _seconds(container.duration, _MICROSECOND)


def _seconds(ticks: int | None, time_base: Fraction | None) -> float | None:
    return None if ticks is None or time_base is None else float(ticks * time_base)


def _nothing_decoded(path: str | os.PathLike[str], health: Health) -> str:
    reason = health.failures[0] if health.failures else "the stream is empty"
    return (
        f"{path}: none of its video frames decode ({reason});"
        " it may be corrupt or cut short, try another copy or re-encode it"
    )


def _read_frames(
    path: str | os.PathLike[str], indices: list[int], size: tuple[int, int] | None, crop: str
) -> Tensor:
    """Converts the frames numbered ``indices`` to uint8 ``[len(indices), 3, H, W]``."""
    wanted, picked = set(indices), {}
    with open_video(path) as (container, stream):
        for number, frame in enumerate(decode_frames(container, stream, Health())):
            if number in wanted:
                picture = _to_rgb(path, frame)
                picked[number] = picture if size is None else resize(picture, size, crop)
            if number == indices[-1]:
                break
    if len(picked) < len(wanted):
        raise ClipError(f"{path}: changed while it was being read; try again")
    if len({picture.shape for picture in picked.values()}) > 1:
        raise ClipError(f"{path}: its frames change size midway; pass size=(height, width)")
    return torch.cat([picked[index] for index in indices])


def _to_rgb(path: str | os.PathLike[str], frame: "VideoFrame") -> Tensor:
    """One upright frame, uint8 ``[1, 3, H, W]``."""
    if min(frame.width, frame.height) < MIN_SIDE:
        raise ClipError(
            f"{path}: is {frame.width}x{frame.height} pixels; the smallest usable clip is"
            f" {MIN_SIDE}x{MIN_SIDE}, use a larger one"
        )
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return read_orientation(path, frame).apply(pixels).contiguous()[None]
