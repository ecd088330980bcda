"""Causal calls on CUDA: dense ones, lists in the order of the prompt or another, and waiting."""

import jaxtyping
import pytest
import torch

from tubelet.bench.attention.inputs import make_inputs
from tubelet.bench.attention.shapes import SHAPES
from tubelet.core.block_mask import BlockMask
from tubelet.core.context import Site
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.kernels.attention import attention, causal, triton_blocks, why_not
from tubelet.kernels.attention.call import Call
from tubelet.kernels.selection import TOOLS
from tubelet.recipes import GridAttention, VerticalSlash

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16
EPS = 1.6e-2
IMPLS = ["triton", "fa4"]


@pytest.fixture(autouse=True)
def _untyped():
    """FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs(num=700, heads=4, groups=2, width=128, batch=1):
    # Interleaved heads, as hosts have them.
    q = torch.randn(batch, num, heads, width, device="cuda", dtype=HALF).transpose(1, 2)
    k, v = torch.randn(2, batch, num, groups, width, device="cuda", dtype=HALF).transpose(2, 3)
    return q, k, v


def mask_of(num, block, keys=None, batch=1, heads=4, density=0.6) -> BlockMask:
    keys = keys or num
    rows, columns = -(-num // block[0]), -(-keys // block[1])
    kept = torch.rand(batch, heads, rows, columns, device="cuda") < density
    return BlockMask.from_dense(kept, block=block, num_queries=num, num_keys=keys)


def order_of(num, rows):
    return torch.stack([torch.randperm(num, device="cuda") for _ in range(rows)]) if rows else None


def skip_where_missing(impl, q, k, v, plan=None) -> None:
    reason = why_not(impl, q, k, v, plan, causal=True)
    if reason and "not installed" in reason:
        pytest.skip(f"GPU TEST NOT RUN: {reason}")


def compare(impl, q, k, v, plan=None) -> None:
    """Output within twice the error of the reference in this dtype; log-sum-exp always true."""
    skip_where_missing(impl, q, k, v, plan)
    wide = (x.double() for x in (q, k, v))
    exact, exact_lse = attention(*wide, plan, causal=True, impl="reference")
    rounded, _ = attention(q, k, v, plan, causal=True, impl="reference")
    out, lse = attention(q, k, v, plan, causal=True, impl=impl)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    assert bool((out[lse.isneginf()] == 0).all())
    budget = 2 * (rounded.double() - exact).abs().max() + EPS
    assert (out.double() - exact).abs().max() <= budget
    torch.testing.assert_close(lse.double(), exact_lse, atol=4e-3, rtol=1e-5)


@pytest.mark.parametrize("impl", ["fa4", "sdpa"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("num", [300, 1024])
@pytest.mark.parametrize("width", [64, 128])
def test_dense_causal_calls_equal_the_reference(impl, groups, num, width):
    compare(impl, *inputs(num, groups=groups, width=width))


@pytest.mark.parametrize("num", [300, 1024])
def test_flex_builds_its_triangle_by_itself(num):
    compare("flex", *inputs(num))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64), (256, 128)])
def test_causal_lists_equal_the_reference_in_any_order(impl, rows, block):
    q, k, v = inputs()
    compare(impl, q, k, v, AttentionPlan(mask=mask_of(700, block), order=order_of(700, rows)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shared", [(2, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("width", [64, 128])
def test_causal_lists_are_shared_and_leave_out_padding(impl, shared, width):
    q, k, v = inputs(width=width, batch=2)
    mask = mask_of(700, (128, 128), 650, *shared)
    compare(impl, q, k, v, AttentionPlan(mask=mask))


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("heads", [1, 4])
def test_causal_lists_are_those_of_plain_torch(rows, heads):
    q, k, v = inputs()
    mask, order = mask_of(700, (64, 32), 650, heads=heads), order_of(700, rows)
    places = None
    if order is not None:
        places = order.repeat_interleave(4 // rows, 0).int() if rows > 1 else order.int()
    call = Call(q=q, k=k, v=v, scale=1.0, causal=True, mask=mask, places=places)
    found, want = triton_blocks.causal_lists(call), causal.causal_lists(call)
    live = torch.arange(mask.grid[1], device="cuda") < found.mask.counts[..., None]
    assert torch.equal(found.mask.counts, want.mask.counts.expand_as(found.mask.counts))
    assert torch.equal(found.whole, want.whole)
    assert torch.equal(found.mask.indices * live, want.mask.indices * live)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "recipe",
    [
        GridAttention(window=64, sink=16),
        VerticalSlash(window=20, vertical=20, slash=30),
    ],
    ids=str,
)
def test_a_causal_layer_of_a_prompt_is_right_and_waits_for_nothing(impl, recipe):
    shape = SHAPES["tiny-prompt"]
    q, k, v = make_inputs(shape, "structured", seed=0, device=torch.device("cuda"), dtype=HALF)
    # Widths of 32 are none of FlashAttention-4's.
    q, k, v = (torch.cat([x, x], -1) for x in (q, k, v))
    video, place = shape.layout("cuda")
    ctx = PrefillContext(
        site=Site(name="layer", layer=1, num_layers=2, kind="llm"),
        grids=(shape.grid,),
        query=q,
        key=k,
        value=v,
        scale=q.shape[3] ** -0.5,
        video=video,
        place=place,
        tools=TOOLS,
    )
    compare(impl, q, k, v, recipe.plan(ctx))
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, recipe.plan(ctx), causal=True, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
