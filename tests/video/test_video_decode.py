"""Reading: which frames come out of a file, and how they look."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tubelet.core.errors import ShapeError
from tubelet.video import probe, read_clip, resize

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


# What is chosen


@pytest.mark.parametrize(
    ("codec", "name", "pix_fmt"),
    [
        ("libx264", "a.mp4", "yuv420p"),
        ("libx264", "a.mkv", "yuv420p"),
        ("libvpx-vp9", "a.webm", "yuv420p"),
        ("mpeg4", "a.mp4", "yuv420p"),
        ("mpeg4", "a.avi", "yuv420p"),
        ("mjpeg", "a.avi", "yuvj420p"),
    ],
)
def test_every_frame_in_order(tmp_path, encode_greys, frame_numbers, codec, name, pix_fmt):
    path = encode_greys(tmp_path / name, 12, codec=codec, pix_fmt=pix_fmt)
    clip = read_clip(path, num_frames=12)
    assert frame_numbers(clip.frames) == list(range(12))
    assert clip.times.tolist() == pytest.approx([i / 10 for i in range(12)], abs=2e-3)
    assert clip.source == str(path)
    assert clip.fps == pytest.approx(10, abs=0.1)


def test_spread_and_rate(tmp_path, encode_greys, frame_numbers):
    path = encode_greys(tmp_path / "a.mp4", 20)
    assert frame_numbers(read_clip(path, num_frames=4).frames) == [2, 7, 12, 17]
    clip = read_clip(path, num_frames=4, rate=5)
    assert frame_numbers(clip.frames) == [0, 2, 4, 6]
    assert clip.fps == 5
    assert frame_numbers(read_clip(path, num_frames=5, rate=20).frames) == [0, 0, 1, 1, 2]
    assert frame_numbers(read_clip(path, num_frames=1).frames) == [10]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_is_sampled_by_time(tmp_path, encode_greys, frame_numbers, name):
    pts = [0, 40, 80, 120, 1000, 1040, 2000, 2900, 2950, 3000]
    path = encode_greys(tmp_path / name, 10, pts=pts)
    clip = read_clip(path, num_frames=4, rate=1)
    assert clip.times.tolist() == pytest.approx([0, 1, 2, 3], abs=2e-3)
    assert frame_numbers(clip.frames) == [0, 4, 6, 9]
    # Centres of three slices of about 3 s: 0.5, 1.5 and 2.5 s.
    assert frame_numbers(read_clip(path, num_frames=3).frames) == [3, 5, 6]


@pytest.mark.filterwarnings("error")
def test_times_start_where_the_file_starts(tmp_path, encode_greys, frame_numbers):
    pts = [5000 + 100 * i for i in range(8)]
    clip = read_clip(encode_greys(tmp_path / "a.mkv", 8, pts=pts), num_frames=4)
    assert clip.times.tolist() == pytest.approx([5.1, 5.3, 5.5, 5.7], abs=2e-3)
    assert frame_numbers(clip.frames) == [1, 3, 5, 7]


def test_missing_timestamps_fall_back_on_counting(tmp_path, encode_greys, frame_numbers):
    path = encode_greys(tmp_path / "raw.h264", 10)
    clip = read_clip(path, num_frames=5, rate=5)
    assert frame_numbers(clip.frames) == [0, 2, 4, 6, 8]
    assert clip.times.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_timestamps_that_run_backwards_are_counted(tmp_path, encode_greys, frame_numbers):
    part = encode_greys(tmp_path / "part.ts", 6, codec="mpeg2video").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(part + part)
    with pytest.warns(UserWarning, match="timestamps run backwards"):
        clip = read_clip(path, num_frames=12)
    assert frame_numbers(clip.frames) == [*range(6), *range(6)]


def test_only_chosen_frames_are_converted(tmp_path, encode_greys, monkeypatch):
    import tubelet.video.decode as decode

    path, calls, convert = encode_greys(tmp_path / "a.mp4", 20), [], decode._to_rgb
    monkeypatch.setattr(decode, "_to_rgb", lambda *args: calls.append(1) or convert(*args))
    read_clip(path, num_frames=4)
    assert len(calls) == 4


def test_rate_does_not_decode_the_rest_of_the_file(tmp_path, encode_greys, monkeypatch):
    import tubelet.video.decode as decode

    path, seen, whole = encode_greys(tmp_path / "a.mp4", 25), [], decode.decode_frames

    def counted(*args):
        for frame in whole(*args):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "decode_frames", counted)
    read_clip(path, num_frames=3, rate=10)
    assert len(seen) < 10


# Geometry


def test_size_and_crop_are_those_of_resize(tmp_path, encode_greys):
    path = encode_greys(tmp_path / "a.mp4", 4, height=32, width=64)
    whole = read_clip(path, num_frames=4).frames
    for crop in ("center", "none"):
        clip = read_clip(path, num_frames=4, size=(20, 24), crop=crop)
        assert torch.equal(clip.frames, resize(whole, (20, 24), crop))


def quadrants() -> np.ndarray:
    """A 32x64 picture with another grey level in each corner."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[:16, 32:], pixels[16:, :32], pixels[16:, 32:] = 40, 90, 150, 210
    return pixels


def write_turned(path: Path, degrees: float, hflip: bool, vflip: bool) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize(("hflip", "vflip"), [(False, False), (True, False), (False, True)])
def test_display_matrix_is_applied(tmp_path, degrees, hflip, vflip):
    path = write_turned(tmp_path / "a.mp4", degrees, hflip, vflip)
    # PyAV documents: counter-clockwise turn first, then the flips.
    expected = np.rot90(quadrants(), degrees // 90)
    expected = expected[:, ::-1] if hflip else expected
    expected = expected[::-1] if vflip else expected
    frames = read_clip(path, num_frames=3).frames
    assert frames.shape[2:] == expected.shape[:2]
    error = frames[0].permute(1, 2, 0).numpy().astype(int) - expected
    assert np.abs(error).mean() < 4
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    again = quadrants()[:, ::-1] if info.mirrored else quadrants()
    assert np.array_equal(np.rot90(again, info.rotation // 90), expected)


def test_phone_style_track_matrix(tmp_path, encode_greys):
    path = encode_greys(tmp_path / "a.mp4", 3, height=32, width=64)
    data = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    # Phones held upright store this matrix: show it turned clockwise by 90 degrees.
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    track = data.index(b"tkhd")
    path.write_bytes(data[:track] + data[track:].replace(upright, turned, 1))
    assert read_clip(path, num_frames=3).frames.shape == (3, 3, 64, 32)
    assert probe(path).rotation == 270


def test_a_slanted_display_matrix_is_refused(tmp_path, refused):
    path = write_turned(tmp_path / "a.mp4", 30, False, False)
    assert "turned by 30 degrees" in refused(path, num_frames=3)


def test_frames_that_change_size_need_a_size(tmp_path, encode_greys, refused):
    small = encode_greys(tmp_path / "s.h264", 3, height=32, width=32).read_bytes()
    large = encode_greys(tmp_path / "l.h264", 3, height=48, width=64).read_bytes()
    path = tmp_path / "both.h264"
    path.write_bytes(small + large)
    assert "pass size" in refused(path, num_frames=6)
    assert read_clip(path, num_frames=6, size=(16, 16)).frames.shape == (6, 3, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 8), (8, 1)])
def test_tiny_videos_are_refused(tmp_path, encode_greys, height, width, refused):
    path = encode_greys(
        tmp_path / "a.avi", 4, codec="png", pix_fmt="rgb24", height=height, width=width
    )
    assert f"{width}x{height} pixels" in refused(path, num_frames=2)


def test_two_by_two_is_enough(tmp_path, encode_greys):
    path = encode_greys(tmp_path / "a.mkv", 4, codec="ffv1", height=2, width=2)
    assert read_clip(path, num_frames=4).frames.shape == (4, 3, 2, 2)


# Too little


def test_fewer_frames_than_wanted(tmp_path, encode_greys, refused):
    message = refused(encode_greys(tmp_path / "a.mp4", 5), num_frames=16)
    assert "5 frames but 16 are wanted" in message
    assert "1 frame but 2" in refused(encode_greys(tmp_path / "b.mp4", 1), num_frames=2)
    assert "1 frame but 2" in refused(tmp_path / "b.mp4", num_frames=2, rate=30)


def test_a_single_frame_can_be_read_alone(tmp_path, encode_greys, frame_numbers):
    path = encode_greys(tmp_path / "a.mp4", 1)
    assert frame_numbers(read_clip(path, num_frames=1).frames) == [0]


def test_rate_past_the_end(tmp_path, encode_greys, refused):
    path = encode_greys(tmp_path / "a.mp4", 10)
    assert read_clip(path, num_frames=5, rate=5).frames.shape[0] == 5
    message = refused(path, num_frames=6, rate=5)
    assert "lasts 1.00 s" in message
    assert "higher rate" in message


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 0},
        {"num_frames": 2.5},
        {"rate": 0},
        {"rate": float("nan")},
        {"size": (0, 8)},
        {"size": (8, 8), "crop": "left"},
    ],
)
def test_bad_requests_are_refused_before_reading(options):
    with pytest.raises(ShapeError):
        read_clip("missing.mp4", **options)


# What the container says


def test_probe_reports_what_the_file_declares(tmp_path, encode_greys):
    info = probe(encode_greys(tmp_path / "a.mp4", 20, height=32, width=48))
    assert (info.width, info.height, info.frames, info.codec) == (48, 32, 20, "h264")
    assert info.duration == pytest.approx(2.0)
    assert info.fps == pytest.approx(10.0)
    assert (info.rotation, info.mirrored) == (0, False)
    webm = probe(encode_greys(tmp_path / "a.mkv", 20))
    assert webm.frames is None
    assert webm.duration == pytest.approx(2.0)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real clips next to the repository")
@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "bikes.mp4", "nasa.mp4"])
def test_real_clips(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    info = probe(path)
    clip = read_clip(path, num_frames=8, size=(64, 96))
    assert clip.frames.shape == (8, 3, 64, 96)
    gaps = clip.times.diff()
    assert float((gaps - info.duration / 8).abs().max()) < 2 / info.fps
    assert float(clip.frames.float().std()) > 15
    assert read_clip(path, num_frames=4, rate=2).times.tolist() == pytest.approx(
        [0, 0.5, 1, 1.5], abs=0.05
    )
