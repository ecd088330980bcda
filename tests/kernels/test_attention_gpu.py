"""The key comparisons on CUDA: fused kernels, key bias in channels, and statistics."""

import jaxtyping
import pytest
import torch

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, attention_entropy, choose, received_attention

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Error left over at float32, and what a rounding of the largest logit costs otherwise.
EPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _untyped():
    """Own messages instead of shape checking; FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    # Past its recompile limit torch runs flex uncompiled, and the fused kernel goes untested.
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs(dtype, batch=2, heads=4, groups=2, queries=300, keys=300, width=64):
    q = torch.randn(batch, heads, queries, width, device="cuda")
    k, v = torch.randn(2, batch, groups, keys, width, device="cuda")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def compare(impl, q, k, v, plan=None, **options):
    """Output within twice the error of the reference in this dtype; log-sum-exp always true."""
    wide = (x.double() for x in (q, k, v))
    exact, exact_lse = attention(*wide, plan, impl="reference", **options)
    rounded, _ = attention(q, k, v, plan, impl="reference", **options)
    out, lse = attention(q, k, v, plan, impl=impl, **options)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert out.shape == exact.shape
    eps = EPS[q.dtype]
    budget = 2 * (rounded.double() - exact).abs().max() + eps
    assert (out.double() - exact).abs().max() <= budget
    torch.testing.assert_close(lse.double(), exact_lse, atol=max(eps / 4, 1e-5), rtol=1e-5)


SHAPES = {
    "square": {},
    "one query head per key head": {"groups": 4},
    "cross": {"queries": 100, "keys": 513},
    "one token": {"queries": 1, "keys": 1},
    "width 16": {"width": 16},
    "width 40": {"width": 40},
    "width 128": {"width": 128},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sdpa_equals_the_reference(shape, dtype):
    compare("sdpa", *inputs(dtype, **shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [40, 64, 128])
def test_sdpa_carries_a_key_bias_in_channels(width, causal, dtype):
    q, k, v = inputs(dtype, width=width)
    key_bias = torch.randint(1, 512, (2, 300), device="cuda").float().log()
    compare("sdpa", q, k, v, key_bias=key_bias, causal=causal)
    key_bias[:, 7::3] = -torch.inf
    compare("sdpa", q, k, v, key_bias=key_bias, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sdpa_takes_strided_inputs(dtype):
    packed = torch.randn(2, 300, 3, 4, 64, device="cuda").to(dtype)
    compare("sdpa", *(x.transpose(1, 2) for x in packed.unbind(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sdpa_takes_order_and_temperature(temperature, dtype):
    order = torch.randperm(300, device="cuda")[None]
    plan = AttentionPlan(order=order, temperature=temperature)
    compare("sdpa", *inputs(dtype), plan)


def block_mask(queries, keys, batch=2, heads=4) -> BlockMask:
    kept = torch.rand(batch, heads, -(-queries // 128), -(-keys // 128), device="cuda") < 0.5
    kept[0, 0, 0] = False
    return BlockMask.from_dense(kept, block=(128, 128), num_queries=queries, num_keys=keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [(2, 4), (1, 1)])
@pytest.mark.parametrize("size", [(512, 512), (300, 700)])
def test_flex_equals_the_reference_with_ragged_block_masks(size, shared, dtype):
    q, k, v = inputs(dtype, queries=size[0], keys=size[1])
    plan = AttentionPlan(mask=block_mask(*size, *shared))
    compare("flex", q, k, v, plan)
    out, lse = attention(q, k, v, plan, impl="flex")
    assert bool((out[0, 0, :128] == 0).all())
    assert bool((lse[0, 0, :128] == -torch.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_flex_adds_a_key_bias(dtype):
    q, k, v = inputs(dtype, queries=512, keys=512)
    key_bias = torch.randint(1, 512, (2, 512), device="cuda").float().log()
    key_bias[:, 7::3] = -torch.inf
    compare("flex", q, k, v, AttentionPlan(mask=block_mask(512, 512)), key_bias=key_bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flex_is_causal(dtype):
    compare("flex", *inputs(dtype, queries=512, keys=512), causal=True)


def test_unsuitable_calls_are_refused_or_go_elsewhere():
    q, k, v = inputs(torch.float32)
    small = BlockMask.from_dense(
        torch.ones(1, 1, 5, 5, dtype=torch.bool, device="cuda"),
        block=(64, 64),
        num_queries=300,
        num_keys=300,
    )
    with pytest.raises(UnsupportedError, match="multiples of 128"):
        attention(q, k, v, AttentionPlan(mask=small), impl="flex")
    assert choose(q, k, v, AttentionPlan(mask=small)) == "triton"
    with pytest.raises(UnsupportedError, match="CUDA kernels take no float64"):
        attention(q.double(), k.double(), v.double(), impl="sdpa")
    assert choose(q, k, v) == "sdpa"
    assert choose(q, k, v, AttentionPlan(mask=block_mask(300, 300))) == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num", [1, 17, 1024])
def test_statistics_equal_those_of_the_map(num, bias, dtype):
    q, k, v = inputs(dtype, queries=num, keys=num)
    key_bias = None
    if bias:
        key_bias = torch.randint(1, 512, (2, num), device="cuda").float().log()
    lse = attention(q, k, v, key_bias=key_bias)[1]
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT / 8
    if bias:
        logits = logits + key_bias.double()[:, None, None]
    weights = logits.softmax(-1)
    received = received_attention(q, k, lse, key_bias=key_bias)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(received.double(), weights.sum(2), atol=tolerance, rtol=tolerance)
    total = received.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, num), rtol=tolerance, atol=0)
    entropy = attention_entropy(q, k, lse, key_bias=key_bias)
    expected = -torch.special.xlogy(weights, weights).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, atol=4 * tolerance, rtol=0)


def test_statistics_need_no_map():
    num = 16384
    q, k, v = inputs(torch.bfloat16, batch=1, queries=num, keys=num)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lse = attention(q, k, v)[1]
    received_attention(q, k, lse)
    attention_entropy(q, k, lse)
    # One bf16 map of one head would be 512 MiB.
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20
