"""Which frames are chosen, as a property of their times alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ClipError, ShapeError
from tubelet.video import sample_indices

GAPS = st.lists(st.integers(5, 2000), min_size=0, max_size=40)


def times_from(gaps: list[int], start: int = 0) -> torch.Tensor:
    stamps = torch.tensor([start, *gaps], dtype=torch.float64).cumsum(0)
    return stamps / 1000


@settings(max_examples=150, deadline=None)
@given(GAPS, st.integers(-3000, 3000), st.integers(1, 41), st.integers(5, 2000))
def test_spread_takes_the_frame_shown_at_each_slice_centre(gaps, start, count, stay):
    times = times_from(gaps, start)
    duration = float(times[-1] - times[0]) + stay / 1000
    if count > times.numel():
        with pytest.raises(ClipError, match="wanted"):
            sample_indices(times, count, duration=duration)
        return
    chosen = sample_indices(times, count, duration=duration)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (count,)
    assert bool((chosen.diff() >= 0).all())
    for number, index in enumerate(chosen.tolist()):
        target = float(times[0]) + (number + 0.5) * duration / count
        shown = [i for i, time in enumerate(times.tolist()) if time <= target + 1e-12]
        assert index == shown[-1] or abs(float(times[index + 1]) - target) < 1e-9


@settings(max_examples=150, deadline=None)
@given(GAPS, st.integers(1, 41), st.floats(0.2, 120))
def test_rate_takes_what_is_on_screen_or_says_that_the_clip_ends(gaps, count, rate):
    times = times_from(gaps)
    duration = float(times[-1]) + 0.5
    needed = (count - 1) / rate
    try:
        chosen = sample_indices(times, count, rate=rate, duration=duration)
    except ClipError:
        assert times.numel() < count or needed > duration - 2e-3
        return
    assert needed < duration
    assert times.numel() >= count
    for number, index in enumerate(chosen.tolist()):
        target = number / rate
        assert float(times[index]) <= target + 1.001e-3
        assert index + 1 == times.numel() or float(times[index + 1]) > target


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.floats(1, 240), st.booleans())
def test_steady_clip_gives_every_frame_once(count, fps, rounded):
    times = torch.arange(count, dtype=torch.float64) / fps
    if rounded:
        times = (times * 1000).round() / 1000
    duration = count / fps
    every = torch.arange(count)
    assert torch.equal(sample_indices(times, count, duration=duration), every)
    assert torch.equal(sample_indices(times, count, rate=fps, duration=duration), every)


def test_half_rate_takes_every_other_frame_from_the_first():
    times = torch.arange(20, dtype=torch.float64) / 10 + 7
    assert sample_indices(times, 5, rate=5).tolist() == [0, 2, 4, 6, 8]


def test_a_frozen_stretch_repeats_its_frame():
    times = torch.tensor([0.0, 0.1, 0.2, 0.3, 10.0], dtype=torch.float64)
    assert sample_indices(times, 4, duration=10.1).tolist() == [3, 3, 3, 3]


def test_errors_say_what_is_there_and_what_is_wanted():
    times = torch.arange(5, dtype=torch.float64) / 10
    with pytest.raises(ClipError, match="has 5 frames but 16 are wanted"):
        sample_indices(times, 16)
    with pytest.raises(ClipError, match="has 1 frame but 2 are wanted"):
        sample_indices(times[:1], 2)
    with pytest.raises(ClipError, match="higher rate or fewer frames"):
        sample_indices(times, 3, rate=4)


@pytest.mark.parametrize(
    ("times", "options"),
    [
        (torch.zeros(3, 1).double(), {}),
        (torch.zeros(0).double(), {}),
        (torch.zeros(3), {}),
        (torch.tensor([0.0, 2.0, 1.0]).double(), {}),
        (torch.tensor([0.0, float("nan")]).double(), {}),
        (torch.zeros(3).double(), {"rate": 0.0}),
        (torch.zeros(3).double(), {"rate": float("inf")}),
        (torch.arange(3).double(), {"duration": 1.0}),
        (torch.arange(3).double(), {"duration": float("nan")}),
    ],
)
def test_bad_requests_are_refused(times, options):
    with pytest.raises(ShapeError):
        sample_indices(times, 2, **options)
    with pytest.raises(ShapeError):
        sample_indices(torch.arange(3).double(), 0)
