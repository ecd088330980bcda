"""Selections, against plain loops."""

import bisect
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.ops.select import (
    above_mass,
    budget,
    cdf_sample,
    kept_positions,
    stratified_top_k,
    top_k,
    top_p,
)

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
WEIGHTS = st.lists(st.integers(0, 6), min_size=1, max_size=12)


def places(row: torch.Tensor) -> set[int]:
    return set(row.nonzero().flatten().tolist())


def ranking(values: list[int]) -> list[int]:
    """Highest first, equal ones in index order."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@SETTINGS
@given(st.integers(1, 10), st.data())
def test_kept_positions_are_the_true_entries_in_order(num, data):
    kept = data.draw(st.integers(0, num))
    rows = [data.draw(st.permutations(range(num)))[:kept] for _ in range(2)]
    mask = torch.zeros(2, num, dtype=torch.bool)
    for row, chosen in enumerate(rows):
        mask[row, chosen] = True
    assert kept_positions(mask, kept).tolist() == [sorted(chosen) for chosen in rows]


@SETTINGS
@given(st.integers(1, 3000), st.integers(1, 1000), st.integers(0, 5))
def test_budget_rounds_the_exact_product_up(num, permille, least):
    exact = math.ceil(Fraction(num * permille, 1000))
    assert budget(num, permille / 1000, least) == min(num, max(exact, least))


def test_budget_forgives_rounding_and_keeps_at_least_one():
    assert 0.55 * 100 > 55
    assert budget(100, 0.55) == 55
    assert budget(10, 1.0) == 10
    assert budget(10, 1e-12) == 1
    assert budget(3, 0.5, least=5) == 3


@SETTINGS
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12), st.data())
def test_top_k_keeps_the_highest_and_among_equals_the_first(values, data):
    k = data.draw(st.integers(1, len(values)))
    kept = top_k(torch.tensor(values).float(), k)
    assert places(kept) == set(ranking(values)[:k])


@pytest.mark.parametrize("k", [0, -1, 4])
def test_top_k_refuses_other_counts(k):
    with pytest.raises(ShapeError, match=f"between 1 and 3 entries, got {k}"):
        top_k(torch.zeros(2, 3), k)


def slow_top_p(values: list[int], mass: float) -> set[int]:
    total = sum(values)
    if total == 0 or mass == 1:
        return set(range(len(values)))
    kept, reached = set(), 0
    for i in ranking(values):
        kept.add(i)
        reached += values[i]
        if Fraction(reached, total) >= Fraction(mass):
            return kept
    raise AssertionError


@SETTINGS
# No share of these small integers equals such a mass, so rounding cannot decide.
@given(WEIGHTS, st.sampled_from([0.001, 0.1234567, 0.31415, 0.55555, 0.87654, 0.99999, 1.0]))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(values, mass):
    assert places(top_p(torch.tensor(values).float(), mass)) == slow_top_p(values, mass)


@pytest.mark.parametrize("eighths", range(1, 9))
def test_top_p_stops_where_the_mass_is_reached_exactly(eighths):
    values = [2, 1, 0, 3, 1, 1]
    kept = top_p(torch.tensor(values).float(), eighths / 8)
    assert places(kept) == slow_top_p(values, eighths / 8)


@SETTINGS
@given(WEIGHTS, st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_mass_keeps_a_superset(values, a, b):
    score = torch.tensor(values).float()
    less, more = (places(top_p(score, mass)) for mass in sorted((a, b)))
    assert less <= more
    assert less


def test_top_p_degenerate_rows():
    score = torch.tensor([[0.0, 0, 0], [2, 2, 2], [0, 5, 0]])
    assert top_p(score, 0.3).tolist() == [[True] * 3, [True, False, False], [False, True, False]]
    assert top_p(score, 1.0).all()
    assert top_p(torch.tensor([0.5]), 1e-6).tolist() == [True]


def test_top_p_does_not_depend_on_the_scale():
    score = torch.rand(4, 20)
    for factor in (1e-30, 1e30):
        assert torch.equal(top_p(score * factor, 0.5), top_p(score, 0.5))


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.1, float("nan")])
def test_top_p_refuses_other_masses(mass):
    with pytest.raises(ShapeError, match="mass must lie in"):
        top_p(torch.ones(3), mass)


@SETTINGS
@given(WEIGHTS, st.sampled_from([0.001, 0.1234567, 0.31415, 0.55555, 0.87654, 0.99999, 1.0]))
def test_above_mass_is_top_p_with_equal_scores_together(values, mass):
    least = min(values[i] for i in slow_top_p(values, mass))
    kept = places(above_mass(torch.tensor(values).float(), mass))
    assert kept == {i for i, value in enumerate(values) if value >= least}


@pytest.mark.parametrize("mass", [0.0, 1.1])
def test_above_mass_refuses_other_masses(mass):
    with pytest.raises(ShapeError, match="mass must lie in"):
        above_mass(torch.ones(3), mass)


def slow_cdf_sample(values: list[int], samples: int) -> set[int]:
    """Exact arithmetic on rational numbers."""
    if sum(values) == 0:
        values = [1] * len(values)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    sums = [sum(values[i] for i in order[: n + 1]) for n in range(len(order))]
    if len(values) == 1 or sums[-1] == sums[0]:
        cdf = [Fraction(1)] * len(sums)
    else:
        cdf = [Fraction(s - sums[0], sums[-1] - sums[0]) for s in sums]
    start = min(c for c in cdf if c > 0)
    kept = set()
    for n in range(samples):
        level = start + (1 - start) * (Fraction(n, samples - 1) if samples > 1 else 1)
        above = bisect.bisect_left(cdf, level)
        below = max(above - 1, 0)
        closer = level - cdf[below] <= cdf[above] - level
        kept.add(order[below if closer else above])
    return kept


def has_a_tie(values: list[int], samples: int) -> bool:
    """Whether a level lies half-way between two CDF values, where rounding decides."""
    if sum(values) == 0:
        values = [1] * len(values)
    ascending = sorted(values)
    sums = [sum(ascending[: n + 1]) for n in range(len(values))]
    if samples == 1 or sums[-1] == sums[0]:
        return False
    cdf = [Fraction(s - sums[0], sums[-1] - sums[0]) for s in sums]
    start = min(c for c in cdf if c > 0)
    levels = [start + (1 - start) * Fraction(n, samples - 1) for n in range(samples)]
    middles = {(a + b) / 2 for a, b in itertools.pairwise(cdf)}
    return any(level in middles for level in levels)


@SETTINGS
@given(WEIGHTS, st.integers(1, 14))
def test_cdf_sample_equals_exact_inverse_transform_sampling(values, samples):
    kept = places(cdf_sample(torch.tensor(values).float(), samples))
    assert 1 <= len(kept) <= min(samples, len(values))
    if not has_a_tie(values, samples):
        assert kept == slow_cdf_sample(values, samples)


def test_cdf_sample_takes_the_lower_of_two_equally_near_tokens():
    # The CDF is 0, 1/2, 1 and the middle level 3/4 is as near to 1/2 as to 1.
    assert places(cdf_sample(torch.tensor([1.0, 1.0, 1.0]), 3)) == {1, 2}


def test_cdf_sample_degenerate_rows():
    assert cdf_sample(torch.tensor([7.0]), 5).tolist() == [True]
    assert cdf_sample(torch.tensor([0.0]), 1).tolist() == [True]
    assert places(cdf_sample(torch.tensor([1.0, 9.0, 2.0]), 1)) == {1}
    zeros, ones = torch.zeros(12), torch.ones(12)
    assert torch.equal(cdf_sample(zeros, 5), cdf_sample(ones, 5))
    assert places(cdf_sample(torch.tensor([0.0, 0.0, 3.0, 0.0]), 4)) == {2}


def test_cdf_sample_keeps_more_of_a_flat_row_than_of_a_peaked_one():
    flat, peaked = torch.ones(1, 64), torch.full((1, 64), 1e-3)
    peaked[0, 10] = 1.0
    kept = cdf_sample(torch.cat([flat, peaked]), 32).sum(1).tolist()
    assert kept[0] > 25
    assert kept[1] < 10
    assert bool(cdf_sample(peaked, 32)[0, 10])


@pytest.mark.parametrize("samples", [0, -3])
def test_cdf_sample_refuses_no_samples(samples):
    with pytest.raises(ShapeError, match="at least one sample"):
        cdf_sample(torch.ones(3), samples)


@SETTINGS
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**16))
def test_stratified_top_k_keeps_the_top_of_every_group(groups, size, percent, seed):
    torch.manual_seed(seed)
    group = torch.arange(groups).repeat(size)[torch.randperm(groups * size)]
    score = torch.randint(0, 4, (2, groups * size)).float()
    kept = stratified_top_k(score, group, groups, percent / 100)
    wanted = budget(size, percent / 100)
    for row in range(2):
        expected = set()
        for label in range(groups):
            members = (group == label).nonzero().flatten().tolist()
            members.sort(key=lambda i: (-score[row, i].item(), i))
            expected |= set(members[:wanted])
        assert places(kept[row]) == expected


def test_stratified_top_k_refuses_groups_that_do_not_divide():
    with pytest.raises(ShapeError, match="5 entries do not split into 2 equal groups"):
        stratified_top_k(torch.zeros(1, 5), torch.zeros(5, dtype=torch.int64), 2, 0.5)


SELECTIONS = {
    "top_k": lambda score: top_k(score, 4),
    "top_p": lambda score: top_p(score, 0.6),
    "above_mass": lambda score: above_mass(score, 0.6),
    "cdf_sample": lambda score: cdf_sample(score, 6),
    "stratified_top_k": lambda score: stratified_top_k(score, torch.arange(12) % 3, 3, 0.5),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_deterministic_and_rows_independent(name):
    select = SELECTIONS[name]
    score = torch.cat([torch.rand(3, 12), torch.randint(0, 3, (2, 12)).float()])
    kept = select(score)
    assert torch.equal(select(score), kept)
    for row in range(5):
        assert torch.equal(select(score[row : row + 1])[0], kept[row])


@pytest.mark.parametrize("name", ["top_k", "top_p", "above_mass", "cdf_sample"])
def test_selections_move_with_their_tokens(name):
    score, order = torch.rand(3, 12), torch.randperm(12)
    assert torch.equal(SELECTIONS[name](score[:, order]), SELECTIONS[name](score)[:, order])


@pytest.mark.parametrize("name", ["top_k", "top_p", "above_mass", "cdf_sample"])
def test_selections_accept_any_leading_axes(name):
    score = torch.rand(2, 3, 12)
    kept = SELECTIONS[name](score)
    assert torch.equal(kept.flatten(0, 1), SELECTIONS[name](score.flatten(0, 1)))
    assert torch.equal(kept[0, 0], SELECTIONS[name](score[0, 0]))
