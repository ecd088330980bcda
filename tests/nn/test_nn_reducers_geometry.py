"""Where tokens and their pooled cells sit in the clip."""

import pytest
import torch

from tubelet.core.grid import TokenGrid
from tubelet.nn.reducers.base import CrossAttention
from tubelet.nn.reducers.geometry import Cells, cell_shape, coordinates, spread


@pytest.mark.parametrize(
    ("sides", "num", "wanted"),
    [
        ((8, 8, 8), 128, (8, 4, 4)),
        ((8, 8, 8), 64, (4, 4, 4)),
        ((8, 8, 8), 49, (3, 4, 4)),
        ((8, 8, 8), 512, (8, 8, 8)),
        ((8, 8, 8), 1, (1, 1, 1)),
        ((1, 4, 4), 5, (1, 2, 2)),
    ],
)
def test_cell_shape_is_nearly_the_budget_and_even(sides, num, wanted):
    assert cell_shape(sides, num) == wanted


@pytest.mark.parametrize("num", [1, 2, 7, 12, 24, 29, 59, 60])
def test_cells_cut_the_whole_grid_into_boxes(num):
    grid = TokenGrid(frames=3, height=4, width=5)
    x, place = torch.randn(1, 60, 8), torch.arange(60)[None]
    cells = Cells(grid, num, x)
    cells.assignment.check()
    assert 0.7 * num <= cells.num <= num
    # Each cell is a box: as many tokens as its extent holds; its anchor is its middle.
    where, index = coordinates(place, grid)[0], cells.assignment.index[0]
    for cell in range(cells.num):
        inside = where[index == cell]
        low, high = inside.amin(0), inside.amax(0)
        assert len(inside) == int((high - low + 1).prod()) == int(cells.assignment.size[0, cell])
        middle = where[cells.assignment.anchor[0, cell]]
        assert torch.equal(middle, ((low + high) / 2).floor())
        assert torch.equal(cells.centre[cell], middle)
    torch.testing.assert_close(cells.assignment.reduce(x)[0, 0], x[0, index == 0].mean(0))


def test_cross_attention_knows_how_far_apart_two_tokens_are():
    block, chance = CrossAttention(16, 2), torch.Generator().manual_seed(0)
    query, memory = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    here, there = torch.rand(3, 3, generator=chance), torch.rand(5, 3, generator=chance)
    near = block(query, here, memory, there)
    torch.testing.assert_close(block(query, here + 4, memory, there + 4), near)
    for moved in (block(query, here + 4, memory, there), block(query, here, memory, there + 4)):
        assert not torch.allclose(moved, near, atol=1e-4)


def test_spread_takes_evenly_spaced_rows_and_interpolates_beyond():
    table = torch.arange(8.0)[:, None]
    assert spread(table, 8).flatten().tolist() == list(range(8))
    assert spread(table, 4).flatten().tolist() == [1, 3, 5, 7]
    assert spread(table, 1).flatten().tolist() == [4]
    wide = spread(table, 16).flatten()
    assert bool((wide.diff()[1:-1] > 0).all()), "two slots would start as one"
