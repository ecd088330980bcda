"""Runs along time, against plain loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.ops.score import pixel_difference
from tubelet.ops.segment import cut_starts, run_heads, run_lengths, run_starts

SETTINGS = settings(deadline=None, max_examples=50, derandomize=True)
SEEDS = st.integers(0, 2**16)


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().flatten(2).amax(-1)


def slow_starts(values: list[float], threshold: float) -> list[bool]:
    starts, head = [True], values[0]
    for value in values[1:]:
        starts.append(abs(value - head) >= threshold)
        head = value if starts[-1] else head
    return starts


@SETTINGS
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 6), SEEDS)
def test_entries_are_compared_with_the_start_of_their_run(steps, places, threshold, seed):
    torch.manual_seed(seed)
    x = torch.randint(0, 6, (2, steps, places, 1)).float()
    starts = run_starts(x, distance, float(threshold))
    assert starts.shape == (2, steps, places)
    for b in range(2):
        for p in range(places):
            expected = slow_starts(x[b, :, p, 0].tolist(), threshold)
            assert starts[b, :, p].tolist() == expected
        assert torch.equal(run_starts(x[b : b + 1], distance, float(threshold))[0], starts[b])


def test_a_slow_fade_starts_new_runs():
    fade = torch.arange(10.0).reshape(1, 10, 1, 1)
    # Every step is below the threshold; only the sum of steps since the run began reaches it.
    assert run_starts(fade, distance, 3.0)[0, :, 0].nonzero().flatten().tolist() == [0, 3, 6, 9]


def test_thresholds_at_the_ends():
    x = torch.zeros(1, 4, 2, 3)
    assert run_starts(x, distance, 0.0).all()
    still = run_starts(x, distance, 1e-9)
    assert still[:, 0].all()
    assert not still[:, 1:].any()


def test_runs_of_whole_tubelets():
    clip = torch.zeros(1, 3, 2, 2, 5)
    clip[0, 1, 0, 1] = 1.0
    starts = run_starts(clip, pixel_difference, 0.5)
    # The change is in the last frame of step 1; step 2 returns to black and differs from step 1.
    assert starts[0, :, 1].tolist() == [True, False, False]
    assert starts[0, :, 0].tolist() == [True, True, False]


@SETTINGS
@given(st.integers(1, 8), st.integers(1, 3), st.floats(0, 1), SEEDS)
def test_heads_and_lengths_follow_the_starts(steps, places, share, seed):
    torch.manual_seed(seed)
    starts = torch.rand(2, steps, places) < share
    starts[:, 0] = True
    heads, lengths = run_heads(starts), run_lengths(starts)
    for b in range(2):
        for p in range(places):
            row = starts[b, :, p].tolist()
            expected = [max(s for s in range(f + 1) if row[s]) for f in range(steps)]
            assert heads[b, :, p].tolist() == expected
            assert lengths[b, :, p].tolist() == [expected.count(f) for f in range(steps)]
    assert torch.equal(lengths > 0, starts)
    assert bool((lengths.sum(1) == steps).all())


@SETTINGS
@given(st.lists(st.integers(0, 5), max_size=9), st.integers(1, 6), st.integers(0, 6))
def test_cuts_are_the_least_similar_transitions_and_all_below_the_threshold(values, least, bound):
    starts = cut_starts(torch.tensor(values, dtype=torch.float32), least, float(bound)).tolist()
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    wanted = set(order[: least - 1]) | {p for p, value in enumerate(values) if value < bound}
    assert starts == [True, *(place in wanted for place in range(len(values)))]
