"""Reading files that are no video, or no longer a whole one."""

import contextlib
import os
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from tubelet.core.errors import ClipError
from tubelet.video import probe, read_clip

# Not a video


def test_missing_folder_and_empty(tmp_path, refused):
    assert "no such file" in refused(tmp_path / "missing.mp4")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "empty (0 bytes)" in refused(tmp_path / "empty.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in refused(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4", "notes"])
def test_text_is_refused(tmp_path, name, refused):
    path = tmp_path / name
    path.write_text("this is not a video\n" * 200)
    refused(path, num_frames=1)
    with pytest.raises(ClipError, match=str(path)):
        probe(path)


def test_random_bytes_are_refused(tmp_path, refused):
    path = tmp_path / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(20000))
    refused(path)


def test_sound_alone_is_refused(tmp_path, refused):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16000))
    assert "only audio" in refused(path)
    with pytest.raises(ClipError, match="only audio"):
        probe(path)


def test_sound_in_a_video_container_is_refused(tmp_path, refused):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "only audio" in refused(path)


def test_the_cover_picture_of_a_song_is_no_video(tmp_path, refused):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for stream, frame in ((cover, picture), (sound, silence)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert "has no video" in refused(path, num_frames=1)


def test_an_unknown_codec_is_refused(tmp_path, encode_greys, refused):
    path = encode_greys(tmp_path / "a.mp4", 8)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert "codec is unknown" in refused(path, num_frames=4)
    with pytest.raises(ClipError, match="codec is unknown"):
        probe(path)


# Damaged


@pytest.fixture
def noisy_video(tmp_path) -> Path:
    """40 noisy frames, so that frames take most of the file, with the index up front."""
    generator = np.random.default_rng(0)
    path = tmp_path / "noisy.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(40):
            pixels = generator.integers(0, 256, (32, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_cut_before_the_index(tmp_path, encode_greys, refused):
    path = encode_greys(tmp_path / "a.mp4", 20)
    path.write_bytes(path.read_bytes()[:-200])
    assert "cut short" in refused(path, num_frames=4)
    with pytest.raises(ClipError, match="cut short"):
        probe(path)


def test_cut_after_the_index_with_too_little_left(noisy_video, refused):
    data = noisy_video.read_bytes()
    noisy_video.write_bytes(data[: len(data) // 2])
    message = refused(noisy_video, num_frames=30)
    assert "30 are wanted" in message
    assert "of the 40 frames" in message


def test_cut_after_the_index_with_enough_left_warns(noisy_video):
    data = noisy_video.read_bytes()
    noisy_video.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="damaged: only .* of the 40 frames"):
        clip = read_clip(noisy_video, num_frames=4)
    assert float(clip.times[-1]) < 3


def test_overwritten_middle_warns(noisy_video):
    data = noisy_video.read_bytes()
    middle = len(data) // 2
    noisy_video.write_bytes(data[:middle] + bytes(3000) + data[middle + 3000 :])
    with pytest.warns(UserWarning, match="damaged"):
        assert read_clip(noisy_video, num_frames=8).frames.shape[0] == 8


def test_no_frame_left_at_all(noisy_video, refused):
    data = noisy_video.read_bytes()
    start = data.index(b"mdat") + 4
    noisy_video.write_bytes(data[:start] + bytes(len(data) - start))
    assert "none of its video frames decode" in refused(noisy_video, num_frames=1)
    with pytest.raises(ClipError, match="none of its video frames decode"):
        probe(noisy_video)


def test_cut_matroska_warns(tmp_path, noisy_video):
    path = tmp_path / "cut.mkv"
    with av.open(str(noisy_video)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="of the 4.00 s it declares"):
        read_clip(path, num_frames=4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(12))
def test_random_damage_never_leaks_another_error(noisy_video, seed):
    generator = np.random.default_rng(seed)
    data = bytearray(noisy_video.read_bytes())
    for position in generator.integers(0, len(data) if seed % 2 else 1500, 40):
        data[position] = int(generator.integers(0, 256))
    noisy_video.write_bytes(bytes(data))
    with contextlib.suppress(ClipError):
        assert read_clip(noisy_video, num_frames=4, size=(8, 8)).frames.shape == (4, 3, 8, 8)
