"""Selections that prompts need: exact shares, protected entries, greedy max-min."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.ops.select import apportion, guarded_top_k, max_min

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
QUOTAS = st.lists(st.integers(-20, 60).map(lambda n: n / 7), min_size=1, max_size=6)


@SETTINGS
@given(QUOTAS, st.integers(0, 2), st.integers(0, 6), st.data())
def test_apportion_adds_up_and_is_as_near_as_it_can_be(quota, least, extra, data):
    most = least + extra
    total = data.draw(st.integers(len(quota) * least, len(quota) * most))
    found = apportion(torch.tensor(quota), total, least=least, most=most).tolist()
    assert sum(found) == total
    assert all(least <= n <= most for n in found)

    def distance(counts):
        return sum((n - q) ** 2 for n, q in zip(counts, quota, strict=True))

    every = itertools.product(range(least, most + 1), repeat=len(quota))
    best = min(distance(counts) for counts in every if sum(counts) == total)
    assert distance(found) == pytest.approx(best, abs=1e-4)


@SETTINGS
@given(QUOTAS, st.data())
def test_apportion_heeds_the_bound_of_each_group(quota, data):
    most = [data.draw(st.integers(0, 4)) for _ in quota]
    total = data.draw(st.integers(0, sum(most)))
    found = apportion(torch.tensor(quota), total, least=0, most=torch.tensor(most)).tolist()
    assert sum(found) == total
    assert all(0 <= n <= cap for n, cap in zip(found, most, strict=True))

    def distance(counts):
        return sum((n - q) ** 2 for n, q in zip(counts, quota, strict=True))

    every = itertools.product(*(range(cap + 1) for cap in most))
    best = min(distance(counts) for counts in every if sum(counts) == total)
    assert distance(found) == pytest.approx(best, abs=1e-4)


def test_apportion_prefers_the_first_of_equal_remainders():
    assert apportion(torch.tensor([1.5, 1.5, 1.0]), 4, least=0, most=9).tolist() == [2, 1, 1]


def test_apportion_refuses_a_total_out_of_reach():
    with pytest.raises(ShapeError, match="cannot add up to 7"):
        apportion(torch.ones(3), 7, least=0, most=2)


def test_guarded_entries_always_stay():
    score, guarded = (
        torch.arange(6.0)[None],
        torch.tensor([[True, False, True, False, False, False]]),
    )
    assert guarded_top_k(score, 3, guarded).nonzero()[:, 1].tolist() == [0, 2, 5]


def test_fewer_than_the_guarded_entries_are_refused_with_the_ratio_that_would_do():
    guarded = torch.tensor([[True, True, True, False]])
    with pytest.raises(ShapeError, match=r"Name always keeps 3 of 4 .* keep_ratio to 0.75"):
        guarded_top_k(torch.zeros(1, 4), 2, guarded, "Name")


@SETTINGS
@given(st.integers(1, 12), st.integers(0, 99), st.data())
def test_max_min_takes_the_farthest_of_the_rest_each_time(num, seed, data):
    k = data.draw(st.integers(1, num))
    x = torch.randn(2, num, 5, generator=torch.Generator().manual_seed(seed))
    found = max_min(x, k, chunk=data.draw(st.integers(1, 12)))
    assert found.sum(1).tolist() == [k, k]
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    for row, chosen in zip(1 - unit @ unit.mT, found, strict=True):
        apart = row.clone().fill_diagonal_(torch.inf)
        first = int(apart.amin(1).argmax())
        picked = [first]
        while len(picked) < k:
            gaps = row[:, picked].amin(1)
            gaps[picked] = -1
            picked.append(int(gaps.argmax()))
        assert sorted(picked) == chosen.nonzero()[:, 0].tolist()


@SETTINGS
@given(st.integers(1, 10), st.integers(0, 99), st.data())
def test_max_min_weighs_the_distances_of_each_candidate(num, seed, data):
    k = data.draw(st.integers(1, num))
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(1, num, 5, generator=generator), torch.rand(1, num, generator=generator)
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    distance = 1 - unit @ unit.T
    apart = distance.clone().fill_diagonal_(torch.inf)
    picked = [int((apart.amin(1) * weight[0]).argmax())]
    while len(picked) < k:
        gaps = distance[:, picked].amin(1) * weight[0]
        gaps[picked] = -1
        picked.append(int(gaps.argmax()))
    assert max_min(x, k, weight=weight).nonzero()[:, 1].tolist() == sorted(picked)


def test_max_min_refuses_more_than_there_are():
    with pytest.raises(ShapeError, match="between 1 and 3"):
        max_min(torch.zeros(1, 3, 2), 4)
