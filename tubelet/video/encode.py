"""Writing clips, so that a failed write never leaves half a file behind."""

import math
import os
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tubelet.core.errors import ClipError, ShapeError, UnsupportedError
from tubelet.video.clip import check_frames

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# 4:2:0 plays everywhere; MJPEG prefers the full range twin.
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
_CRF_CODECS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "libaom-av1")
_BT601 = 6  # AVCOL_SPC_SMPTE170M, the matrix that swscale uses for RGB to YUV
_LIMITED_RANGE = 1
_MIN_FPS = 0.001


def write_video(
    path: str | os.PathLike[str],
    frames: Tensor,
    fps: float,
    *,
    codec: str = "libx264",
    crf: float = 20,
) -> None:
    """Encodes frames into a video file.

    The file is written under a temporary name in the same folder and renamed once complete.
    Frames are stored as YUV 4:2:0, which needs even sides: an odd height or width is padded by
    one pixel, repeating the last row or column, so the file is that one pixel larger.

    Args:
        path: the file to write; its suffix chooses the container (``.mp4``, ``.webm``, ``.mkv``).
        frames: uint8 ``[T, 3, H, W]``, RGB, 0 to 255.
        fps: frames per second, from 0.001.
        codec: FFmpeg encoder name, for instance ``libx264``, ``libvpx-vp9``, ``mpeg4``, ``mjpeg``.
        crf: constant quality, lower is better; for the x264, x265, VP9 and AV1 encoders. The
            others have no such setting and run at their own default quality.

    Raises:
        ShapeError: ``frames`` or ``fps`` do not fit.
        UnsupportedError: unknown encoder or suffix, or an encoder the container cannot hold.
        ClipError: no frames, or the file cannot be written.
    """
    check_frames(frames)
    if not (math.isfinite(fps) and fps >= _MIN_FPS):
        raise ShapeError(f"fps must be a number from {_MIN_FPS} on, got {fps}")
    final = Path(path)
    if not final.parent.is_dir():
        raise ClipError(f"{path}: {final.parent} is not a folder; create it or choose another")
    if final.is_dir():
        raise ClipError(f"{path}: is a folder; name a file inside it")
    _check_codec(codec)
    partial = final.with_name(f".{final.stem}-{uuid.uuid4().hex[:8]}{final.suffix}")
    try:
        _encode(partial, frames, fps, codec, crf)
        os.replace(partial, final)
    except OSError as error:
        raise ClipError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder and codec"
        ) from error
    except ValueError as error:
        raise UnsupportedError(
            f"{path}: cannot hold {codec} video ({error}); change the suffix or the codec"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_codec(codec: str) -> None:
    import av

    try:
        kind = av.Codec(codec, "w").type
    except ValueError:
        kind = None
    if kind != "video":
        raise UnsupportedError(f"{codec!r} is not a video encoder of this PyAV build; try libx264")


def _encode(path: Path, frames: Tensor, fps: float, codec: str, crf: float) -> None:
    import av

    with av.open(str(path.absolute()), "w") as container:
        # A fraction like 30000/1001 stays exact, and fits the 16 bit clock of MPEG-4.
        rate = Fraction(fps).limit_denominator(1001)
        added = container.add_stream(codec, rate=rate, options=_options(codec, crf))
        stream = cast("VideoStream", added)
        stream.height = frames.shape[2] + frames.shape[2] % 2
        stream.width = frames.shape[3] + frames.shape[3] % 2
        stream.pix_fmt = _pixel_format(codec)
        if stream.pix_fmt == "yuv420p":
            # Untagged HD video is shown with other colours by most players.
            stream.codec_context.colorspace = _BT601
            stream.codec_context.color_range = _LIMITED_RANGE
        for picture in _pictures(frames):
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _options(codec: str, crf: float) -> dict[str, str]:
    if codec not in _CRF_CODECS:
        return {}
    options = {"crf": f"{crf:g}"}
    if codec == "libx265":
        options["x265-params"] = "log-level=error"
    if codec in ("libvpx-vp9", "libaom-av1"):
        # Without this the default bit rate wins over crf.
        options["b"] = "0"
    return options


def _pixel_format(codec: str) -> str:
    import av

    offered = [found.name for found in av.Codec(codec, "w").video_formats or ()]
    usable = [name for name in offered if name in _PIXEL_FORMATS] or offered
    return usable[0] if usable else _PIXEL_FORMATS[0]


def _pictures(frames: Tensor) -> Iterator["VideoFrame"]:
    """Yields each frame for the encoder, padded to even sides."""
    import av

    extra = (0, frames.shape[3] % 2, 0, frames.shape[2] % 2)
    for frame in frames.cpu():
        if any(extra):
            # Replicate padding has no byte kernel; 0 to 255 survives the trip exactly.
            frame = pad(frame[None].float(), extra, mode="replicate")[0].to(torch.uint8)
        pixels = frame.permute(1, 2, 0).contiguous().numpy()
        yield av.VideoFrame.from_ndarray(pixels, format="rgb24")
