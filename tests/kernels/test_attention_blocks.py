"""Every kernel with block lists on the CPU against a softmax over the expanded mask, in float64."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, cpu

IMPLS = ["reference", "cpu", "flex"]
SETTINGS = settings(deadline=None, max_examples=12, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _untyped():
    """FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def expected(q, k, v, allowed, key_bias=None):
    """Softmax over the allowed keys [B, H, N, M], in float64; skipped keys are never touched."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    logits = q.double() @ k.mT * q.shape[-1] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias.double()[:, None, None]
    logits = logits.masked_fill(~allowed, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None].nan_to_num(neginf=0.0)).exp()
    return weights @ v.nan_to_num(0.0), lse


def shuffled(mask: BlockMask) -> BlockMask:
    """Lists in random order, with numbers out of range past their ends."""
    live = torch.arange(mask.indices.shape[3]) < mask.counts[..., None]
    order = torch.where(live, torch.rand(mask.indices.shape), 2.0).argsort(-1)
    indices = mask.indices.gather(3, order).masked_fill(~live, -(2**31))
    sizes = {"num_queries": mask.num_queries, "num_keys": mask.num_keys}
    return BlockMask(counts=mask.counts, indices=indices, block=mask.block, **sizes)


@st.composite
def videos(draw):
    """A grid of prime sizes, with text whose rows and columns are kept whole, and padding."""
    primes = st.sampled_from([1, 2, 3, 5])
    video = draw(primes) * draw(primes) * draw(primes)
    text, padding = draw(st.integers(0, 60)), draw(st.sampled_from([0, 0, 1, 19]))
    block = (draw(st.sampled_from([1, 5, 16, 64])), draw(st.sampled_from([3, 16, 48, 64])))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    keys, total = video + text, video + text + padding
    batch, heads, shared = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2])),
        draw(st.booleans()),
    )
    rows, columns = -(-total // block[0]), -(-keys // block[1])
    kept = torch.rand(1 if shared else batch, 1 if shared else 2 * heads, rows, columns) < 0.4
    if text:
        kept[:, :, video // block[0] :] = True
        kept[..., video // block[1] :] = True
    mask = BlockMask.from_dense(kept, block=block, num_queries=total, num_keys=keys)
    q = torch.randn(batch, 2 * heads, total, 8)
    k, v = torch.randn(2, batch, heads, total, 8)
    return q, k, v, shuffled(mask)


def allowed(mask: BlockMask, total: int) -> Tensor:
    tokens = mask.token_mask()
    return torch.nn.functional.pad(tokens, (0, total - mask.num_keys))


def check_equal(impl, case) -> None:
    q, k, v, mask = case
    # Whatever stands in the padding is no key.
    k[:, :, mask.num_keys :] = torch.nan
    v[:, :, mask.num_keys :] = torch.inf
    out, lse = attention(q, k, v, AttentionPlan(mask=mask), impl=impl)
    want, want_lse = expected(q, k, v, allowed(mask, q.shape[2]))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


def check_poison(impl, case, poison) -> None:
    q, k, v, mask = case
    clean = attention(q, k, v, AttentionPlan(mask=mask), impl=impl)
    # Poison one key block: rows of other lists must not notice, and its own must.
    block = int(torch.randint(mask.grid[1], ()))
    tokens = slice(block * mask.block[1], min((block + 1) * mask.block[1], mask.num_keys))
    if poison != poison:
        k[:, :, tokens] = poison
    v[:, :, tokens] = poison
    out, lse = attention(q, k, v, AttentionPlan(mask=mask), impl=impl)
    seen = allowed(mask, q.shape[2])[..., tokens].any(-1).expand(lse.shape)
    torch.testing.assert_close(out[~seen], clean[0][~seen], atol=1e-6, rtol=0)
    torch.testing.assert_close(lse[~seen], clean[1][~seen], atol=1e-6, rtol=0)
    assert not bool(out[seen].isfinite().any())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@SETTINGS
@given(videos())
def test_kernels_equal_the_expanded_mask_with_text_padding_and_grouped_heads(impl, case):
    check_equal(impl, case)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@SETTINGS
@given(videos(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_is_skipped_never_reaches_the_output(impl, case, poison):
    check_poison(impl, case, poison)


# The uncompiled function takes half a second for each new shape.
@settings(SETTINGS, max_examples=3)
@given(videos())
def test_flex_equals_the_expanded_mask(case):
    check_equal("flex", case)


@settings(SETTINGS, max_examples=3)
@given(videos())
def test_what_is_skipped_never_reaches_the_output_of_flex(case):
    check_poison("flex", case, torch.inf)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@SETTINGS
@given(videos(), st.booleans())
def test_an_order_permutes_tokens_before_the_lists_count_them(impl, case, per_head):
    q, k, v, mask = case
    heads, total = q.shape[1:3]
    if per_head:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    order = torch.stack([torch.randperm(total) for _ in range(heads if per_head else 1)])
    ordered = allowed(mask, total).expand(q.shape[0], heads, -1, -1)
    table = torch.empty_like(ordered)
    for head in range(heads):
        places = order[head % len(order)]
        table[:, head, places[:, None], places] = ordered[:, head]
    out, lse = attention(q, k, v, AttentionPlan(mask=mask, order=order), impl=impl)
    want, want_lse = expected(q, k, v, table)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_bias_and_a_mask_with_fewer_keys_follow_a_shared_order(impl):
    q = torch.randn(2, 4, 50, 8)
    k, v = torch.randn(2, 2, 2, 50, 8)
    bias = torch.randn(2, 50)
    bias[:, ::4] = -torch.inf
    # In the second sample every key of one block is excluded.
    order = torch.randperm(50)[None]
    bias[1, order[0, 16:32]] = -torch.inf
    kept = torch.rand(2, 4, 7, 3) < 0.5
    mask = BlockMask.from_dense(kept, block=(8, 16), num_queries=50, num_keys=41)
    table = torch.empty(2, 4, 50, 50, dtype=torch.bool)
    table[:, :, order[0][:, None], order[0]] = allowed(mask, 50)
    plan = AttentionPlan(mask=mask, order=order)
    out, lse = attention(q, k, v, plan, key_bias=bias, impl=impl)
    want, want_lse = expected(q, k, v, table, bias)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_attention_takes_lists(impl):
    q = torch.randn(1, 2, 23, 8)
    k, v = torch.randn(2, 1, 2, 70, 8)
    mask = BlockMask.from_dense(
        torch.rand(1, 2, 3, 5) < 0.5, block=(8, 16), num_queries=23, num_keys=70
    )
    out, lse = attention(q, k, v, AttentionPlan(mask=mask), impl=impl)
    want, want_lse = expected(q, k, v, mask.token_mask())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("width", [4, 12])
def test_the_cpu_kernel_takes_values_of_another_width(width):
    q, k = torch.randn(2, 1, 2, 33, 8)
    v = torch.randn(1, 2, 33, width)
    mask = BlockMask.from_dense(
        torch.rand(1, 2, 5, 3) < 0.6, block=(8, 16), num_queries=33, num_keys=33
    )
    out, _ = attention(q, k, v, AttentionPlan(mask=mask), impl="cpu")
    want, _ = expected(q, k, v, mask.token_mask())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_cpu_kernel_is_as_exact_as_the_reference(dtype):
    q, k, v = torch.randn(3, 1, 2, 200, 32).to(dtype)
    mask = BlockMask.from_dense(
        torch.rand(1, 2, 4, 4) < 0.5, block=(64, 64), num_queries=200, num_keys=200
    )
    plan = AttentionPlan(mask=mask)
    out, lse = attention(q, k, v, plan, impl="cpu")
    rounded, _ = attention(q, k, v, plan, impl="reference")
    want, want_lse = expected(q, k, v, mask.token_mask())
    assert (out.dtype, rounded.dtype) == (dtype, dtype)
    budget = 2 * (rounded.double() - want).abs().max() + 8 * torch.finfo(dtype).eps
    assert (out.double() - want).abs().max() <= budget
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=0)


def test_shorter_lists_on_the_cpu_read_nothing_that_they_skip():
    q, k, v = torch.randn(3, 1, 1, 48, 8)
    kept = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
    mask = BlockMask.from_dense(kept, block=(16, 16), num_queries=48, num_keys=48)
    k[:, :, :16] = v[:, :, :16] = torch.nan
    out, _ = attention(q, k, v, AttentionPlan(mask=mask), impl="cpu")
    assert bool(out[:, :, :16].isnan().all())
    assert bool(out[:, :, 16:].isfinite().all())


def test_a_bias_on_the_cpu_needs_neither_tails_nor_shorter_lists():
    q, k, v = torch.randn(3, 2, 2, 48, 8)
    bias = torch.randn(2, 48)
    kept = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)[None, None]
    mask = BlockMask.from_dense(kept, block=(16, 16), num_queries=48, num_keys=48)
    out, _ = attention(q, k, v, AttentionPlan(mask=mask), key_bias=bias, impl="cpu")
    want, _ = expected(q, k, v, mask.token_mask(), bias)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [0, 1, 2**30])
def test_how_much_the_cpu_kernel_gathers_at_once_changes_nothing(size, monkeypatch):
    q, k, v = torch.randn(3, 2, 2, 90, 8)
    mask = shuffled(
        BlockMask.from_dense(
            torch.rand(2, 2, 12, 6) < 0.4, block=(8, 16), num_queries=90, num_keys=90
        )
    )
    monkeypatch.setattr(cpu, "CACHE", size)
    out, lse = attention(q, k, v, AttentionPlan(mask=mask), impl="cpu")
    want, want_lse = expected(q, k, v, mask.token_mask())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_run_leaves_nothing_behind_for_the_next(impl):
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    plans = [
        AttentionPlan(
            mask=BlockMask.from_dense(
                torch.rand(1, 2, 5, 3) < 0.5, block=(8, 16), num_queries=40, num_keys=40
            )
        )
        for _ in range(2)
    ]
    alone = attention(q, k, v, plans[1], impl=impl)
    attention(q, k, v, plans[0], impl=impl)
    again = attention(q, k, v, plans[1], impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(alone, again, strict=True))


def half(num, block=16) -> AttentionPlan:
    table = torch.ones(1, 1, -(-num // block), -(-num // block), dtype=torch.bool).tril()
    return AttentionPlan(
        mask=BlockMask.from_dense(table, block=(block, block), num_queries=num, num_keys=num)
    )


def test_a_plan_on_another_device_is_named():
    q = torch.randn(3, 1, 1, 64, 16)
    elsewhere = replace(half(64), order=torch.arange(64, device="meta")[None])
    with pytest.raises(ShapeError, match=r"plan.order is on meta, the queries are on cpu"):
        attention(*q, elsewhere)
    with pytest.raises(ShapeError, match=r"plan.mask.counts is on meta"):
        attention(*q, AttentionPlan(mask=half(64).mask.to("meta")))


def test_auto_does_not_walk_into_a_reference_that_cannot_hold_its_logits(monkeypatch):
    from tubelet.kernels.attention import api

    monkeypatch.setattr(api, "TOO_MANY", 1000)
    q = torch.randn(3, 1, 1, 64, 16, dtype=torch.float64).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"would hold 4,096 logits\. .*cpu: .*flex: "):
        attention(*q, half(64))
    assert attention(*q, half(64), impl="reference")[0].shape == (1, 1, 64, 16)


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_wide_heads_are_approximated_too(impl):
    q = torch.randn(3, 1, 2, 64, 300)
    plan = replace(half(64), approximate=True)
    out, _ = attention(*q, plan, impl=impl)
    wanted, _ = attention(*q.double(), plan, impl="reference")
    assert torch.allclose(out.double(), wanted, atol=1e-4)


def test_a_bias_that_learns_goes_where_gradients_go():
    q, bias = torch.randn(3, 1, 1, 64, 16), torch.zeros(1, 64, requires_grad=True)
    out, _ = attention(*q, half(64), key_bias=bias)
    out.square().sum().backward()
    assert bool(bias.grad.any())


def test_gathered_blocks_stay_within_the_cache(monkeypatch):
    from tubelet.kernels.attention import cpu

    monkeypatch.setattr(cpu, "CACHE", 64 * 1024)
    gathered = []
    plain = cpu._extra
    monkeypatch.setattr(
        cpu, "_extra", lambda places, *rest: gathered.append(places) or plain(places, *rest)
    )
    table = torch.zeros(1, 4, 32, 32, dtype=torch.bool)
    table[..., 0], table[:, 1:] = True, True
    mask = BlockMask.from_dense(table, block=(16, 16), num_queries=512, num_keys=512)
    q = torch.randn(3, 1, 4, 512, 16)
    out, _ = attention(*q, AttentionPlan(mask=mask), impl="cpu")
    wanted, _ = attention(*q, AttentionPlan(mask=mask), impl="reference")
    assert torch.allclose(out, wanted, atol=1e-5)
    most = max(places.numel() for places in gathered) * 2 * 16 * 16 * 4
    # One row per thread is always taken, however long its list.
    assert most <= max(64 * 1024, torch.get_num_threads() * 32 * 2 * 16 * 16 * 4)
