"""Resizing and normalisation."""

import pytest
import torch

from tubelet.core.errors import ShapeError
from tubelet.video import normalise, resize


def random_frames(height: int, width: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("size", [(8, 8), (7, 21), (40, 30)])
def test_size_and_dtype(dtype, crop, size):
    frames = random_frames(20, 31).to(dtype)
    out = resize(frames, size, crop)
    assert out.shape == (2, 3, *size)
    assert out.dtype == dtype


def test_the_same_size_changes_nothing():
    frames = random_frames(9, 12)
    assert torch.equal(resize(frames, (9, 12)), frames)


def test_a_flat_picture_stays_flat():
    frames = torch.full((1, 3, 31, 17), 200, dtype=torch.uint8)
    assert bool((resize(frames, (8, 12)) == 200).all())


def test_center_crop_keeps_the_middle_and_none_keeps_everything():
    frames = torch.zeros(1, 3, 10, 30, dtype=torch.uint8)
    frames[..., :10], frames[..., 20:] = 255, 255
    assert int(resize(frames, (10, 10), "center").max()) == 0
    squashed = resize(frames, (10, 9), "none")[0, 0, 0].tolist()
    assert squashed[0] > 250
    assert squashed[4] < 5
    assert squashed[-1] > 250


def test_crop_is_the_same_as_cutting_by_hand_without_scaling():
    frames = random_frames(10, 15)
    assert torch.equal(resize(frames, (10, 9)), frames[..., 3:12])


def test_shrinking_is_antialiased():
    frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    frames[..., ::4] = 255
    out = resize(frames, (8, 8)).float()
    assert float((out[..., 1:-1] - 255 / 4).abs().max()) < 25


def test_shrinking_keeps_the_mean_brightness():
    frames = random_frames(64, 64)
    assert abs(float(resize(frames, (16, 16)).float().mean() - frames.float().mean())) < 1.5


@pytest.mark.parametrize(
    ("frames", "size", "crop"),
    [
        (torch.zeros(3, 8, 8), (4, 4), "center"),
        (torch.zeros(1, 4, 8, 8), (4, 4), "center"),
        (torch.zeros(0, 3, 8, 8), (4, 4), "center"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), (4, 4), "center"),
        (torch.zeros(1, 3, 8, 8), (0, 4), "center"),
        (torch.zeros(1, 3, 8, 8), (4.5, 4), "center"),
        (torch.zeros(1, 3, 8, 8), (4, 4, 4), "center"),
        (torch.zeros(1, 3, 8, 8), (4, 4), "left"),
    ],
)
def test_bad_requests_are_refused(frames, size, crop):
    with pytest.raises(ShapeError):
        resize(frames, size, crop)


def test_normalise_matches_the_formula():
    frames = random_frames(4, 5)
    out = normalise(frames)
    assert out.dtype == torch.float32
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = (frames[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(out[:, channel].double(), expected, atol=1e-5, rtol=0)


def test_normalise_takes_other_statistics():
    frames = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert bool((normalise(frames, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) == 1).all())


def test_normalise_refuses_floats_and_bad_statistics():
    frames = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="uint8"):
        normalise(frames.float())
    with pytest.raises(ShapeError, match="three values"):
        normalise(frames, std=(1.0, 0.0, 1.0))
