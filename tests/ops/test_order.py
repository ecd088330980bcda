"""Token orders, against plain sorts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.ops.order import AXES, tile_counts, tile_index, tile_members, token_order

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
SIDE = st.integers(1, 7)
GRIDS = st.builds(
    TokenGrid,
    frames=SIDE,
    height=SIDE,
    width=SIDE,
    before=st.sampled_from([0, 1, 4]),
    after=st.sampled_from([0, 3]),
)
TILES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))


def places(grid):
    return list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))


def ordered(grid, key):
    """Sequence positions by a key of (t, h, w), then the tokens before, then those after."""
    coords = places(grid)
    video = sorted(range(len(coords)), key=lambda n: key(coords[n]))
    rest = [*range(grid.before), *range(grid.before + grid.num_video, grid.num_tokens)]
    return [n + grid.before for n in video] + rest


def found(grid, layout):
    order = token_order(grid, layout)
    return list(range(grid.num_tokens)) if order is None else order[0].tolist()


@SETTINGS
@given(GRIDS, st.sampled_from(AXES))
def test_axis_orders_sort_by_the_slowest_axis_first(grid, layout):
    axes = ["thw".index(axis) for axis in layout]
    assert found(grid, layout) == ordered(grid, lambda place: [place[a] for a in axes])


@SETTINGS
@given(GRIDS, TILES)
def test_tiles_are_contiguous_and_in_raster_order(grid, tile):
    def key(place):
        return [x // side for x, side in zip(place, tile, strict=True)], place

    assert found(grid, tile) == ordered(grid, key)


@SETTINGS
@given(GRIDS)
def test_hilbert_order_is_a_permutation_with_exempt_tokens_last(grid):
    order = found(grid, "hilbert")
    assert sorted(order) == list(range(grid.num_tokens))
    assert order[grid.num_video :] == ordered(grid, lambda place: place)[grid.num_video :]


@pytest.mark.parametrize("side", [2, 4, 8])
def test_neighbours_on_the_hilbert_curve_are_neighbours_in_space(side):
    grid = TokenGrid(frames=side, height=side, width=side)
    path = [places(grid)[n] for n in found(grid, "hilbert")]
    steps = [
        sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(path)
    ]
    assert set(steps) == {1}


def test_raster_order_moves_nothing_unless_something_is_in_front():
    assert token_order(TokenGrid(frames=2, height=3, width=4, after=2), "thw") is None
    order = token_order(TokenGrid(frames=1, height=1, width=2, before=1, after=1), "thw")
    assert order is not None
    assert order.tolist() == [[1, 2, 0, 3]]


@SETTINGS
@given(GRIDS, TILES)
def test_tile_members_are_the_tokens_of_each_tile(grid, tile):
    index, counts = tile_index(grid, tile).tolist(), tile_counts(grid, tile)
    members, taken = tile_members(grid, tile)
    assert members.shape == (math.prod(counts), math.prod(tile))
    for number in range(len(members)):
        held = members[number][taken[number]].tolist()
        assert held == [n for n, tile_of in enumerate(index) if tile_of == number]
    at = [[x // s for x, s in zip(p, tile, strict=True)] for p in places(grid)]
    assert index == [(t * counts[1] + h) * counts[2] + w for t, h, w in at]


def test_an_order_built_in_inference_mode_serves_training():
    grid = TokenGrid(frames=2, height=3, width=5, before=7)
    with torch.inference_mode():
        order = token_order(grid, "hwt")
    assert order is not None
    assert not order.is_inference()
    x = torch.randn(37, requires_grad=True)
    x.index_select(0, order[0]).square().sum().backward()


def test_unknown_layouts_and_empty_tiles_are_refused():
    grid = TokenGrid(frames=2, height=2, width=2)
    with pytest.raises(ShapeError, match="unknown layout 'zigzag'"):
        token_order(grid, "zigzag")
    with pytest.raises(ShapeError, match="at least 1 token per axis"):
        tile_counts(grid, (0, 1, 1))
