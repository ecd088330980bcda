"""Block scores, against loops over blocks and softmax rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.grid import TokenGrid
from tubelet.ops import block_score, rows
from tubelet.ops.block_mask import Blocks
from tubelet.ops.block_score import (
    antidiagonal_mass,
    block_mass,
    block_means,
    block_similarity,
    pooled_scores,
    sub_block_scores,
    tile_means,
)
from tubelet.ops.order import tile_index
from tubelet.ops.rows import mask_errors, sampled_rows

SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)


def cut(x, block):
    return x.split(block, dim=2)


@SETTINGS
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 7), st.booleans())
def test_block_means_and_similarity_are_those_of_real_ordered_tokens(num, block, behind, shuffled):
    x = torch.randn(2, 3, num + behind, 4)
    order = torch.randperm(num + behind)[None] if shuffled else None
    taken = x if order is None else x[:, :, order[0]]
    hidden = torch.arange(num + behind) if order is None else order[0]
    x[:, :, hidden[num:]] = torch.nan
    parts = cut(taken[:, :, :num], block)
    means = torch.stack([part.mean(2) for part in parts], dim=2)
    torch.testing.assert_close(block_means(x, block, order, num), means)
    units = [F.normalize(part, dim=-1) for part in parts]
    cosine = torch.stack([(u @ u.transpose(2, 3)).mean((2, 3)) for u in units], dim=2)
    torch.testing.assert_close(block_similarity(x, block, order, num), cosine, atol=1e-5, rtol=1e-5)


def test_block_means_of_half_precision_add_up_in_float32():
    x = torch.full((1, 1, 4096, 1), 1.0078125, dtype=torch.bfloat16)
    means = block_means(x, 4096, None, 4096)
    assert means.dtype == torch.float32
    assert means.item() == 1.0078125


@SETTINGS
@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 3))
def test_tile_means_are_those_of_the_tokens_in_each_tile(sides, tile, before):
    grid = TokenGrid(frames=sides[0], height=sides[1], width=sides[2], before=before, after=1)
    x = torch.randn(2, 1, grid.num_tokens, 3)
    index, video = tile_index(grid, tile), x[:, :, before : before + grid.num_video]
    tiles = range(int(index.max()) + 1)
    wanted = torch.stack([video[:, :, index == n].mean(2) for n in tiles], dim=2)
    torch.testing.assert_close(tile_means(x, grid, tile), wanted)


def test_pooled_scores_share_a_key_head_among_its_query_heads():
    q, k = torch.randn(1, 4, 3, 5), torch.randn(1, 2, 6, 5)
    found = pooled_scores(q, k, 0.5)
    for head in range(4):
        torch.testing.assert_close(found[:, head], q[:, head] @ k[:, head // 2].mT * 0.5)


@SETTINGS
@given(st.integers(1, 11), st.integers(1, 11), st.integers(1, 4), st.integers(1, 4))
def test_sub_block_scores_are_the_log_sum_exp_of_all_pairs(num_q, num_k, a, b):
    q, k = torch.randn(2, 4, num_q, 5), torch.randn(2, 2, num_k, 5)
    logits = q @ k.repeat_interleave(2, 1).mT * 0.7
    wanted = [
        [part.flatten(2).logsumexp(-1) for part in row.split(b, dim=3)]
        for row in logits.split(a, dim=2)
    ]
    wanted = torch.stack([torch.stack(row, -1) for row in wanted], dim=2)
    torch.testing.assert_close(sub_block_scores(q, k, 0.7, (a, b)), wanted)


@pytest.fixture(params=[1, 2**26], ids=["in parts", "whole"])
def workspace(request, monkeypatch):
    monkeypatch.setattr(block_score, "WORKSPACE", request.param)
    monkeypatch.setattr(rows, "WORKSPACE", request.param)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("counts", [(32, 48), (27, 41)])
def test_antidiagonal_mass_is_the_softmax_over_antidiagonal_sums(counts):
    stride, block = 4, (8, 16)
    q, k = torch.randn(2, 4, 50, 5), torch.randn(2, 2, 50, 5)
    q, k = (F.pad(x[:, :, :n], (0, 0, 0, -n % stride)) for x, n in zip((q, k), counts, strict=True))
    logits = q @ k.repeat_interleave(2, 1).mT
    squares = logits.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))
    # Of square (i, j) the entries (s, S - 1 - s).
    sums = squares.flip(3).diagonal(dim1=3, dim2=5).sum(-1)
    weights = (sums * 0.3 / stride).softmax(-1)
    blocks = [
        torch.stack([part.sum(-1).mean(2) for part in row.split(4, dim=3)], dim=-1)
        for row in weights.split(2, dim=2)
    ]
    found = antidiagonal_mass(q, k, 0.3, block, stride, counts)
    torch.testing.assert_close(found, torch.stack(blocks, dim=2))
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("counts", [(30, 30), (24, 20)])
def test_block_mass_is_the_softmax_summed_over_blocks(counts):
    q, k = torch.randn(2, 4, 40, 5), torch.randn(2, 2, 40, 5)
    k[:, :, 30:] = torch.nan
    weights = (q @ k.repeat_interleave(2, 1)[:, :, :30].mT * 0.4).softmax(-1)
    table = weights[:, :, : counts[0], : counts[1]]
    wanted = [
        torch.stack([part.sum((2, 3)) for part in row.split(5, dim=3)], dim=-1)
        for row in table.split(8, dim=2)
    ]
    found = block_mass(q, k, 0.4, (8, 5), counts, 30)
    torch.testing.assert_close(found, torch.stack(wanted, dim=2))
    if counts == (30, 30):
        sizes = torch.tensor([8.0, 8, 8, 6]).expand(2, 4, -1)
        torch.testing.assert_close(found.sum(-1), sizes)


@pytest.mark.usefixtures("workspace")
def test_mask_errors_are_those_of_attention_under_the_mask():
    blocks = Blocks(size=(8, 4), num_video=30, num_tokens=40, num_keys=34)
    q, (k, v) = torch.randn(2, 4, 40, 6), torch.randn(2, 2, 2, 40, 6)
    k[:, :, 34:], v[:, :, 34:] = torch.nan, torch.nan
    picked = torch.tensor([0, 7, 8, 29])
    tables = [torch.rand(*shape, 5, 9) < 0.5 for shape in ((1, 1), (2, 4), (2, 1))]
    for table in tables:
        table[..., 0] = True
    found = mask_errors(q, k, v, 0.4, picked, blocks, tables)
    keys, values = (x.repeat_interleave(2, 1)[:, :, :34] for x in (k, v))
    logits = q[:, :, picked] @ keys.mT * 0.4
    dense = logits.softmax(-1) @ values
    for table, error in zip(tables, found, strict=True):
        tokens = table[:, :, picked // 8][..., torch.arange(34) // 4]
        out = logits.masked_fill(~tokens, -torch.inf).softmax(-1) @ values
        wanted = (out - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
        torch.testing.assert_close(error, wanted, atol=1e-5, rtol=1e-4)


@SETTINGS
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 5))
def test_sampled_rows_come_one_from_each_stretch(num, wanted, seed):
    picked = sampled_rows(num, wanted, seed).tolist()
    if num <= wanted:
        assert picked == list(range(num))
        return
    assert [int((n + 0.5) / (num / wanted)) for n in picked] == pytest.approx(range(wanted), abs=1)
    assert picked == sorted(picked)
    assert picked[-1] < num


def test_sampled_rows_depend_on_the_seed():
    one, other = (sampled_rows(1000, 20, seed) for seed in (0, 1))
    assert not torch.equal(one, other)
