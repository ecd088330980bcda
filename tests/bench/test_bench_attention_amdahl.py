"""The cost model against published tables and against plain sums of seconds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tubelet.bench.amdahl import TimeSplit, flop_share, speedup
from tubelet.core.errors import TubeletError

TABLE = {
    "wan2.1-1.3b 480p": (32_760, 1536, 30, 1.42e9, 0.70),
    "wan2.1-14b 480p": (32_760, 5120, 40, 14.3e9, 0.49),
    "wan2.1-14b 720p": (75_600, 5120, 40, 14.3e9, 0.69),
    "hunyuanvideo": (119_056, 3072, 60, 12.8e9, 0.77),
    "cogvideox1.5-5b": (45_106, 3072, 42, 5.57e9, 0.68),
    "ltx": (6_144, 2048, 28, 1.92e9, 0.27),
}
"""Tokens, channels, layers, parameters, and the share that others state."""


@pytest.mark.parametrize("name", TABLE)
def test_share_of_operations_is_as_published(name):
    tokens, width, layers, parameters, share = TABLE[name]
    # Weights that meet only the text count too much here, most of all in the smallest model.
    assert flop_share(tokens, width, layers, round(parameters)) == pytest.approx(share, abs=0.021)


@pytest.mark.parametrize(
    ("share", "good", "poor"),
    [(0.69, 1.57, 1.28), (0.49, 1.35, 1.18), (0.77, 1.68, 1.32), (0.27, 1.17, 1.09)],
)
def test_speedup_is_what_papers_and_users_report(share, good, poor):
    papers = speedup(share, 0.25, efficiency=0.8, selection=0.03, dense_calls=0.2)
    users = speedup(share, 0.25, efficiency=0.45, selection=0.05, dense_calls=0.2)
    assert papers == pytest.approx(good, abs=0.006)
    assert users == pytest.approx(poor, abs=0.006)


times = st.floats(0.01, 10)


@given(times, times, times, st.floats(0, 1), st.floats(0.01, 1), st.integers(1, 60), st.data())
def test_pieces_add_up_to_seconds(rest, call, sparse, selection, density, layers, data):
    dense_layers = data.draw(st.integers(0, layers))
    split = TimeSplit(
        rest=rest,
        dense=layers * call,
        call_dense=call,
        call_selection=selection,
        call_attention=sparse,
        density=density,
        dense_calls=dense_layers / layers,
    )
    with_recipe = rest + dense_layers * call + (layers - dense_layers) * (selection + sparse)
    assert split.speedup == pytest.approx((rest + layers * call) / with_recipe)
    assert split.limit == pytest.approx((rest + layers * call) / (rest + dense_layers * call))
    assert split.to_dict()["speedup"] == split.speedup


def test_the_ends_of_the_formula():
    assert speedup(0.0, 0.1) == 1.0
    assert speedup(1.0, 0.25) == 4.0
    assert speedup(1.0, 0.25, dense_calls=1.0) == 1.0
    assert speedup(1.0, 0.0) == float("inf")
    assert speedup(0.5, 1.0, selection=0.2) < 1


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"share": 1.1}, "share"),
        ({"density": -0.1}, "density"),
        ({"dense_calls": 2.0}, "dense_calls"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"selection": -1.0}, "selection"),
    ],
)
def test_numbers_out_of_range_are_named(numbers, named):
    with pytest.raises(TubeletError, match=named):
        speedup(**{"share": 0.5, "density": 0.5, **numbers})
