"""Schedules: layer to value."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import RecipeError
from tubelet.core.schedule import Schedule

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
VALUES = st.floats(-100, 100)


@SETTINGS
@given(VALUES, st.floats(-1, 1), st.integers(1, 40))
def test_the_mean_of_linear_is_the_mean(mean, inflection, n):
    schedule = Schedule.linear(mean, inflection)
    values = [schedule.at(i, n) for i in range(n)]
    assert math.fsum(values) / n == pytest.approx(mean, abs=1e-9)


@SETTINGS
@given(st.floats(0.1, 100), st.floats(0.1, 1), st.integers(2, 40))
def test_inflection_says_which_end_gets_more(mean, inflection, n):
    late = [Schedule.linear(mean, inflection).at(i, n) for i in range(n)]
    early = [Schedule.linear(mean, -inflection).at(i, n) for i in range(n)]
    assert late == sorted(late)
    assert late[0] < late[-1]
    assert early == pytest.approx(late[::-1])
    assert late[0] == pytest.approx(mean * (1 - inflection))
    assert late[-1] == pytest.approx(mean * (1 + inflection))


@SETTINGS
@given(VALUES, st.integers(1, 40))
def test_constant_is_the_same_everywhere(value, n):
    assert {Schedule.constant(value).at(i, n) for i in range(n)} == {value}
    assert [Schedule.linear(value).at(i, n) for i in range(n)] == pytest.approx([value] * n)


@SETTINGS
@given(st.lists(VALUES, min_size=1, max_size=8), st.integers(1, 20))
def test_listed_values_are_taken_as_they_are_and_zero_after_the_end(values, n):
    schedule = Schedule.listed(values)
    assert [schedule.at(i, n) for i in range(n)] == (values + [0.0] * n)[:n]


@SETTINGS
@given(st.lists(VALUES, min_size=2, max_size=6), st.integers(2, 6))
def test_stretched_points_are_hit_at_even_depths(points, stride):
    n = (len(points) - 1) * stride + 1
    schedule = Schedule(tuple(points))
    assert [schedule.at(i * stride, n) for i in range(len(points))] == pytest.approx(
        points, abs=1e-9
    )


def test_values_between_points_are_interpolated():
    schedule = Schedule((0.0, 8.0, 4.0))
    assert [schedule.at(i, 9) for i in range(9)] == pytest.approx([0, 2, 4, 6, 8, 7, 6, 5, 4])


def test_one_layer_gets_the_mean_of_the_points():
    assert Schedule((1.0, 2.0, 6.0)).at(0, 1) == 3.0


@pytest.mark.parametrize("points", [(), (float("nan"),), (1.0, float("inf"))])
def test_points_that_are_missing_or_not_finite_are_refused(points):
    with pytest.raises(RecipeError, match="at least one finite value"):
        Schedule(points)


@pytest.mark.parametrize("inflection", [-1.1, 1.1, float("nan")])
def test_inflection_out_of_range_is_refused(inflection):
    with pytest.raises(RecipeError, match="inflection must lie in"):
        Schedule.linear(1.0, inflection)


@pytest.mark.parametrize(("i", "n"), [(-1, 3), (3, 3), (0, 0)])
def test_layers_that_do_not_exist_are_refused(i, n):
    with pytest.raises(IndexError, match=f"layer {i} of {n}"):
        Schedule.constant(1.0).at(i, n)
