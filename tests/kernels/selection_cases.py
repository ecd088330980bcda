"""The selection kernels against plain torch; run by test_attention_triton.py."""

import os

import pytest
import torch

from tubelet.core.grid import TokenGrid
from tubelet.kernels.selection import TOOLS
from tubelet.kernels.triton_support import takes
from tubelet.ops.tools import PLAIN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch):
    """Falling back to plain torch would make the comparisons empty."""
    torch.manual_seed(0)
    assert takes(torch.zeros(1, device=DEVICE))
    for name in vars(type(PLAIN)):
        if not name.startswith("_"):
            monkeypatch.setattr(f"tubelet.kernels.selection.api.PlainTools.{name}", None)


PLAIN_TOOLS = {name: getattr(PLAIN, name) for name in vars(type(PLAIN)) if not name.startswith("_")}


def tokens(batch, heads, num, width, dtype=torch.float32):
    # Interleaved heads, as hosts have them.
    return torch.randn(batch, num, heads, width, device=DEVICE).transpose(1, 2).to(dtype)


BLOCKS = [(4, 3), (16, 41), (16, 300), (128, 300), (96, 300), (20, 50), (1, 7), (64, 256)]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("block", "num"), BLOCKS)
@pytest.mark.parametrize("name", ["means", "similarity"])
def test_block_statistics_in_any_order_without_the_padding(name, block, num, ordered):
    x = tokens(2, 3, num + 9, 20)
    order = torch.randperm(num + 9, device=DEVICE)[None] if ordered else None
    place = torch.arange(num + 9) if order is None else order[0]
    x[:, :, place[num:]] = torch.nan
    have = getattr(TOOLS, name)(x, block, order, num)
    torch.testing.assert_close(have, PLAIN_TOOLS[name](x, block, order, num), atol=2e-6, rtol=0)


@pytest.mark.parametrize("tile", [(2, 3, 4), (1, 1, 1), (9, 9, 9), (1, 5, 7)])
def test_means_of_tiles_and_what_is_left_of_them_at_the_edges(tile):
    grid = TokenGrid(frames=3, height=5, width=7, before=4, after=3)
    x = tokens(2, 3, grid.num_tokens, 20)
    x[:, :, :4], x[:, :, -3:] = torch.nan, torch.nan
    have, want = TOOLS.tile_means(x, grid, tile), PLAIN_TOOLS["tile_means"](x, grid, tile)
    torch.testing.assert_close(have, want, atol=2e-6, rtol=0)


def test_half_precision_is_added_up_in_float32():
    x = torch.full((1, 1, 4096, 16), 1.0078125, dtype=HALF, device=DEVICE)
    assert bool((TOOLS.means(x, 4096, None, 4096) == 1.0078125).all())


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("parts", [(4, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("sizes", [(23, 31), (150, 70)])
def test_sub_block_scores(sizes, parts, dtype):
    q, k = torch.randn(2, 4, sizes[0], 24).to(DEVICE, dtype), tokens(2, 2, sizes[1], 24, dtype)
    have = TOOLS.sub_block_scores(q, k, 0.7, parts)
    want = PLAIN_TOOLS["sub_block_scores"](q.float(), k.float(), 0.7, parts)
    torch.testing.assert_close(have, want, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("block", "counts", "num_keys"),
    [((16, 16), (50, 41), 41), ((32, 48), (64, 96), 113), ((128, 64), (200, 192), 200)],
)
def test_block_mass_over_all_keys_for_the_free_blocks(block, counts, num_keys, dtype):
    q, k = tokens(2, 4, 210, 24, dtype), tokens(2, 2, 210, 24, dtype)
    k[:, :, num_keys:], q[:, :, counts[0] :] = torch.nan, torch.nan
    arguments = (0.3, block, counts, num_keys)
    have = TOOLS.block_mass(q, k, *arguments)
    want = PLAIN_TOOLS["block_mass"](q.float(), k.float(), *arguments)
    atol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(have, want, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("block", "stride", "counts"),
    [((32, 32), 8, (100, 90)), ((16, 32), 4, (64, 96)), ((32, 16), 16, (70, 41))],
)
def test_antidiagonal_mass(block, stride, counts, dtype):
    q, k = tokens(2, 4, 110, 24, dtype), tokens(2, 2, 110, 24, dtype)
    arguments = (0.3, block, stride, counts)
    have = TOOLS.antidiagonal_mass(q, k, *arguments)
    want = PLAIN_TOOLS["antidiagonal_mass"](q.float(), k.float(), *arguments)
    atol = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(have, want, atol=atol, rtol=0)


@pytest.mark.parametrize("num", [1, 5, 16, 300, 5000])
def test_the_k_highest_with_their_equals(num):
    score = torch.randn(2, 3, num, device=DEVICE)
    score[0] = score[0].round()
    score[1, 0, 0] = -torch.inf
    score[1, 1] = torch.tensor([0.0, -0.0], device=DEVICE).repeat(num)[:num]
    for k in {1, max(1, num // 3), num}:
        assert torch.equal(TOOLS.at_least(score, k), PLAIN_TOOLS["at_least"](score, k))


@pytest.mark.parametrize("mass", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("num", [1, 16, 300, 5000])
def test_the_fewest_entries_that_reach_a_mass(num, mass):
    # Multiples of 1/8 add up exactly in any order.
    score = torch.randint(0, 40, (2, 3, num), device=DEVICE) / 8
    score[0, 0] = 0
    assert torch.equal(TOOLS.above_mass(score, mass), PLAIN_TOOLS["above_mass"](score, mass))


@pytest.mark.parametrize("columns", [1, 17, 300, 2500])
def test_lists_are_the_places_of_a_table(columns):
    kept = torch.rand(2, 3, 5, columns, device=DEVICE) < 0.3
    kept[0, 0, 0], kept[0, 0, 1] = False, True
    sizes = {"block": (4, 2), "num_queries": 18, "num_keys": 2 * columns}
    have, want = TOOLS.mask(kept, **sizes), PLAIN_TOOLS["mask"](kept, **sizes)
    assert torch.equal(have.counts, want.counts)
    live = torch.arange(columns, device=DEVICE) < have.counts[..., None]
    assert torch.equal(have.indices[live], want.indices[live])
    assert torch.equal(have.to_dense(), kept)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch", "num", "k"), [(1, 1, 1), (3, 13, 13), (2, 64, 9), (1, 700, 40)])
def test_greedy_choices_are_those_of_the_loop(batch, num, k, weighted):
    x = torch.randn(batch, num, 24, device=DEVICE)
    weight = torch.rand(batch, num, device=DEVICE) if weighted else None
    have = TOOLS.max_min(x, k, weight)
    assert torch.equal(have, PLAIN_TOOLS["max_min"](x, k, weight))
    assert have.sum(1).tolist() == [k] * batch


def test_greedy_choices_prefer_the_first_of_equals_and_take_weights_of_zero():
    x = torch.eye(6, device=DEVICE).repeat(3, 1)[None]
    assert TOOLS.max_min(x, 4)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    weight = torch.zeros(1, 18, device=DEVICE)
    weight[0, 7] = 1
    assert TOOLS.max_min(x, 3, weight)[0].nonzero()[:, 0].tolist() == [0, 1, 7]


def test_large_tables_of_distances_are_halved_and_choose_nearly_as_well(monkeypatch):
    monkeypatch.setattr("tubelet.kernels.selection.triton_selection.DISTANCES", 0)
    x = torch.randn(1, 200, 24, device=DEVICE)
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)

    def apart(chosen):
        picked = unit[chosen[0]]
        return float((1 - picked @ picked.T).fill_diagonal_(torch.inf).min())

    have, want = TOOLS.max_min(x, 30), PLAIN_TOOLS["max_min"](x, 30)
    assert apart(have) >= 0.998 * apart(want)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "num", "width"), [(3, 40, 24), (150, 333, 64), (200, 200, 128)])
def test_what_keys_receive_from_some_rows_of_causal_attention(rows, num, width, weighted, dtype):
    q = tokens(1, 4, rows, width, dtype)[0]
    k = tokens(1, 2, num, width, dtype)[0]
    places = torch.randperm(num, device=DEVICE)[:rows].sort().values
    weight = torch.rand(4, rows, device=DEVICE) if weighted else None
    # One row sees only the first key, and nobody a few at the end.
    places[0] = 0
    totals = TOOLS.row_totals(q, k, places, 0.3)
    near = {"atol": 1e-4 if dtype == torch.float32 else 1e-2, "rtol": 1e-3}
    wide = (q.float(), k.float(), places, 0.3)
    want = PLAIN_TOOLS["row_totals"](*wide)
    torch.testing.assert_close(totals, want, **near)
    have = TOOLS.received(q, k, places, 0.3, totals, weight)
    torch.testing.assert_close(have, PLAIN_TOOLS["received"](*wide, want, weight), **near)
    given = rows if weight is None else weight.sum(1)
    torch.testing.assert_close(have.sum(1), torch.ones(4, device=DEVICE) * given, **near)


def test_a_row_without_share_in_a_key_adds_nothing_however_large_their_product():
    q, k = torch.ones(1, 2, 16, device=DEVICE), torch.ones(1, 3, 16, device=DEVICE)
    k[0, 2] = 1e4
    places = torch.tensor([0, 1], device=DEVICE)
    totals = TOOLS.row_totals(q, k, places, 1.0)
    have = TOOLS.received(q, k, places, 1.0, totals, torch.zeros(1, 2, device=DEVICE) + 1)
    assert have.tolist() == [[1.5, 0.5, 0.0]]
