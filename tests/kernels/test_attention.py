"""Every attention implementation against a softmax written out in float64."""

import re

import jaxtyping
import pytest
import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import IMPLEMENTATIONS, attention, choose

NAMES = ["reference", "sdpa", "flex"]
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _untyped():
    """Own messages instead of shape checking; FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs(batch=2, heads=4, groups=2, queries=33, keys=33, width=16, dtype=torch.float32):
    q = torch.randn(batch, heads, queries, width)
    k, v = torch.randn(2, batch, groups, keys, width)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def block_mask(queries, keys, block=(8, 5), batch=2, heads=4) -> BlockMask:
    rows, columns = -(-queries // block[0]), -(-keys // block[1])
    kept = torch.rand(batch, heads, rows, columns) < 0.5
    return BlockMask.from_dense(kept, block=block, num_queries=queries, num_keys=keys)


def materialised(q, k, v, *, scale=None, causal=False, key_bias=None, allowed=None):
    """Output and log-sum-exp in float64; `allowed` is a boolean [B, H, N, M] table."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias.double()[:, None, None]
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if causal:
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        logits = logits.masked_fill(i[:, None] < j, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ v, torch.logsumexp(logits, -1)


def agree(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], atol: float) -> None:
    for have, want in zip(result, expected, strict=True):
        torch.testing.assert_close(have.double(), want, atol=atol, rtol=0)


SHAPES = {
    "square": {},
    "one query head per key head": {"groups": 4},
    "one key head": {"groups": 1},
    "cross": {"queries": 17, "keys": 50},
    "one token": {"queries": 1, "keys": 1},
    "one key": {"keys": 1},
    "width 40": {"width": 40},
    "width 64": {"width": 64},
    "width 128": {"width": 128},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference_equals_softmax_in_float64(shape):
    q, k, v = (x.double() for x in inputs(**shape))
    out, lse = attention(q, k, v, impl="reference")
    assert out.dtype == lse.dtype == torch.float64
    agree((out, lse), materialised(q, k, v), 1e-12)


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_output_and_lse_are_those_of_the_softmax(shape, impl):
    q, k, v = inputs(**shape)
    out, lse = attention(q, k, v, impl=impl)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert out.shape == q.shape
    agree((out, lse), materialised(q, k, v), 4e-6)


@pytest.mark.parametrize("impl", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["square", "cross", "width 40", "width 128"])
def test_low_precision_stays_within_twice_the_error_of_the_reference(name, dtype, impl):
    q, k, v = inputs(**SHAPES[name], dtype=dtype)
    expected, expected_lse = materialised(q, k, v)
    out, lse = attention(q, k, v, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    rounded = attention(q, k, v, impl="reference")[0]
    budget = 2 * (rounded.double() - expected).abs().max() + torch.finfo(dtype).eps
    assert (out.double() - expected).abs().max() <= budget
    # The CPU kernel shortens its exponential for these dtypes, which moves the sum by 3e-5.
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("bias", ["none", "finite", "some excluded"])
@pytest.mark.parametrize("causal", [False, True])
def test_causality_and_key_bias(causal, bias, impl):
    q, k, v = inputs()
    key_bias = None if bias == "none" else 3 * torch.randn(2, 33)
    if bias == "some excluded":
        # The first key stays, so that no causal row is empty.
        key_bias[:, 5::3] = -torch.inf
    result = attention(q, k, v, causal=causal, key_bias=key_bias, impl=impl)
    agree(result, materialised(q, k, v, causal=causal, key_bias=key_bias), 5e-6)


@pytest.mark.parametrize("impl", NAMES)
def test_an_excluded_key_might_as_well_not_exist(impl):
    q, k, v = inputs()
    key_bias = torch.zeros(2, 33)
    key_bias[:, 20:] = -torch.inf
    out, lse = attention(q, k, v, key_bias=key_bias, impl=impl)
    agree((out, lse), materialised(q, k[:, :, :20], v[:, :, :20]), 4e-6)


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale_multiplies_the_logits(scale, impl):
    q, k, v = inputs()
    result = attention(q, k, v, scale=scale, impl=impl)
    agree(result, materialised(q, k, v, scale=scale), 2e-5)


@pytest.mark.parametrize("impl", NAMES)
def test_a_large_lse_is_still_exact(impl):
    q, k, v = inputs()
    out, lse = attention(30 * q, k, v, impl=impl)
    expected, expected_lse = materialised(30 * q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0, rtol=1e-5)


MASKED = ["reference", "flex", "cpu"]


@pytest.mark.parametrize("impl", MASKED)
@pytest.mark.parametrize("shared", [(2, 4), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", [(33, 33), (17, 50), (16, 15)])
def test_block_masks_with_ragged_tails(size, shared, impl):
    q, k, v = inputs(queries=size[0], keys=size[1])
    mask = block_mask(*size, batch=shared[0], heads=shared[1])
    result = attention(q, k, v, AttentionPlan(mask=mask), impl=impl)
    agree(result, materialised(q, k, v, allowed=mask.token_mask()), 4e-6)


@pytest.mark.parametrize("impl", MASKED)
def test_queries_without_keys_get_zero_and_minus_infinity(impl):
    q, k, v = inputs()
    kept = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    kept[0, 1, 2] = kept[1, :, 4] = False
    mask = BlockMask.from_dense(kept, block=(8, 5), num_queries=33, num_keys=33)
    out, lse = attention(q, k, v, AttentionPlan(mask=mask), impl=impl)
    empty = ~mask.token_mask().any(-1)
    assert empty.sum() == 8 + 4
    assert bool((out[empty] == 0).all())
    assert bool((lse[empty] == -torch.inf).all())
    agree((out, lse), materialised(q, k, v, allowed=mask.token_mask()), 4e-6)


@pytest.mark.parametrize("impl", ["reference", "flex"])
def test_queries_whose_keys_are_all_excluded_get_zero_and_minus_infinity(impl):
    q, k, v = inputs()
    key_bias = torch.zeros(2, 33)
    key_bias[1] = -torch.inf
    out, lse = attention(q, k, v, key_bias=key_bias, impl=impl)
    assert bool((out[1] == 0).all())
    assert bool((lse[1] == -torch.inf).all())
    agree((out, lse), materialised(q, k, v, key_bias=key_bias), 4e-6)


@pytest.mark.parametrize("impl", MASKED)
def test_block_mask_and_key_bias_together(impl):
    q, k, v = inputs()
    mask, key_bias = block_mask(33, 33), torch.randn(2, 33)
    key_bias[:, ::4] = -torch.inf
    result = attention(q, k, v, AttentionPlan(mask=mask), key_bias=key_bias, impl=impl)
    expected = materialised(q, k, v, allowed=mask.token_mask(), key_bias=key_bias)
    agree(result, expected, 4e-6)


def test_reference_combines_block_mask_and_causality():
    q, k, v = inputs()
    mask = block_mask(33, 33)
    result = attention(q, k, v, AttentionPlan(mask=mask), causal=True, impl="reference")
    agree(result, materialised(q, k, v, allowed=mask.token_mask(), causal=True), 4e-6)


@pytest.mark.parametrize("impl", NAMES)
def test_a_plan_bias_is_a_key_bias_and_adds_to_it(impl):
    q, k, v = inputs()
    one, two = torch.randn(2, 2, 33)
    plan = AttentionPlan(bias=one)
    same = attention(q, k, v, key_bias=one, impl=impl)
    for have, want in zip(attention(q, k, v, plan, impl=impl), same, strict=True):
        assert torch.equal(have, want)
    result = attention(q, k, v, plan, key_bias=two, impl=impl)
    agree(result, materialised(q, k, v, key_bias=one + two), 4e-6)


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_temperature_divides_the_scale(scale, impl):
    q, k, v = inputs()
    cold = attention(q, k, v, AttentionPlan(temperature=0.5), scale=scale, impl=impl)
    same = attention(q, k, v, scale=2 * (0.25 if scale is None else scale), impl=impl)
    assert torch.equal(cold[0], same[0])
    assert torch.equal(cold[1], same[1])


def test_temperature_leaves_the_biases_alone():
    q, k, v = inputs()
    bias = torch.randn(2, 33)
    plan = AttentionPlan(temperature=0.5, bias=bias)
    agree(attention(q, k, v, plan), materialised(q, k, v, scale=0.5, key_bias=bias), 8e-6)


def orders(heads: int, num: int) -> Tensor:
    return torch.stack([torch.randperm(num) for _ in range(heads)])


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("heads", [1, 4])
def test_an_order_without_a_mask_changes_nothing(heads, impl):
    q, k, v = inputs(groups=4)
    plan = AttentionPlan(order=orders(heads, 33), temperature=0.7)
    result = attention(q, k, v, plan, impl=impl)
    agree(result, materialised(q, k, v, scale=0.25 / 0.7), 5e-6)


@pytest.mark.parametrize("impl", MASKED)
@pytest.mark.parametrize("heads", [1, 4])
def test_a_mask_counts_tokens_in_the_given_order(heads, impl):
    q, k, v = inputs(groups=4)
    order, mask = orders(heads, 33), block_mask(33, 33)
    allowed = torch.zeros(2, 4, 33, 33, dtype=torch.bool)
    tokens = mask.token_mask()
    for head in range(4):
        places = order[head % heads]
        allowed[:, head, places[:, None], places] = tokens[:, head]
    result = attention(q, k, v, AttentionPlan(mask=mask, order=order), impl=impl)
    agree(result, materialised(q, k, v, allowed=allowed), 4e-6)


@pytest.mark.parametrize("impl", MASKED)
@pytest.mark.parametrize("heads", [1, 4])
def test_an_order_is_undone_exactly(heads, impl):
    # Every query sees its own key only, so outputs are values, bit for bit.
    q, k, v = inputs(groups=4, queries=9, keys=9)
    mask = BlockMask.from_dense(
        torch.eye(9, dtype=torch.bool)[None, None], block=(1, 1), num_queries=9, num_keys=9
    )
    plan = AttentionPlan(mask=mask, order=orders(heads, 9))
    out, lse = attention(q, k, v, plan, impl=impl)
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1) / 4)


@pytest.mark.parametrize("impl", NAMES)
def test_biases_follow_a_shared_order(impl):
    q, k, v = inputs()
    one, two = torch.randn(2, 2, 33)
    plan = AttentionPlan(order=orders(1, 33), bias=one)
    result = attention(q, k, v, plan, key_bias=two, impl=impl)
    agree(result, materialised(q, k, v, key_bias=one + two), 5e-6)


def test_orders_that_cannot_be_kept_are_refused():
    q, k, v = inputs()
    with pytest.raises(UnsupportedError, match="as many key heads as query heads"):
        attention(q, k, v, AttentionPlan(order=orders(4, 33)))
    q, k, v = inputs(groups=4)
    with pytest.raises(UnsupportedError, match="one token order for all heads"):
        attention(q, k, v, AttentionPlan(order=orders(4, 33)), key_bias=torch.zeros(2, 33))


@pytest.mark.parametrize("impl", NAMES)
def test_strided_and_broadcast_inputs(impl):
    packed = torch.randn(2, 33, 3, 4, 16)
    q, k, v = packed.unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous()
    agree(attention(q, k, v, impl=impl), materialised(q, k, v), 4e-6)
    shared = torch.randn(1, 1, 33, 16).expand(2, 4, -1, -1)
    agree(attention(q, shared, shared, impl=impl), materialised(q, shared, shared), 4e-6)
    sliced = torch.randn(2, 4, 66, 20)[:, :, ::2, 2:18]
    agree(attention(q, sliced, sliced, impl=impl), materialised(q, sliced, sliced), 4e-6)


@pytest.mark.parametrize("impl", ["reference", "flex"])
def test_values_may_be_wider_or_narrower_than_keys(impl):
    q, k, _ = inputs()
    for width in (8, 24):
        v = torch.randn(2, 2, 33, width)
        agree(attention(q, k, v, impl=impl), materialised(q, k, v), 4e-6)


@pytest.mark.parametrize("impl", NAMES)
def test_inputs_are_left_alone(impl):
    tensors = (*inputs(), torch.randn(2, 33))
    copies = [x.clone() for x in tensors]
    attention(*tensors[:3], key_bias=tensors[3], impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("impl", NAMES)
def test_poison_stays_in_its_sample_and_key_head(impl):
    q, k, v = inputs()
    clean = attention(q, k, v, impl=impl)
    k[1, 0], v[1, 0] = torch.nan, torch.nan
    out, lse = attention(q, k, v, impl=impl)
    assert bool(out[1, :2].isnan().all())
    for have, want in zip((out, lse), clean, strict=True):
        assert torch.equal(have[0], want[0])
        assert torch.equal(have[1, 2:], want[1, 2:])


@pytest.mark.parametrize("impl", NAMES)
def test_a_batch_equals_single_runs(impl):
    q, k, v = inputs()
    bias = torch.randn(2, 33)
    both = attention(q, k, v, key_bias=bias, impl=impl)
    for row in (slice(0, 1), slice(1, 2)):
        single = attention(q[row], k[row], v[row], key_bias=bias[row], impl=impl)
        for have, want in zip(single, both, strict=True):
            torch.testing.assert_close(have, want[row], atol=1e-6, rtol=0)


def test_gradients_of_the_fused_call_are_those_of_the_reference():
    gradients = []
    pull = torch.randn(2, 4, 33, 16)
    tensors = inputs()
    for impl in ("sdpa", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, _ = attention(*leaves, key_bias=torch.zeros(2, 33), impl=impl)
        (out * pull).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for have, want in zip(*gradients, strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)


BAD_SHAPES = {
    "three axes": (((2, 33, 16),) * 3, "takes [batch, heads, tokens, width] tensors"),
    "other batch": (((2, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 16)), "do not fit together"),
    "other width": (((2, 4, 8, 16), (2, 4, 8, 8), (2, 4, 8, 8)), "do not fit together"),
    "other values": (((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 7, 16)), "do not fit together"),
    "other value heads": (((2, 4, 8, 16), (2, 4, 8, 16), (2, 2, 8, 16)), "do not fit together"),
    "heads": (((2, 4, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16)), "multiple of key heads"),
    "no keys": (((2, 4, 8, 16), (2, 4, 0, 16), (2, 4, 0, 16)), "none empty"),
    "no queries": (((2, 4, 0, 16), (2, 4, 8, 16), (2, 4, 8, 16)), "none empty"),
}


@pytest.mark.parametrize("impl", ["auto", *NAMES])
@pytest.mark.parametrize(("shapes", "message"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_inputs_that_do_not_fit_are_refused(shapes, message, impl):
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        attention(*(torch.zeros(shape) for shape in shapes), impl=impl)
    assert str(shapes[1]) in str(caught.value)


def test_mixed_dtypes_and_devices_are_refused():
    q, k, v = inputs()
    with pytest.raises(ShapeError, match="one dtype and one device"):
        attention(q, k.half(), v)
    with pytest.raises(ShapeError, match="one dtype and one device"):
        attention(q, k, v.to("meta"))


def test_causal_calls_need_as_many_queries_as_keys():
    with pytest.raises(ShapeError, match="causal attention needs N = M, got 17 and 33"):
        attention(*inputs(queries=17), causal=True)


@pytest.mark.parametrize("shape", [(33,), (2, 32), (1, 33), (2, 1, 33)])
def test_a_key_bias_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError, match=r"key_bias must be \[batch, keys\] = \(2, 33\)"):
        attention(*inputs(), key_bias=torch.zeros(shape))


BAD_PLANS = {
    "mask queries": (lambda: {"mask": block_mask(32, 33)}, "is for 32 x 33 tokens"),
    "mask keys": (lambda: {"mask": block_mask(33, 40)}, "is for 33 x 40 tokens"),
    "gain": (lambda: {"gain": torch.ones(2, 1, 33)}, "plan.gain must be (2, 4, 33)"),
    "residual": (lambda: {"residual": torch.ones(2, 4, 33, 8)}, "must be (2, 4, 33, 16)"),
    "mask batch": (lambda: {"mask": block_mask(33, 33, batch=3)}, "(3, 4), the call (2, 4)"),
    "mask heads": (lambda: {"mask": block_mask(33, 33, heads=2)}, "(2, 2), the call (2, 4)"),
    "order heads": (lambda: {"order": orders(3, 33)}, "the token order is (3, 33)"),
    "order tokens": (lambda: {"order": orders(1, 32)}, "the token order is (1, 32)"),
}


@pytest.mark.parametrize(("plan", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_plans_for_other_calls_are_refused(plan, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        attention(*inputs(), AttentionPlan(**plan()))


def test_orders_need_self_attention():
    with pytest.raises(ShapeError, match="17 queries and 33 keys"):
        attention(*inputs(queries=17), AttentionPlan(order=orders(1, 33)))


def plan_with_mask() -> AttentionPlan:
    return AttentionPlan(mask=block_mask(33, 33))


@pytest.mark.parametrize("impl", NAMES)
def test_a_named_implementation_runs_and_no_other(monkeypatch, impl):
    ran = []
    for name, module in IMPLEMENTATIONS.items():
        run = module.run

        def record(*args, name=name, run=run, **options):
            ran.append(name)
            return run(*args, **options)

        monkeypatch.setattr(module, "run", record)
    attention(*inputs(), impl=impl)
    attention(*inputs(), AttentionPlan(order=orders(1, 33)), impl=impl)
    assert ran == [impl, impl]


def test_a_named_implementation_says_why_it_refuses():
    q, k, v = inputs()
    wide = torch.randn(2, 2, 33, 24)
    cases = [
        ("sdpa", (q, k, v, plan_with_mask()), {}, "take no block lists"),
        ("sdpa", (q, k, wide), {}, "key width 16 and value width 24 must agree"),
        ("flex", (q.double(), k.double(), v.double()), {}, "takes no float64"),
        ("flex", (q.requires_grad_(), k, v), {}, "no backward pass on the CPU"),
        ("cpu", (q.detach(), k, v), {}, "for block lists only"),
        ("cpu", (q, k, v, plan_with_mask()), {}, "no backward pass"),
        ("triton", (q.detach(), k, v), {}, "for block lists only"),
        ("triton", (q.detach(), k, v, plan_with_mask()), {}, "need a GPU|not installed"),
        ("fa4", (q.detach(), k, v), {}, "not installed|needs an NVIDIA GPU"),
    ]
    for impl, arguments, options, reason in cases:
        message = f"'{impl}' cannot run this: .*{reason}"
        with pytest.raises(UnsupportedError, match=message):
            attention(*arguments, impl=impl, **options)
        with pytest.raises(UnsupportedError, match=message):
            choose(*arguments, impl=impl, **options)


@pytest.mark.parametrize("call", [attention, choose])
def test_unknown_implementations_are_refused_with_the_known_ones(call):
    with pytest.raises(
        UnsupportedError, match=r"unknown .* 'fast'; use one of auto, sdpa, fa4, triton, flex, cpu"
    ):
        call(*inputs(), impl="fast")


def test_auto_takes_the_fastest_that_can():
    q, k, v = inputs()
    mask = plan_with_mask()
    assert choose(q, k, v) == "sdpa"
    assert choose(q, k, v, causal=True) == "sdpa"
    assert choose(q, k, v, AttentionPlan(bias=torch.zeros(2, 33), temperature=2.0)) == "sdpa"
    assert choose(q, k, v, mask) == "cpu"
    assert choose(q, k, torch.randn(2, 2, 33, 24)) == "flex"
    assert choose(q, k, v, mask, causal=True) == "cpu"
    assert choose(q.double(), k.double(), v.double(), mask) == "cpu"
    leaf = q.clone().requires_grad_()
    assert choose(leaf, k, v, mask) == "reference"
    with torch.no_grad():
        assert choose(leaf, k, v, mask) == "cpu"
    assert [choose(q, k, v, impl=impl) for impl in NAMES] == NAMES


def test_auto_gives_the_same_result_for_every_kind_of_call():
    q, k, v = inputs()
    mask = plan_with_mask()
    allowed = mask.mask.token_mask()
    agree(attention(q, k, v), materialised(q, k, v), 4e-6)
    agree(attention(q, k, v, mask), materialised(q, k, v, allowed=allowed), 4e-6)
    expected = materialised(q, k, v, allowed=allowed, causal=True)
    agree(attention(q, k, v, mask, causal=True), expected, 4e-6)
