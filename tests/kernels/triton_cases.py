"""The Triton kernels against their references; run by test_attention_triton.py."""

from dataclasses import replace

import pytest
import torch

from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, causal, reference, triton_blocks, why_not
from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.order import for_heads


def mask_of(num, keys, block, batch=2, heads=4) -> BlockMask:
    kept = torch.rand(batch, heads, -(-num // block[0]), -(-keys // block[1])) < 0.5
    kept[0, 0, 0] = False
    mask = BlockMask.from_dense(kept, block=block, num_queries=num, num_keys=keys)
    live = torch.arange(mask.indices.shape[3]) < mask.counts[..., None]
    order = torch.where(live, torch.rand(mask.indices.shape), 2.0).argsort(-1)
    indices = mask.indices.gather(3, order).masked_fill(~live, 2**31 - 1)
    return BlockMask(
        counts=mask.counts, indices=indices, block=block, num_queries=num, num_keys=keys
    )


CASES = {
    "ragged": ({"num": 50, "keys": 41}, (32, 16), {}),
    "small key blocks": ({"num": 32, "keys": 48}, (16, 16), {}),
    "wide blocks over several tiles": ({"num": 40, "keys": 200}, (48, 96), {}),
    "shared lists": ({"num": 40, "keys": 40}, (16, 32), {"batch": 1, "heads": 1}),
    "one mask per head": ({"num": 40, "keys": 40}, (16, 32), {"batch": 1}),
    "width 40": ({"num": 33, "keys": 50, "width": 40}, (32, 32), {}),
    "narrow values": ({"num": 33, "keys": 50, "values": 8}, (32, 32), {}),
    "half": ({"num": 33, "keys": 50, "dtype": torch.float16}, (32, 32), {}),
}


def inputs(num, keys, width=16, values=None, dtype=torch.float32):
    # Interleaved heads, as hosts have them.
    q = torch.randn(2, num, 4, width).transpose(1, 2)
    k = torch.randn(2, keys, 2, width).transpose(1, 2)
    v = torch.randn(2, keys, 2, values or width).transpose(1, 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def compare(q, k, v, plan, **options) -> None:
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = attention(*wide, plan, impl="reference", **options)
    out, lse = attention(q, k, v, plan, impl="triton", **options)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    atol = 1e-5 if q.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=atol, rtol=1e-6)


@pytest.mark.parametrize(("sizes", "block", "shared"), CASES.values(), ids=CASES)
def test_lists_equal_the_reference(sizes, block, shared):
    q, k, v = inputs(**sizes)
    mask = mask_of(sizes["num"], sizes["keys"], block, **shared)
    compare(q, k, v, AttentionPlan(mask=mask, temperature=0.7))


def test_a_key_bias_with_excluded_keys_and_padding_behind_the_last_key():
    q, k, v = inputs(40, 50)
    bias = torch.randn(2, 50)
    bias[:, ::3] = -torch.inf
    bias[0, 16:32] = -torch.inf
    k[:, :, 43:], v[:, :, 43:] = torch.nan, torch.inf
    compare(q, k, v, AttentionPlan(mask=mask_of(40, 43, (16, 16))), key_bias=bias)


def test_left_out_blocks_count_by_their_means():
    q, k, v = inputs(40, 41)
    compare(q, k, v, AttentionPlan(mask=mask_of(40, 41, (16, 16)), approximate=True))


def test_poison_in_skipped_blocks_stays_there():
    q, k, v = inputs(40, 41)
    plan = AttentionPlan(mask=mask_of(40, 41, (16, 16)))
    clean, _ = attention(q, k, v, plan, impl="triton")
    k[:, :, 32:], v[:, :, 32:] = torch.nan, torch.inf
    out, _ = attention(q, k, v, plan, impl="triton")
    seen = plan.mask.token_mask()[..., 40]
    assert torch.equal(out[~seen], clean[~seen])
    assert not bool(out[seen].isfinite().any())


REFUSED = {
    "float64": ({"dtype": torch.float64}, (16, 16), "float16, bfloat16 and float32"),
    "bfloat16": ({"dtype": torch.bfloat16}, (16, 16), "computes bfloat16 wrongly"),
    "block": ({}, (16, 24), "multiples of 16"),
    "width": ({"width": 300}, (16, 16), "up to 256 wide"),
}


@pytest.mark.parametrize(("sizes", "block", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_cannot_take_is_refused(sizes, block, reason):
    q, k, v = inputs(32, 48, **sizes)
    plan = AttentionPlan(mask=mask_of(32, 48, block))
    assert reason in str(why_not("triton", q, k, v, plan))


CAUSAL = {
    "ragged": ({"num": 50, "keys": 50}, (32, 16), {}),
    "several tiles": ({"num": 200, "keys": 200}, (48, 96), {}),
    "shared lists": ({"num": 64, "keys": 64}, (16, 32), {"batch": 1, "heads": 1}),
    "half": ({"num": 49, "keys": 49, "dtype": torch.float16}, (32, 32), {}),
    "long lists": ({"num": 600, "keys": 600}, (128, 16), {"batch": 1}),
}


@pytest.fixture
def _short_chunks(monkeypatch):
    monkeypatch.setattr(triton_blocks, "LISTED", 16)


@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize(("sizes", "block", "shared"), CAUSAL.values(), ids=CAUSAL)
def test_causal_lists_equal_the_reference(sizes, block, shared, order):
    q, k, v = inputs(**sizes)
    mask = mask_of(sizes["num"], sizes["keys"], block, **shared)
    places = None
    if order is not None:
        places = torch.stack([torch.randperm(sizes["num"]) for _ in range(order)])
    compare(q, k, v, AttentionPlan(mask=mask, order=places), causal=True)


@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize(("sizes", "block", "shared"), CAUSAL.values(), ids=CAUSAL)
@pytest.mark.usefixtures("_short_chunks")
def test_causal_lists_are_those_of_plain_torch(sizes, block, shared, order):
    q, k, v = inputs(**sizes)
    num, mask = sizes["num"], mask_of(sizes["num"], sizes["keys"], block, **shared)
    places = None
    if order is not None:
        rows = torch.stack([torch.randperm(num) for _ in range(order)])
        places = for_heads(rows, 4).int()
    call = Call(q=q, k=k, v=v, scale=1.0, causal=True, mask=mask, places=places)
    found, want = triton_blocks.causal_lists(call), causal.causal_lists(call)
    assert torch.equal(found.mask.counts, want.mask.counts.expand_as(found.mask.counts))
    assert torch.equal(found.whole, want.whole)
    assert torch.equal(found.places, want.places)
    live = torch.arange(mask.grid[1]) < found.mask.counts[..., None]
    assert torch.equal(found.mask.indices * live, want.mask.indices * live)


@pytest.mark.parametrize("order", [None, 2])
@pytest.mark.parametrize(("sizes", "block", "shared"), CAUSAL.values(), ids=CAUSAL)
def test_blocks_seen_in_part_are_added_to_those_seen_whole(sizes, block, shared, order):
    q, k, v = inputs(**sizes)
    mask = mask_of(sizes["num"], sizes["keys"], block, **shared)
    places = None if order is None else torch.stack([torch.randperm(sizes["num"])] * 4).int()
    call = Call(q=q, k=k, v=v, scale=0.2, causal=True, mask=mask, places=places)
    lists = triton_blocks.causal_lists(call)
    whole = replace(call, causal=False, places=None, mask=replace(lists.mask, counts=lists.whole))
    out, lse = reference.run(whole)
    out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    triton_blocks.add_partial(call, lists, out, lse)
    wide = replace(call, q=q.double(), k=k.double(), v=v.double())
    want, want_lse = reference.run(wide)
    atol = 1e-5 if q.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-6)


def test_causal_lists_take_a_key_bias_and_padding():
    q, k, v = inputs(50, 50)
    bias = torch.randn(2, 50)
    bias[:, ::3] = -torch.inf
    k[:, :, 41:], v[:, :, 41:] = torch.nan, torch.inf
    compare(q, k, v, AttentionPlan(mask=mask_of(50, 41, (16, 16))), key_bias=bias, causal=True)


def test_what_is_later_is_not_read():
    q, k, v = inputs(64, 64)
    plan = AttentionPlan(mask=mask_of(64, 64, (16, 16)))
    clean, _ = attention(q, k, v, plan, impl="triton", causal=True)
    k[:, :, 32:], v[:, :, 32:] = torch.nan, torch.inf
    out, _ = attention(q, k, v, plan, impl="triton", causal=True)
    assert torch.equal(out[:, :, :32], clean[:, :, :32])


def test_gradients_are_refused():
    q, k, v = inputs(32, 32)
    plan = AttentionPlan(mask=mask_of(32, 32, (16, 16)))
    assert "backward" in str(why_not("triton", q.clone().requires_grad_(), k, v, plan))
