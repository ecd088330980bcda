"""The procedural demo clip."""

import pytest
import torch

from tubelet.core.errors import ShapeError
from tubelet.video import render_sample_clip
from tubelet.video.sample import shot_length


@pytest.fixture(scope="module")
def clip():
    return render_sample_clip(frames=24, height=96, width=120, fps=12.0)


def changes(frames: torch.Tensor) -> torch.Tensor:
    return frames.float().diff(dim=0).abs().mean(dim=(1, 2, 3))


def test_shape_times_and_rate(clip):
    assert clip.frames.shape == (24, 3, 96, 120)
    assert clip.fps == 12.0
    assert torch.allclose(clip.times, torch.arange(24, dtype=torch.float64) / 12)


def test_defaults():
    clip = render_sample_clip()
    assert clip.frames.shape == (48, 3, 256, 320)
    assert clip.fps == 24.0


def test_the_seed_decides_every_pixel(clip):
    same = render_sample_clip(frames=24, height=96, width=120, fps=30.0)
    other = render_sample_clip(frames=24, height=96, width=120, seed=1)
    assert torch.equal(clip.frames, same.frames)
    assert not torch.equal(clip.frames, other.frames)


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    render_sample_clip(frames=1, height=32, width=32)
    assert torch.equal(torch.rand(4), expected)


def test_the_cut_is_the_largest_change(clip):
    delta = changes(clip.frames)
    cut = shot_length(24) - 1
    assert int(delta.argmax()) == cut
    others = torch.cat([delta[:cut], delta[cut + 1 :]])
    assert float(delta[cut]) > 3 * float(others.max())


def test_the_camera_pans_one_pixel_a_frame_and_then_stops(clip):
    sky = clip.frames[:, :, 2:12].float()
    pan = shot_length(24) // 2
    shifted = (sky[1:pan, ..., :-1] - sky[: pan - 1, ..., 1:]).abs().mean()
    unshifted = (sky[1:pan] - sky[: pan - 1]).abs().mean()
    still = sky[pan + 1 : shot_length(24)].diff(dim=0).abs().mean()
    assert float(shifted) < float(unshifted)
    assert float(still) < 2.5


def test_still_camera_leaves_sensor_noise_only(clip):
    wall = clip.frames[shot_length(24) :, :, 40:55, :15].float()
    sigma = float(wall.diff(dim=0).std()) / 2**0.5
    assert 1.2 < sigma < 1.9


def test_objects_move_in_both_shots(clip):
    for start, end in ((10, 15), (17, 23)):
        peak = (clip.frames[end].float() - clip.frames[start].float()).abs().amax(dim=0)
        assert float((peak > 40).float().mean()) > 0.01


def test_the_picture_has_contrast_and_is_not_clipped(clip):
    values = clip.frames.float()
    assert float(values.std()) > 35
    assert float(((values == 0) | (values == 255)).float().mean()) < 0.05


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (2, 33, 57), (3, 64, 200)])
def test_any_size_and_length(frames, height, width):
    clip = render_sample_clip(frames=frames, height=height, width=width)
    assert clip.frames.shape == (frames, 3, height, width)


@pytest.mark.parametrize(
    "change", [{"frames": 0}, {"height": 31}, {"width": 8}, {"fps": 0.0}, {"fps": float("nan")}]
)
def test_bad_requests_are_refused(change):
    with pytest.raises(ShapeError):
        render_sample_clip(**({"frames": 2, "height": 32, "width": 32} | change))
