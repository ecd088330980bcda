"""FlashAttention-4: what is asked of it, and what is refused, without a GPU.

A stand-in for the library computes what its lists say, with its blind spot: only the last entry
of a list is checked against the end of the keys, elsewhere missing keys count as zeros.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, causal, fa4, merge, reference
from tubelet.kernels.attention.call import Call


class Lists(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def flash_attn_func(q, k, v, *, softmax_scale, causal, pack_gqa, block_sparse_tensors, return_lse):
    assert return_lse
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    lists = block_sparse_tensors
    if lists is None:
        logits = q @ k.mT * softmax_scale
        if causal:
            places = torch.arange(q.shape[2])
            logits = logits.masked_fill(places > places[:, None], -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).half(), logits.logsumexp(-1).float()
    assert pack_gqa is False
    assert not causal
    assert int(lists.mask_block_cnt.sum()) == 0
    (bq, bk), keys = lists.block_size, k.shape[2]
    k, v = (F.pad(x, (0, 0, 0, -keys % bk)) for x in (k, v))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, (*q.shape[:2], -(-q.shape[2] // bq)))):
        mine = b % lists.full_block_cnt.shape[0], h % lists.full_block_cnt.shape[1], row
        listed = lists.full_block_idx[mine][: lists.full_block_cnt[mine]]
        if len(listed) == 0:
            continue
        places = (listed.long()[:, None] * bk + torch.arange(bk)).flatten()
        logits = q[b, h, row * bq : (row + 1) * bq] @ k[b, h, places].T * softmax_scale
        logits[:, -bk:] = logits[:, -bk:].masked_fill(places[-bk:] >= keys, -torch.inf)
        out[b, h, row * bq : (row + 1) * bq] = logits.softmax(-1) @ v[b, h, places]
        lse[b, h, row * bq : (row + 1) * bq] = logits.logsumexp(-1)
    return out.transpose(1, 2).half(), lse.float()


@pytest.fixture
def library(monkeypatch):
    """flash-attn-4 on a Hopper GPU, as far as `run` can tell."""
    jaxtyping.config.update("jaxtyping_disable", True)
    sparsity, interface = ModuleType("block_sparsity"), ModuleType("interface")
    sparsity.BlockSparseTensorsTorch, interface.flash_attn_func = Lists, flash_attn_func
    names = {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": ModuleType("cute")}
    names |= {"flash_attn.cute.block_sparsity": sparsity, "flash_attn.cute.interface": interface}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fa4, "_installed", lambda: True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("block", [(128, 128), (64, 64), (128, 32), (256, 256), (192, 128)])
@pytest.mark.parametrize("shared", [(2, 4), (1, 1)])
def test_lists_reach_the_library_with_the_tail_last_and_in_sizes_it_takes(library, block, shared):
    q = torch.randn(2, 4, 300, 64).half()
    k, v = torch.randn(2, 2, 2, 333, 64).half()
    kept = torch.rand(*shared, -(-300 // block[0]), -(-333 // block[1])) < 0.6
    kept[0, 0, 0] = False
    mask = BlockMask.from_dense(kept, block=block, num_queries=300, num_keys=333)
    # Lists run backwards, so a ragged block comes first.
    places = (mask.counts[..., None] - 1 - torch.arange(mask.grid[1])).clamp(min=0)
    mask = BlockMask(
        counts=mask.counts,
        indices=mask.indices.gather(3, places.long()),
        block=block,
        num_queries=300,
        num_keys=333,
    )
    out, lse = fa4.run(Call(q=q, k=k, v=v, scale=0.2, mask=mask))
    want, want_lse = attention(q, k, v, AttentionPlan(mask=mask), scale=0.2, impl="reference")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)


def test_dense_calls_carry_no_lists(library):
    q, k, v = torch.randn(3, 1, 2, 50, 64).half()
    out, lse = fa4.run(Call(q=q, k=k, v=v, scale=0.1))
    want, want_lse = attention(q, k, v, scale=0.1, impl="reference")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)


def test_dense_causal_calls_take_grouped_heads(library):
    q, k, v = torch.randn(1, 4, 50, 64).half(), *torch.randn(2, 1, 2, 50, 64).half()
    out, lse = fa4.run(Call(q=q, k=k, v=v, scale=0.1, causal=True))
    want, want_lse = attention(q, k, v, scale=0.1, causal=True, impl="reference")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ordered", [False, True])
def test_causal_lists_go_to_the_library_where_they_are_seen_whole(library, monkeypatch, ordered):
    q, k, v = torch.randn(1, 4, 600, 64).half(), *torch.randn(2, 1, 2, 600, 64).half()
    kept = torch.rand(1, 4, 5, 5) < 0.7
    mask = BlockMask.from_dense(kept, block=(128, 128), num_queries=600, num_keys=600)
    order = torch.stack([torch.cat([torch.arange(i, 600, 2) for i in (0, 1)])] * 2)
    added = []

    def add(call, lists, out, lse):
        # What the interpreter's cases show of the kernel, by two calls of the reference.
        slots = torch.arange(5)
        places = (slots + lists.whole[..., None]).clamp(max=4).long()
        part = replace(
            lists.mask,
            counts=lists.mask.counts - lists.whole,
            indices=lists.mask.indices.gather(3, places),
        )
        more = reference.run(replace(call, mask=part))
        merged, total = merge(out, lse, *more)
        out.copy_(merged)
        lse.copy_(total)
        added.append(int(part.counts.sum()))

    monkeypatch.setattr(fa4.triton_blocks, "causal_lists", causal.causal_lists)
    monkeypatch.setattr(fa4.triton_blocks, "add_partial", add)
    monkeypatch.setattr(fa4, "refuses", lambda call: None)
    plan = AttentionPlan(mask=mask, order=order if ordered else None)
    out, lse = attention(q, k, v, plan, causal=True, impl="fa4")
    want, want_lse = attention(q, k, v, plan, causal=True, impl="reference")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)
    assert 0 < added[0] < int(mask.counts.sum())


def call(width=64, dtype=torch.float16, block=(128, 128), **options):
    """A call as on a GPU: only what `refuses` looks at."""
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 2, 256, width))
    rows, columns = -(-256 // block[0]), -(-256 // block[1])
    mask = BlockMask.from_dense(
        torch.ones(1, 1, rows, columns, dtype=torch.bool),
        block=block,
        num_queries=256,
        num_keys=256,
    )
    fields = {"key_bias": None, "causal": False, "wants_gradient": False, "v": q, "mask": mask}
    return SimpleNamespace(q=q, **(fields | options))


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({}, (9, 0), None),
        ({"block": (256, 128)}, (9, 0), None),
        ({"block": (64, 64)}, (9, 0), None),
        ({"block": (256, 128)}, (10, 0), None),
        ({"mask": None}, (9, 0), None),
        ({}, (8, 0), "ignores block lists on sm_80"),
        ({}, (12, 0), "ignores block lists on sm_120"),
        ({"block": (64, 32)}, (9, 0), "cannot be split"),
        ({"block": (48, 128)}, (9, 0), "cannot be split"),
        ({"block": (128, 128)}, (10, 0), "cannot be split"),
        ({"dtype": torch.float32}, (9, 0), "not torch.float32"),
        ({"width": 40}, (9, 0), "width"),
        ({"key_bias": torch.zeros(1, 256)}, (9, 0), "no key bias"),
        ({"causal": True, "mask": None}, (9, 0), None),
        ({"causal": True}, (9, 0), None),
        ({"causal": True, "block": (192, 128)}, (9, 0), "no such size for Triton"),
        ({"wants_gradient": True}, (9, 0), "backward"),
    ],
)
def test_what_the_library_would_get_wrong_is_refused(
    library, monkeypatch, changes, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(
        fa4.triton_blocks,
        "refuses",
        lambda call: "no such size for Triton" if call.mask.block[0] == 192 else None,
    )
    given = fa4.refuses(call(**changes))
    assert (given is None) if reason is None else (reason in str(given))
