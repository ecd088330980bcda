"""BlockMask: lists, tables, tokens and FlexAttention agree on what is computed."""

import json
import pickle
import re
import warnings

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


@pytest.fixture
def untyped():
    """Own messages instead of shape checking; FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def build(kept: torch.Tensor, block: tuple[int, int], queries: int, keys: int) -> BlockMask:
    return BlockMask.from_dense(kept, block=block, num_queries=queries, num_keys=keys)


@st.composite
def tables(draw):
    block = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    queries, keys = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    rows, columns = -(-queries // block[0]), -(-keys // block[1])
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return torch.rand(batch, heads, rows, columns) < 0.5, block, queries, keys


@SETTINGS
@given(tables())
def test_a_dense_table_survives_the_lists(table):
    kept = table[0]
    mask = build(*table)
    assert torch.equal(mask.to_dense(), kept)
    assert mask.counts.dtype == mask.indices.dtype == torch.int32
    assert mask.grid == kept.shape[2:]
    for b, h, row in torch.cartesian_prod(*[torch.arange(n) for n in kept.shape[:3]]).tolist():
        listed = mask.indices[b, h, row, : mask.counts[b, h, row]].tolist()
        assert listed == kept[b, h, row].nonzero().flatten().tolist()


@SETTINGS
@given(tables())
def test_token_mask_and_density_count_single_tokens(table):
    kept, (bq, bk), queries, keys = table
    mask = build(*table)
    tokens = mask.token_mask()
    assert tokens.shape == (*kept.shape[:2], queries, keys)
    for i in range(queries):
        for j in range(keys):
            assert torch.equal(tokens[:, :, i, j], kept[:, :, i // bq, j // bk])
    assert mask.density == pytest.approx(tokens.double().mean().item(), abs=1e-12)


@SETTINGS
@given(tables(), st.integers(-(2**31), 2**31 - 1))
def test_entries_past_the_counts_are_ignored(table, garbage):
    mask = build(*table)
    stale = torch.arange(mask.indices.shape[3]) >= mask.counts[..., None]
    dirty = BlockMask(
        counts=mask.counts,
        indices=mask.indices.masked_fill(stale, garbage),
        block=mask.block,
        num_queries=mask.num_queries,
        num_keys=mask.num_keys,
    )
    assert torch.equal(dirty.to_dense(), table[0])
    assert dirty.density == mask.density
    assert torch.equal(dirty.token_mask(), mask.token_mask())


def shuffled(mask: BlockMask, stale: int) -> BlockMask:
    """The same lists in random order, with `stale` past their ends."""
    live = torch.arange(mask.indices.shape[3]) < mask.counts[..., None]
    order = torch.where(live, torch.rand(mask.indices.shape), 2.0).argsort(-1)
    indices = mask.indices.gather(3, order).masked_fill(~live, stale)
    sizes = {"num_queries": mask.num_queries, "num_keys": mask.num_keys}
    return BlockMask(counts=mask.counts, indices=indices, block=mask.block, **sizes)


@SETTINGS
@given(tables(), st.integers(1, 3), st.integers(1, 3), st.integers(-(2**31), 2**31 - 1))
def test_splitting_keeps_the_token_pairs(table, per_row, per_column, stale):
    kept, (bq, bk), queries, keys = table
    large = (bq * per_row, bk * per_column)
    rows, columns = -(-queries // large[0]), -(-keys // large[1])
    mask = shuffled(build(kept[..., :rows, :columns], large, queries, keys), stale)
    small = mask.split((bq, bk))
    assert small.block == (bq, bk)
    assert torch.equal(small.token_mask(), mask.token_mask())
    # Live entries are real blocks, each once.
    for b, h, row in torch.cartesian_prod(*map(torch.arange, small.counts.shape)).tolist():
        listed = small.indices[b, h, row, : small.counts[b, h, row]].tolist()
        assert len(set(listed)) == len(listed)
        assert all(0 <= j < small.grid[1] for j in listed)


@pytest.mark.parametrize("block", [(3, 4), (4, 3), (8, 4), (4, 0)])
def test_blocks_that_do_not_divide_cannot_be_split(untyped, block):
    mask = build(torch.ones(1, 1, 2, 3, dtype=torch.bool), (4, 4), 8, 12)
    with pytest.raises(ShapeError, match=re.escape(f"(4, 4) tokens cannot be split into {block}")):
        mask.split(block)


@SETTINGS
@given(tables(), st.integers(-(2**31), 2**31 - 1))
def test_a_ragged_tail_moves_to_the_end_of_its_lists(table, stale):
    mask = shuffled(build(*table), stale)
    moved = mask.tail_last()
    assert torch.equal(moved.to_dense(), table[0])
    assert torch.equal(moved.counts, mask.counts)
    if mask.num_keys % mask.block[1]:
        tail = mask.grid[1] - 1
        for b, h, row in torch.cartesian_prod(*map(torch.arange, mask.counts.shape)).tolist():
            listed = moved.indices[b, h, row, : moved.counts[b, h, row]].tolist()
            assert tail not in listed[:-1]


def test_order_and_length_of_a_list_do_not_matter():
    mask = BlockMask(
        counts=torch.tensor([[[2, 0]]], dtype=torch.int32),
        indices=torch.tensor([[[[2, 0], [1, 1]]]], dtype=torch.int32),
        block=(4, 4),
        num_queries=7,
        num_keys=12,
    )
    assert mask.to_dense().tolist() == [[[[True, False, True], [False, False, False]]]]


def test_ragged_tails_weigh_less():
    corner = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    corner[..., 1, 1] = True
    assert build(corner, (4, 4), 5, 6).density == pytest.approx(1 * 2 / 30)
    assert build(~corner, (4, 4), 5, 6).density == pytest.approx(28 / 30)
    assert build(corner, (4, 4), 8, 8).density == 0.25


def softmax_attention(q, k, v, mask):
    logits = (q @ k.transpose(-1, -2)).double() * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask.token_mask(), -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ v.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("shared", [(2, 3), (1, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize(("block", "stale"), [((4, 4), False), ((5, 3), True)])
def test_flex_attention_computes_the_same_pairs(untyped, shared, block, stale):
    queries, keys = 21, 13
    kept = torch.rand(*shared, -(-queries // block[0]), -(-keys // block[1])) < 0.5
    kept[..., 0, :] = False
    mask = build(kept, block, queries, keys)
    if stale:
        past = torch.arange(mask.indices.shape[3]) >= mask.counts[..., None]
        mask.indices.masked_fill_(past, 2**30)
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, aux = flex_attention(
            q, k, v, block_mask=mask.to_flex(), return_aux=AuxRequest(lse=True)
        )
    expected, lse = softmax_attention(q, k, v, mask)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(aux.lse.double(), lse, atol=2e-6, rtol=0)
    first = min(block[0], queries)
    assert bool((out[:, :, :first] == 0).all())
    assert bool((aux.lse[:, :, :first] == -torch.inf).all())


def test_flex_mask_has_the_same_geometry(untyped):
    mask = build(torch.rand(2, 3, 2, 4) < 0.5, (128, 64), 200, 250)
    flex = mask.to_flex()
    assert flex.BLOCK_SIZE == (128, 64)
    assert flex.seq_lengths == (200, 250)
    assert torch.equal(flex.kv_num_blocks + flex.full_kv_num_blocks, mask.counts)


def test_flex_asks_about_single_tokens_in_ragged_tails_only(untyped):
    everything = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    flex = build(everything, (4, 4), 12, 12).to_flex()
    assert flex.kv_num_blocks.tolist() == [[[0, 0, 0]]]
    assert flex.full_kv_num_blocks.tolist() == [[[3, 3, 3]]]
    flex = build(everything, (4, 4), 12, 10).to_flex()
    assert flex.kv_num_blocks.tolist() == [[[1, 1, 1]]]
    assert flex.kv_indices[0, 0, :, 0].tolist() == [2, 2, 2]
    flex = build(everything, (4, 4), 11, 12).to_flex()
    assert flex.kv_num_blocks.tolist() == [[[0, 0, 3]]]


@SETTINGS
@given(tables())
def test_json_round_trip_is_exact(table):
    mask = build(*table)
    again = BlockMask.from_dict(json.loads(json.dumps(mask.to_dict())))
    assert torch.equal(again.counts, mask.counts)
    assert torch.equal(again.indices, mask.indices)
    assert again.indices.dtype == torch.int32
    for name in ("block", "num_queries", "num_keys"):
        assert getattr(again, name) == getattr(mask, name)


def test_pickle_and_device_moves_keep_the_values():
    mask = build(torch.rand(1, 2, 3, 4) < 0.5, (4, 2), 10, 8)
    for again in (pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(again.to_dense(), mask.to_dense())
        assert (again.block, again.num_queries, again.num_keys) == ((4, 2), 10, 8)
    assert mask.to("meta").counts.device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": torch.zeros(1, 1, 2, dtype=torch.int64)}, "must be int32"),
        ({"indices": torch.zeros(1, 1, 2, 3, dtype=torch.int64)}, "must be int32"),
        ({"indices": torch.zeros(1, 2, 3, dtype=torch.int32)}, "needs counts"),
        ({"indices": torch.zeros(1, 1, 3, 3, dtype=torch.int32)}, "needs counts"),
        ({"num_queries": 9}, "9 x 12 tokens in blocks of (4, 4) are 3 x 3 blocks"),
        ({"num_queries": 4}, "are 1 x 3 blocks, but the lists have 2 rows"),
        ({"num_keys": 8}, "are 2 x 2 blocks, but the lists have 2 rows and 3 entries"),
        ({"block": (0, 4)}, "positive sizes"),
        ({"num_queries": 0}, "positive sizes"),
        ({"num_keys": -1}, "positive sizes"),
    ],
)
def test_wrong_sizes_are_refused(untyped, changes, message):
    good = {
        "counts": torch.zeros(1, 1, 2, dtype=torch.int32),
        "indices": torch.zeros(1, 1, 2, 3, dtype=torch.int32),
        "block": (4, 4),
        "num_queries": 8,
        "num_keys": 12,
    }
    BlockMask(**good)
    with pytest.raises(ShapeError, match=re.escape(message)):
        BlockMask(**(good | changes))
