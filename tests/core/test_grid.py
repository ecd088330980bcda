"""TokenGrid: where each token sits."""

import itertools
import json

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
SIDES = st.integers(1, 4)
EXTRAS = st.integers(0, 3)
GRIDS = st.builds(TokenGrid, frames=SIDES, height=SIDES, width=SIDES, before=EXTRAS, after=EXTRAS)


@pytest.fixture
def untyped():
    """Users run without shape checking, and get the library's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@SETTINGS
@given(GRIDS)
def test_counts_coordinates_and_frames_follow_raster_order(grid):
    places = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    assert grid.per_frame == grid.height * grid.width
    assert grid.num_video == len(places)
    assert grid.num_tokens == grid.before + len(places) + grid.after
    assert grid.coordinates().tolist() == [list(place) for place in places]
    frames = [-1] * grid.before + [t for t, _, _ in places] + [-1] * grid.after
    assert grid.frame_index().tolist() == frames
    assert grid.protected().tolist() == [frame == -1 for frame in frames]
    assert grid.protected().dtype == torch.bool


@SETTINGS
@given(GRIDS)
def test_json_round_trip_is_exact(grid):
    assert TokenGrid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_text_names_the_box_and_the_extra_tokens():
    assert str(TokenGrid(frames=8, height=14, width=12)) == "8x14x12"
    assert str(TokenGrid(frames=8, height=14, width=12, before=1, after=2)) == "8x14x12 + 3"


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
@pytest.mark.parametrize("name", ["frames", "height", "width"])
def test_sides_below_one_or_not_integers_are_refused(untyped, name, value):
    sides = {"frames": 2, "height": 2, "width": 2} | {name: value}
    with pytest.raises(ShapeError, match=f"{name} must be an integer >= 1"):
        TokenGrid(**sides)


@pytest.mark.parametrize("name", ["before", "after"])
def test_negative_extra_tokens_are_refused(name):
    with pytest.raises(ShapeError, match=f"{name} must be an integer >= 0"):
        TokenGrid(frames=1, height=1, width=1, **{name: -1})
