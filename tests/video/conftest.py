"""Small videos written through PyAV, with the frame number as grey level."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tubelet.core.errors import ClipError
from tubelet.video import read_clip

GREY_STEP = 10


def _encode_greys(
    path: Path,
    count: int = 8,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    height: int = 32,
    width: int = 48,
    rate: int = 10,
    pts: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if pts is not None:
            # Times are given in milliseconds.
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            pixels = np.full((height, width, 3), number * GREY_STEP, np.uint8)
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is not None:
                picture.pts, picture.time_base = pts[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def encode_greys() -> Callable[..., Path]:
    """Writes ``count`` flat frames; frame ``n`` has grey level ``10 * n``."""
    return _encode_greys


@pytest.fixture
def frame_numbers() -> Callable[..., list[int]]:
    """Reads the numbers of flat grey frames back."""

    def read(frames) -> list[int]:
        means = frames.float().mean(dim=(1, 2, 3))
        return [round(float(mean) / GREY_STEP) for mean in means]

    return read


@pytest.fixture
def refused() -> Callable[..., str]:
    """Reads a file that must be refused in one line naming it, and returns that line."""

    def check(path: Path, **options) -> str:
        with pytest.raises(ClipError) as error:
            read_clip(path, **options)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith(str(path))
        return message

    return check
