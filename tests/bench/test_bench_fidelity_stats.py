"""Intervals of the fidelity bench, against brute force and known values."""

import math

import pytest
import torch

from tubelet.bench.fidelity.stats import (
    at_share,
    difference,
    gap_closed,
    over_seeds,
    score,
)


def draws(share: float, num: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(num, generator=generator) < share).float()


def test_the_score_interval_is_wilsons() -> None:
    found = score([torch.tensor([1.0] * 8 + [0.0] * 2)])
    assert found.value == pytest.approx(0.8)
    # Wilson's interval of 8 out of 10, from the textbook formula.
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)


def test_a_perfect_score_is_not_certain() -> None:
    found = score([torch.ones(64)])
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(0.943, abs=2e-3)


def test_the_paired_interval_covers_the_truth_and_is_narrower_than_the_unpaired() -> None:
    truth, inside, widths = 0.05, 0, []
    for seed in range(200):
        dense = draws(0.8, 300, seed)
        # The variant errs on the same clips and on a few of its own.
        lost = dense * (draws(truth / 0.8, 300, 1000 + seed))
        found = difference([dense - lost], [dense])
        inside += found.low <= -truth <= found.high
        widths.append(found.high - found.low)
    assert inside >= 182
    unpaired = 2 * 1.96 * math.sqrt(2 * 0.8 * 0.2 / 300)
    assert sum(widths) / len(widths) < 0.6 * unpaired


def test_equal_answers_are_not_a_certain_zero() -> None:
    scores = draws(0.5, 50, 0)
    found = difference([scores], [scores])
    assert found.value == 0
    assert found.low < -0.02
    assert not found.significant


def test_several_tasks_average_with_independent_errors() -> None:
    one = difference([draws(0.5, 400, 0)], [draws(0.7, 400, 1)])
    four = difference([draws(0.5, 400, i) for i in range(4)], [draws(0.7, 400, 9)] * 4)
    assert four.error == pytest.approx(one.error / 2, rel=0.1)


def test_the_gap_closed_is_a_share_of_the_room() -> None:
    clips = torch.arange(1000)
    random, oracle = (clips < 400).float(), (clips < 800).float()
    found = gap_closed([(clips < 700).float()], [random], [oracle])
    assert found is not None
    assert found.value == pytest.approx(0.75)
    assert found.low < 0.75 < found.high
    assert gap_closed([oracle], [random], [oracle]).value == pytest.approx(1)
    assert gap_closed([random], [random], [oracle]).value == pytest.approx(0)


def test_the_interval_of_the_gap_covers_its_truth() -> None:
    inside = 0
    for seed in range(200):
        level = torch.rand(400, generator=torch.Generator().manual_seed(seed))
        noise = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(900 + seed))
        random, oracle = (level < 0.3).float(), (level < 0.9).float()
        found = gap_closed([(level + noise < 0.6).float()], [random], [oracle])
        assert found is not None
        inside += found.low <= 0.5 <= found.high
    assert inside >= 180


def test_no_room_between_random_and_oracle_gives_no_gap() -> None:
    random = draws(0.5, 200, 0)
    assert gap_closed([draws(0.6, 200, 1)], [random], [random]) is None
    assert gap_closed([random], [draws(0.9, 200, 2)], [draws(0.1, 200, 3)]) is None
    barely = random.clone()
    barely[(random == 0).nonzero()[:2]] = 1
    assert barely.mean() > random.mean()
    assert gap_closed([random], [random], [barely]) is None


def test_a_curve_is_read_between_its_points_and_not_beyond() -> None:
    curve = [(1.0, torch.tensor([1.0, 1.0])), (0.5, torch.tensor([1.0, 0.0]))]
    assert at_share(curve, 0.75).tolist() == [1.0, 0.5]
    assert at_share(curve, 0.5).tolist() == [1.0, 0.0]
    assert at_share(curve, 0.495).tolist() == [1.0, 0.0]
    assert at_share(curve, 0.4) is None
    assert at_share([], 0.5) is None


def test_three_seeds_have_students_interval() -> None:
    found = over_seeds([0.5, 0.6, 0.7])
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
