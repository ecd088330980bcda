"""Opening a video file and decoding it packet by packet, with one-line errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tubelet.core.errors import ClipError, TubeletError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg renders any text as a terminal screen and calls it video.
_TEXT_FORMATS = ("tty", "bin", "xbin", "adf", "idf")


@dataclass
class Health:
    """What a decoding run met besides frames.

    Attributes:
        failures: one reason for each packet that could not be read or decoded.
        hidden: packets that the file itself marks as not to be shown.
    """

    failures: list[str] = field(default_factory=list)
    hidden: int = 0


@contextmanager
def open_video(path: str | os.PathLike[str]) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Opens a video; inside, every FFmpeg error turns into a ``ClipError``.

    Args:
        path: the video file.

    Yields:
        The open container and its first video stream, ready to decode.

    Raises:
        ClipError: the file is missing, empty, no video, of an unknown codec, or corrupt.
    """
    import av

    _check_file(path)
    try:
        # An absolute path cannot be mistaken for a protocol such as "http:" or "concat:".
        with av.open(os.path.abspath(path), **_lenient()) as container:
            yield container, _video_stream(path, container)
    except TubeletError:
        raise
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(
            f"{path}: cannot be read as a video ({reason.splitlines()[0]});"
            " it may be corrupt or cut short, try another copy or re-encode it"
        ) from error


def _lenient() -> dict[str, Any]:
    # PyAV up to 18 refuses titles that are not UTF-8 unless told; 19 has no such option.
    from av.container import InputContainer

    return {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}


def _check_file(path: str | os.PathLike[str]) -> None:
    if not os.path.exists(path):
        raise ClipError(f"{path}: no such file; check the path")
    if os.path.isdir(path):
        raise ClipError(f"{path}: is a folder; name one video file inside it")
    if not os.path.isfile(path):
        raise ClipError(f"{path}: is not a regular file; save the video to disk first")
    if os.path.getsize(path) == 0:
        raise ClipError(f"{path}: is empty (0 bytes); copy or download it again")


def _video_stream(path: str | os.PathLike[str], container: "InputContainer") -> "VideoStream":
    from av.stream import Disposition

    if container.format.name in _TEXT_FORMATS:
        raise ClipError(f"{path}: holds text, not video; name a video file")
    # The cover picture of a song is stored as a video of one frame.
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise ClipError(f"{path}: has no video, only {', '.join(kinds)}; name a file with video")
    if streams[0].codec_context is None:
        raise ClipError(
            f"{path}: its codec is unknown to this PyAV build; re-encode it, for instance to h264"
        )
    streams[0].thread_type = "AUTO"
    return streams[0]


def decode_frames(
    container: "InputContainer", stream: "VideoStream", health: Health
) -> Iterator["VideoFrame"]:
    """Yields frames in display order, carrying on past packets that do not decode.

    Args:
        container: the open container.
        stream: its video stream.
        health: filled with the failures met on the way.

    Yields:
        Decoded frames, pixels not yet converted.
    """
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            health.failures.append(str(error.strerror))
            return
        if packet is None:
            return
        health.hidden += packet.is_discard
        try:
            decoded = packet.decode()
        except av.FFmpegError as error:
            health.failures.append(str(error.strerror))
            continue
        yield from decoded
