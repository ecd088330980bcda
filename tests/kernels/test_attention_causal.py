"""Causal block lists on the CPU against a softmax over the expanded mask, in float64."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, choose, flex
from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.causal import causal_lists

IMPLS = ["reference", "cpu", "flex"]
SETTINGS = settings(deadline=None, max_examples=15, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _untyped():
    """FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def expected(q, k, v, allowed, key_bias=None):
    """Softmax over the allowed keys [B, H, N, M] that are not later, in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    logits = q.double() @ k.mT * q.shape[-1] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias.double()[:, None, None]
    logits = logits.masked_fill(~allowed.tril(), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None].nan_to_num(neginf=0.0)).exp()
    return weights @ v.nan_to_num(0.0), lse


def shuffled(mask: BlockMask) -> BlockMask:
    """Lists in random order, with numbers out of range past their ends."""
    live = torch.arange(mask.indices.shape[3]) < mask.counts[..., None]
    order = torch.where(live, torch.rand(mask.indices.shape), 2.0).argsort(-1)
    indices = mask.indices.gather(3, order).masked_fill(~live, -(2**31))
    longest = max(int(mask.counts.max()), 1)
    sizes = {"num_queries": mask.num_queries, "num_keys": mask.num_keys}
    return BlockMask(counts=mask.counts, indices=indices[..., :longest], block=mask.block, **sizes)


def table_of(plan: AttentionPlan, batch: int, heads: int, total: int) -> Tensor:
    """Token pairs [B, H, N, N] that the mask names, in the order of the sequence."""
    mask = plan.mask
    assert mask is not None
    tokens = torch.nn.functional.pad(mask.token_mask(), (0, total - mask.num_keys))
    tokens = tokens.expand(batch, heads, -1, -1)
    if plan.order is None:
        return tokens
    table = torch.empty_like(tokens)
    for head in range(heads):
        places = plan.order[head * len(plan.order) // heads]
        table[:, head, places[:, None], places] = tokens[:, head]
    return table


@st.composite
def calls(draw, ordered=(0, 1, 2)):
    """Prompts of ragged lengths, grouped heads, and orders: none, a shared one, one per group."""
    total = draw(st.integers(1, 130))
    block = (draw(st.sampled_from([1, 5, 16, 64])), draw(st.sampled_from([3, 16, 48, 64])))
    padding = draw(st.sampled_from([0, 0, min(7, total - 1)]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, shared, groups = draw(st.integers(1, 2)), draw(st.booleans()), 2
    keys = total - padding
    rows, columns = -(-total // block[0]), -(-keys // block[1])
    kept = torch.rand(1 if shared else batch, 1 if shared else 4, rows, columns) < 0.5
    mask = BlockMask.from_dense(kept, block=block, num_queries=total, num_keys=keys)
    orders = draw(st.sampled_from(ordered))
    order = torch.stack([torch.randperm(total) for _ in range(orders)]) if orders else None
    q = torch.randn(batch, 4, total, 8)
    k, v = torch.randn(2, batch, groups, total, 8)
    return q, k, v, AttentionPlan(mask=shuffled(mask), order=order)


def check(impl, case) -> None:
    q, k, v, plan = case
    out, lse = attention(q, k, v, plan, causal=True, impl=impl)
    want, want_lse = expected(q, k, v, table_of(plan, len(q), 4, q.shape[2]))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@SETTINGS
@given(calls())
def test_kernels_see_listed_blocks_up_to_the_diagonal_in_any_order(impl, case):
    check(impl, case)


# The uncompiled function takes half a second for each new shape.
@settings(SETTINGS, max_examples=4)
@given(calls())
def test_flex_sees_listed_blocks_up_to_the_diagonal_in_any_order(case):
    check("flex", case)


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_on_and_above_the_diagonal_leave_ordinary_causal_attention(impl):
    q, k, v = torch.randn(1, 4, 75, 8), *torch.randn(2, 1, 2, 75, 8)
    every = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask = BlockMask.from_dense(every, block=(16, 16), num_queries=75, num_keys=75)
    found = attention(q, k, v, AttentionPlan(mask=mask), causal=True, impl=impl)
    dense = attention(q, k, v, causal=True, impl="sdpa")
    for have, want in zip(found, dense, strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num", [1, 100, 128, 300])
@pytest.mark.parametrize("impl", ["reference", "flex", "sdpa"])
def test_calls_without_lists_see_nothing_later(impl, num):
    q, k, v = torch.randn(1, 4, num, 8), *torch.randn(2, 1, 2, num, 8)
    out, lse = attention(q, k, v, causal=True, impl=impl)
    want, want_lse = expected(q, k, v, torch.ones(1, 4, num, num, dtype=torch.bool))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


def test_the_triangle_of_flex_asks_about_its_diagonal_only():
    for num, asked in ((256, 2), (300, 2 + 3)):
        found = flex._triangle(num, torch.device("cpu"))
        blocks = -(-num // flex.DENSE)
        assert int(found.kv_num_blocks.sum()) == asked
        total = found.kv_num_blocks.sum() + found.full_kv_num_blocks.sum()
        assert int(total) == blocks * (blocks + 1) // 2
        assert torch.equal(found.to_dense()[0, 0].bool(), torch.ones(blocks, blocks).tril().bool())


@pytest.mark.parametrize("order", [None, torch.randperm(64)[None]])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_blocks_that_are_skipped_or_later_are_never_read(impl, order):
    q, k, v = torch.randn(1, 2, 64, 8), *torch.randn(2, 1, 2, 64, 8)
    kept = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()
    mask = BlockMask.from_dense(kept[None, None], block=(16, 16), num_queries=64, num_keys=64)
    plan = AttentionPlan(mask=mask, order=order)
    clean = attention(q, k, v, plan, causal=True, impl=impl)
    table = table_of(plan, 1, 2, 64).tril()
    places = torch.arange(64) if order is None else order[0]
    for block in range(4):
        bad_k, bad_v = k.clone(), v.clone()
        tokens = places[block * 16 : block * 16 + 16]
        bad_k[:, :, tokens] = bad_v[:, :, tokens] = torch.nan
        out, lse = attention(q, bad_k, bad_v, plan, causal=True, impl=impl)
        # Queries of a row that sees any of the block share its fate.
        inside = torch.zeros(64, dtype=torch.bool)
        for row in range(4):
            queries = places[row * 16 : row * 16 + 16]
            inside[queries] = bool(table[0, 0, queries][:, tokens].any())
        assert 0 < inside.sum() < 64 or order is not None
        assert torch.equal(out[:, :, ~inside], clean[0][:, :, ~inside])
        assert torch.equal(lse[:, :, ~inside], clean[1][:, :, ~inside])
        blind = table[0, 0][:, tokens].any(1)
        assert not bool(out[:, :, blind].isfinite().any())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_whose_blocks_are_all_later_is_empty(impl):
    q, k, v = torch.randn(3, 1, 1, 48, 8)
    kept = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 1]]).bool()[None, None]
    mask = BlockMask.from_dense(kept, block=(16, 16), num_queries=48, num_keys=48)
    out, lse = attention(q, k, v, AttentionPlan(mask=mask), causal=True, impl=impl)
    assert not bool(out[:, :, :32].any())
    assert bool(lse[:, :, :32].isneginf().all())
    assert bool(lse[:, :, 32:].isfinite().all())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_bias_follows_the_order_of_a_causal_call(impl):
    q, k, v = torch.randn(2, 4, 50, 8), *torch.randn(2, 2, 2, 50, 8)
    bias = torch.randn(2, 50)
    bias[:, ::4] = -torch.inf
    kept = torch.rand(2, 4, 7, 4) < 0.6
    mask = BlockMask.from_dense(kept, block=(8, 16), num_queries=50, num_keys=50)
    plan = AttentionPlan(mask=mask, order=torch.randperm(50)[None])
    out, lse = attention(q, k, v, plan, causal=True, key_bias=bias, impl=impl)
    want, want_lse = expected(q, k, v, table_of(plan, 2, 4, 50), bias)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_cpu_kernel_is_causal_in_every_precision(dtype):
    q, k, v = torch.randn(3, 1, 2, 200, 32).to(dtype)
    kept = (torch.rand(1, 2, 4, 4) < 0.5) | torch.eye(4, dtype=torch.bool)
    mask = BlockMask.from_dense(kept, block=(64, 64), num_queries=200, num_keys=200)
    plan = AttentionPlan(mask=mask)
    out, lse = attention(q, k, v, plan, causal=True, impl="cpu")
    rounded, _ = attention(q, k, v, plan, causal=True, impl="reference")
    want, want_lse = expected(q, k, v, mask.token_mask())
    budget = 2 * (rounded.double() - want).abs().max() + 8 * torch.finfo(dtype).eps
    assert (out.double() - want).abs().max() <= budget
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=0)


def test_an_order_without_a_mask_changes_nothing():
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    plan = AttentionPlan(order=torch.randperm(40)[None])
    found = attention(q, k, v, plan, causal=True)
    assert torch.equal(found[0], attention(q, k, v, causal=True)[0])


def lists(kept: list[list[int]], num: int, order: Tensor | None = None):
    table = torch.tensor(kept, dtype=torch.bool)[None, None]
    mask = BlockMask.from_dense(table, block=(16, 16), num_queries=num, num_keys=num)
    x = torch.zeros(1, 1, num, 8)
    places = None if order is None else order[None].to(torch.int32)
    call = Call(q=x, k=x, v=x, scale=1.0, causal=True, mask=mask, places=places)
    return causal_lists(call)


def test_blocks_seen_whole_come_first_and_later_ones_are_gone():
    found = lists([[1, 1, 0], [1, 1, 1], [0, 1, 1]], 48)
    assert found.mask.counts.tolist() == [[[1, 2, 2]]]
    assert found.whole.tolist() == [[[0, 1, 1]]]
    assert found.mask.indices[0, 0, 1, :2].tolist() == [0, 1]
    assert found.mask.indices[0, 0, 2, :2].tolist() == [1, 2]


def test_a_ragged_block_is_never_taken_for_a_whole_one():
    # The last row is a single query, which would see the ragged block whole.
    found = lists([[1, 0, 0], [1, 1, 0], [1, 1, 1]], 33)
    assert found.whole.tolist() == [[[0, 1, 2]]]
    assert found.mask.counts.tolist() == [[[1, 2, 3]]]


def test_reordered_blocks_are_compared_by_the_places_they_hold():
    # Even tokens first: blocks 0 and 2 hold places below 32, blocks 1 and 3 the rest.
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    found = lists([[1] * 4] * 4, 64, order)
    every = [True] * 4
    early = [True, False, True, False]
    assert found.mask.to_dense()[0, 0].tolist() == [early, every, early, every]
    assert found.whole.tolist() == [[[0, 2, 0, 2]]]


def test_orders_per_head_need_the_keys_of_each_head():
    q, k, v = torch.randn(1, 4, 32, 8), *torch.randn(2, 1, 2, 32, 8)
    for heads in (3, 4):
        order = torch.arange(32).expand(heads, -1)
        with pytest.raises((ShapeError, UnsupportedError), match="order"):
            attention(q, k, v, AttentionPlan(order=order), causal=True)


def test_auto_takes_the_kernel_for_causal_lists():
    q, k, v = torch.randn(3, 1, 1, 32, 8)
    mask = BlockMask.from_dense(
        torch.ones(1, 1, 2, 2, dtype=torch.bool), block=(16, 16), num_queries=32, num_keys=32
    )
    assert choose(q, k, v, AttentionPlan(mask=mask), causal=True) == "cpu"
