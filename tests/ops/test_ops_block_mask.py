"""Block geometry and static patterns, against loops over token pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError
from tubelet.ops.block_mask import (
    Blocks,
    any_per_tile,
    axis_window,
    box,
    frame_bands,
    spread,
    spread_keys,
    units_in_blocks,
)

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def geometries(draw, most=60):
    video = draw(st.integers(1, most))
    keys = video + draw(st.sampled_from([0, 0, 1, 9]))
    return Blocks(
        size=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        num_video=video,
        num_tokens=keys + draw(st.sampled_from([0, 0, 5])),
        num_keys=keys,
    )


def spans(num, size):
    return [range(start, min(start + size, num)) for start in range(0, num, size)]


def free(blocks):
    """Query and key blocks that hold video tokens only."""
    sides = zip((blocks.num_tokens, blocks.num_keys), blocks.size, strict=True)
    return [[s for s in spans(*side) if s[-1] < blocks.num_video] for side in sides]


@SETTINGS
@given(geometries())
def test_blocks_with_a_token_from_outside_the_video_are_exempt(blocks):
    rows, columns = free(blocks)
    assert (blocks.free_rows, blocks.free_columns) == (len(rows), len(columns))
    assert blocks.rows == len(spans(blocks.num_tokens, blocks.size[0]))
    assert blocks.columns == len(spans(blocks.num_keys, blocks.size[1]))
    assert blocks.free_queries == sum(map(len, rows))
    assert blocks.free_keys == sum(map(len, columns))
    own = [[bool(set(row) & set(column)) for column in columns] for row in rows]
    assert blocks.own().tolist() == own


@SETTINGS
@given(geometries())
def test_keep_exempt_keeps_exempt_rows_and_columns_and_no_other(blocks):
    nothing = torch.zeros(1, 1, blocks.free_rows, blocks.free_columns, dtype=torch.bool)
    table = blocks.keep_exempt(nothing)
    assert table.shape[2:] == (blocks.rows, blocks.columns)
    for row in range(blocks.rows):
        for column in range(blocks.columns):
            exempt = row >= blocks.free_rows or column >= blocks.free_columns
            assert bool(table[0, 0, row, column]) == exempt


@SETTINGS
@given(geometries(), st.data())
def test_lists_from_topk_are_the_best_free_blocks_and_all_exempt_ones(blocks, data):
    if min(blocks.free_rows, blocks.free_columns) == 0:
        return
    k = data.draw(st.integers(1, blocks.free_columns))
    score = torch.randn(2, 3, blocks.free_rows, blocks.free_columns)
    rank = score.argsort(dim=-1, descending=True).argsort(dim=-1)
    assert_same(blocks.lists_from_topk(score, k), blocks.mask(rank < k))
    counts = torch.randint(1, k + 1, (2, 3))
    fewer = blocks.mask(rank < counts[..., None, None])
    assert_same(blocks.lists_from_topk(score, k, counts), fewer)


def assert_same(found: BlockMask, wanted: BlockMask) -> None:
    assert torch.equal(found.counts, wanted.counts)
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_everything_leaves_out_padding_only():
    blocks = Blocks(size=(4, 4), num_video=9, num_tokens=20, num_keys=13)
    assert blocks.everything().density == 1
    assert blocks.everything().num_keys == 13


@pytest.mark.parametrize("keys", [4, 11])
def test_sizes_that_do_not_fit_are_refused(keys):
    with pytest.raises(ShapeError, match="do not fit"):
        Blocks(size=(4, 4), num_video=5, num_tokens=10, num_keys=keys)


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 14))
def test_axis_window_is_centred_and_clamped(num, window):
    kept = axis_window(num, window)
    width = min(window, num)
    for place in range(num):
        first = min(max(place - width // 2, 0), num - width)
        assert kept[place].nonzero().flatten().tolist() == list(range(first, first + width))


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 5))
def test_any_per_tile_asks_every_pair_of_positions(num, side):
    kept = torch.rand(num, num) < 0.1
    tiles = spans(num, side)
    wanted = [[bool(kept[list(a)][:, list(b)].any()) for b in tiles] for a in tiles]
    assert any_per_tile(kept, side).tolist() == wanted


def test_box_wants_all_three_axes():
    t, h, w = (torch.rand(n, n) < 0.6 for n in (2, 3, 4))
    found = box(t, h, w).reshape(2, 3, 4, 2, 3, 4)
    assert bool(found.any())
    for place in torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 2, 3, 4))).tolist():
        a, b, c, x, y, z = place
        assert bool(found[tuple(place)]) == bool(t[a, x] & h[b, y] & w[c, z])


@SETTINGS
@given(geometries(), st.integers(1, 6))
def test_a_block_pair_is_kept_when_any_pair_of_its_units_is(blocks, num_units):
    unit = torch.randint(0, num_units, (blocks.num_video,)).sort().values
    kept = torch.rand(num_units, num_units) < 0.2
    sides = [
        units_in_blocks(unit, num_units, size, num)
        for size, num in zip(blocks.size, (blocks.free_queries, blocks.free_keys), strict=True)
    ]
    found = spread_keys(spread(kept, sides[0]), sides[1])
    rows, columns = free(blocks)
    wanted = [[bool(kept[unit[list(r)]][:, unit[list(c)]].any()) for c in columns] for r in rows]
    assert found.tolist() == wanted


@SETTINGS
@given(geometries(), st.integers(1, 20), st.data())
def test_frame_bands_keep_blocks_with_a_token_pair_in_the_band(blocks, per_frame, data):
    frames = -(-blocks.num_video // per_frame)
    width = torch.tensor(data.draw(st.lists(st.integers(-1, 6), min_size=frames, max_size=frames)))

    def inside(i, j):
        apart = abs(i // per_frame - j // per_frame)
        return abs(i % per_frame - j % per_frame) <= int(width[apart])

    rows, columns = free(blocks)
    wanted = [[any(inside(i, j) for i in r for j in c) for c in columns] for r in rows]
    assert frame_bands(blocks, per_frame, width.float()).tolist() == wanted
