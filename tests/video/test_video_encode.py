"""Writing videos and reading them back."""

import os
from fractions import Fraction

import av
import pytest
import torch

import tubelet.video.encode as encode
from tubelet.core.errors import ClipError, ShapeError, UnsupportedError
from tubelet.video import probe, read_clip, write_video


def colourful(count: int = 6, height: int = 48, width: int = 64) -> torch.Tensor:
    """Smooth colour ramps that move, which 4:2:0 keeps well."""
    column = torch.linspace(0, 1, width).expand(count, height, width)
    row = torch.linspace(0, 1, height)[:, None].expand(count, height, width)
    shift = torch.arange(count).view(-1, 1, 1) / 20
    planes = [40 + 150 * column + 200 * shift, 200 - 120 * row, 90 + 100 * column * row]
    return torch.stack([plane.expand(count, height, width) for plane in planes], 1).to(torch.uint8)


def can_encode(codec: str) -> bool:
    try:
        av.Codec(codec, "w")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("codec", "suffix", "name"),
    [
        ("libx264", ".mp4", "h264"),
        ("libvpx-vp9", ".webm", "vp9"),
        ("mpeg4", ".mp4", "mpeg4"),
        ("mjpeg", ".avi", "mjpeg"),
        ("ffv1", ".mkv", "ffv1"),
    ],
)
def test_roundtrip_keeps_frames_and_colours(tmp_path, codec, suffix, name):
    if not can_encode(codec):
        pytest.skip(f"this PyAV build has no {codec} encoder")
    path, frames = tmp_path / f"clip{suffix}", colourful()
    write_video(path, frames, 12.5, codec=codec, crf=10)
    info = probe(path)
    assert name in info.codec
    assert (info.width, info.height, info.rotation) == (64, 48, 0)
    clip = read_clip(path, num_frames=6)
    error = (clip.frames.float() - frames.float()).abs().mean(dim=(0, 2, 3))
    assert float(error.max()) < 4
    assert clip.times.tolist() == pytest.approx([i / 12.5 for i in range(6)], abs=2e-3)


def test_crf_trades_size_for_quality(tmp_path):
    frames = torch.randint(0, 256, (4, 3, 48, 64), dtype=torch.uint8)
    write_video(tmp_path / "fine.mp4", frames, 10, crf=5)
    write_video(tmp_path / "rough.mp4", frames, 10, crf=45)
    sizes = [(tmp_path / name).stat().st_size for name in ("fine.mp4", "rough.mp4")]
    assert sizes[0] > 2 * sizes[1]


def test_ntsc_rate_is_exact(tmp_path):
    write_video(tmp_path / "a.mp4", colourful(), 30000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_odd_sizes_are_padded_by_repeating_the_edge(tmp_path):
    frames = colourful(height=47, width=63)
    write_video(tmp_path / "a.mp4", frames, 10, crf=5)
    out = read_clip(tmp_path / "a.mp4", num_frames=6).frames.float()
    assert out.shape == (6, 3, 48, 64)
    assert float((out[:, :, :47, :63] - frames.float()).abs().mean()) < 4
    assert float((out[:, :, 47, :63] - frames[:, :, 46].float()).abs().mean()) < 6
    assert float((out[:, :, :47, 63] - frames[:, :, :, 62].float()).abs().mean()) < 6


def test_a_single_frame_can_be_written(tmp_path):
    write_video(tmp_path / "a.mp4", colourful(1), 10)
    assert read_clip(tmp_path / "a.mp4", num_frames=1).frames.shape == (1, 3, 48, 64)


def test_the_file_gets_ordinary_permissions(tmp_path):
    write_video(tmp_path / "a.mp4", colourful(), 10)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.mp4").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.avi"
    path.write_bytes(b"old")
    whole = encode._pictures

    def breaks_midway(frames):
        yield from whole(frames)
        assert len(os.listdir(tmp_path)) == 2
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(encode, "_pictures", breaks_midway)
    with pytest.raises(ClipError, match="No space left"):
        write_video(path, colourful(), 10, codec="mjpeg")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.avi"]


@pytest.mark.parametrize(
    ("frames", "fps"),
    [
        (torch.zeros(2, 3, 8, 8), 10),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 10),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1e-5),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), float("inf")),
    ],
)
def test_bad_frames_and_rates_are_refused(tmp_path, frames, fps):
    with pytest.raises(ShapeError):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert os.listdir(tmp_path) == []


def test_no_frames_are_refused(tmp_path):
    with pytest.raises(ClipError, match="no frame"):
        write_video(tmp_path / "a.mp4", torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 10)


def test_unwritable_places_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "missing" / "a.mp4"):
        with pytest.raises(ClipError, match="not a folder"):
            write_video(path, colourful(), 10)
    with pytest.raises(ClipError, match="is a folder"):
        write_video(tmp_path, colourful(), 10)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "nope"), ("a.mp4", "aac"), ("a.unknown", "libx264"), ("a.webm", "libx264")],
)
def test_unknown_codecs_and_containers_are_refused(tmp_path, name, codec):
    with pytest.raises(UnsupportedError, match=codec):
        write_video(tmp_path / name, colourful(), 10, codec=codec)
    assert os.listdir(tmp_path) == []
