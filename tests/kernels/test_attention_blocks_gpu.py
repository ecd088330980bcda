"""Block-list kernels on CUDA against the reference in float64."""

import jaxtyping
import pytest
import torch

from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, choose, why_not

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16
# Error left over at float32, and what a rounding of the largest logit costs otherwise.
EPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _untyped():
    """FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs(dtype=HALF, batch=2, heads=4, groups=2, queries=700, keys=700, width=64):
    # Interleaved heads, as hosts have them.
    q = torch.randn(batch, queries, heads, width, device="cuda").transpose(1, 2)
    k, v = torch.randn(2, batch, keys, groups, width, device="cuda").transpose(2, 3)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def mask_of(queries, keys, block, batch=2, heads=4, density=0.5) -> BlockMask:
    """Lists in random order with numbers out of range past their ends; one of them is empty."""
    rows, columns = -(-queries // block[0]), -(-keys // block[1])
    kept = torch.rand(batch, heads, rows, columns, device="cuda") < density
    kept[0, 0, 0] = False
    mask = BlockMask.from_dense(kept, block=block, num_queries=queries, num_keys=keys)
    live = torch.arange(columns, device="cuda") < mask.counts[..., None]
    order = torch.where(live, torch.rand(mask.indices.shape, device="cuda"), 2.0).argsort(-1)
    indices = mask.indices.gather(3, order).masked_fill(~live, 2**31 - 1)
    return BlockMask(
        counts=mask.counts, indices=indices, block=block, num_queries=queries, num_keys=keys
    )


def compare(impl, q, k, v, plan, **options) -> None:
    """Output within twice the error of the reference in this dtype; log-sum-exp always true."""
    if (reason := why_not(impl, q, k, v, plan)) and "not installed" in reason:
        pytest.skip(f"GPU TEST NOT RUN: {reason}")
    wide = (x.double() for x in (q, k, v))
    exact, exact_lse = attention(*wide, plan, impl="reference", **options)
    rounded, _ = attention(q, k, v, plan, impl="reference", **options)
    out, lse = attention(q, k, v, plan, impl=impl, **options)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    if plan.delta_rows is None:
        assert bool((out[lse.isneginf()] == 0).all())
    eps = EPS[q.dtype]
    budget = 2 * (rounded.double() - exact).abs().max() + eps
    assert (out.double() - exact).abs().max() <= budget
    torch.testing.assert_close(lse.double(), exact_lse, atol=max(eps / 4, 2e-5), rtol=1e-5)


FA4_BLOCKS = [(128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (256, 128), (256, 256)]
TRITON_BLOCKS = [*FA4_BLOCKS, (16, 16), (48, 80), (128, 16), (384, 384)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("block", FA4_BLOCKS)
def test_fa4_equals_the_reference(block, width):
    q, k, v = inputs(width=width)
    compare("fa4", q, k, v, AttentionPlan(mask=mask_of(700, 700, block)))


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("block", TRITON_BLOCKS)
def test_triton_equals_the_reference(block, width):
    q, k, v = inputs(width=width)
    compare("triton", q, k, v, AttentionPlan(mask=mask_of(700, 700, block)))


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("fa4", torch.float16), ("triton", torch.float16), ("triton", torch.float32)],
)
@pytest.mark.parametrize("width", [64, 128])
def test_other_dtypes(impl, dtype, width):
    q, k, v = inputs(dtype, width=width)
    compare(impl, q, k, v, AttentionPlan(mask=mask_of(700, 700, (128, 64))))


@pytest.mark.parametrize("impl", ["fa4", "triton", "flex"])
@pytest.mark.parametrize("shared", [(2, 4), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", [(512, 768), (300, 1001)])
def test_shared_lists_cross_lengths_and_ragged_tails(impl, size, shared):
    q, k, v = inputs(queries=size[0], keys=size[1])
    compare(impl, q, k, v, AttentionPlan(mask=mask_of(*size, (128, 128), *shared)))


@pytest.mark.parametrize("impl", ["fa4", "triton", "flex"])
@pytest.mark.parametrize("per_head", [False, True])
def test_order_padding_and_temperature(impl, per_head):
    q, k, v = inputs(groups=4)
    order = torch.stack([torch.randperm(700, device="cuda") for _ in range(4 if per_head else 1)])
    for head in range(4):
        padding = order[head % len(order), 650:]
        k[:, head, padding], v[:, head, padding] = torch.nan, torch.inf
    mask = mask_of(700, 650, (128, 128))
    compare(impl, q, k, v, AttentionPlan(mask=mask, order=order, temperature=0.8))


@pytest.mark.parametrize("impl", ["fa4", "triton", "flex"])
def test_poison_in_skipped_blocks_stays_there(impl):
    q, k, v = inputs()
    plan = AttentionPlan(mask=mask_of(700, 700, (128, 128)))
    if (reason := why_not(impl, q, k, v, plan)) and "not installed" in reason:
        pytest.skip(f"GPU TEST NOT RUN: {reason}")
    clean, clean_lse = attention(q, k, v, plan, impl=impl)
    # The ragged last block.
    k[:, :, 640:], v[:, :, 640:] = torch.nan, torch.inf
    out, lse = attention(q, k, v, plan, impl=impl)
    assert plan.mask is not None
    seen = plan.mask.token_mask()[..., -1]
    assert torch.equal(out[~seen], clean[~seen])
    assert torch.equal(lse[~seen], clean_lse[~seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
def test_triton_adds_a_key_bias(dtype):
    q, k, v = inputs(dtype)
    key_bias = torch.randint(1, 512, (2, 700), device="cuda").float().log()
    key_bias[:, 7::3] = -torch.inf
    key_bias[1, :128] = -torch.inf
    compare("triton", q, k, v, AttentionPlan(mask=mask_of(700, 700, (64, 64))), key_bias=key_bias)


@pytest.mark.parametrize("impl", ["fa4", "triton", "flex"])
@pytest.mark.parametrize("width", [64, 128])
def test_left_out_blocks_count_by_their_means(impl, width):
    q, k, v = inputs(width=width)
    plan = AttentionPlan(mask=mask_of(700, 650, (128, 128), density=0.3), approximate=True)
    compare(impl, q, k, v, plan)


@pytest.mark.parametrize("impl", ["fa4", "triton", "flex"])
def test_delta_rows(impl):
    q, k, v = inputs()
    compare(impl, q, k, v, AttentionPlan(mask=mask_of(700, 650, (128, 128)), delta_rows=16))


def test_fa4_takes_dense_calls():
    for width in (64, 128):
        compare("fa4", *inputs(queries=300, keys=1001, width=width), AttentionPlan())


def test_the_fastest_kernel_is_chosen():
    q, k, v = inputs()
    plan = AttentionPlan(mask=mask_of(700, 700, (128, 128)))
    first = "triton" if why_not("fa4", q, k, v, plan) else "fa4"
    assert choose(q, k, v, plan) == first
    small = AttentionPlan(mask=mask_of(700, 700, (64, 64)))
    assert choose(q, k, v, small) == "triton"
    wide = inputs(width=128)
    assert choose(*wide, small) == ("triton" if why_not("fa4", *wide, small) else "fa4")
    assert choose(q, k, v, plan, key_bias=torch.zeros(2, 700, device="cuda")) == "triton"
    assert choose(q.float(), k.float(), v.float(), plan) == "triton"
    assert choose(q, k, v, AttentionPlan(mask=mask_of(700, 700, (24, 24)))) == "reference"


@pytest.mark.parametrize("impl", ["fa4", "triton"])
def test_nothing_waits_for_the_device(impl):
    q, k, v = inputs()
    plan = AttentionPlan(mask=mask_of(700, 650, (128, 128)))
    if (reason := why_not(impl, q, k, v, plan)) and "not installed" in reason:
        pytest.skip(f"GPU TEST NOT RUN: {reason}")
    attention(q, k, v, plan, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, plan, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
