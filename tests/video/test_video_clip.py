"""The Clip record and the package surface."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tubelet.video
from tubelet.core.errors import ClipError, ShapeError
from tubelet.video import Clip


def make(**changes) -> Clip:
    parts = {
        "frames": torch.zeros(3, 3, 4, 6, dtype=torch.uint8),
        "times": torch.arange(3, dtype=torch.float64),
        "source": "test",
        "fps": 1.0,
    }
    return Clip(**(parts | changes))


def test_a_valid_clip_is_accepted_and_frozen():
    clip = make()
    assert clip.frames.shape == (3, 3, 4, 6)
    with pytest.raises(AttributeError):
        clip.fps = 2.0


def test_repeated_times_and_missing_fps_are_accepted():
    assert make(times=torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), fps=None).fps is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": torch.zeros(3, 3, 4, 6)}, "uint8"),
        ({"frames": [1, 2]}, "list"),
        ({"frames": torch.zeros(3, 4, 6, 3, dtype=torch.uint8)}, r"\[T, 3, H, W\]"),
        ({"frames": torch.zeros(3, 4, 6, dtype=torch.uint8)}, r"\[T, 3, H, W\]"),
        ({"times": torch.arange(3)}, "float64"),
        ({"times": [0.0, 1.0, 2.0]}, "list"),
        ({"times": torch.zeros(2, dtype=torch.float64)}, r"shape \[3\]"),
        ({"times": torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)}, "ascending"),
        ({"times": torch.tensor([0.0, 1.0, torch.inf], dtype=torch.float64)}, "finite"),
        ({"fps": 0.0}, "positive"),
        ({"fps": float("nan")}, "positive"),
    ],
)
def test_wrong_parts_are_refused(changes, words):
    with pytest.raises(ShapeError, match=words):
        make(**changes)


def test_empty_and_tiny_clips_are_refused():
    with pytest.raises(ClipError, match="no frame"):
        make(frames=torch.zeros(0, 3, 4, 6, dtype=torch.uint8), times=torch.zeros(0).double())
    with pytest.raises(ClipError, match="6x1 pixels"):
        make(frames=torch.zeros(3, 3, 1, 6, dtype=torch.uint8))


def test_the_package_exports_what_it_documents():
    names = "Clip probe read_clip sample_indices resize write_video render_sample_clip normalise"
    assert sorted(tubelet.video.__all__) == sorted(names.split())
    assert all(hasattr(tubelet.video, name) for name in tubelet.video.__all__)


def test_importing_the_package_does_not_import_av():
    code = "import sys, tubelet.video; sys.exit('av' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
