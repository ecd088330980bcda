"""Inputs that fused kernels would misread: strides, alignment, keys that are all excluded."""

import pytest
import torch

from tubelet.core.errors import ShapeError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, received_attention


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_sdpa_reads_a_strided_last_axis_rightly(which: int) -> None:
    inputs = [torch.randn(2, 4, 9, 16) for _ in range(3)]
    inputs[which] = torch.randn(2, 4, 16, 9).transpose(2, 3)
    out, lse = attention(*inputs, impl="sdpa")
    wanted, wanted_lse = attention(*inputs, impl="reference")
    _close(out, wanted)
    _close(lse, wanted_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_misaligned_views_run_on_the_gpu(dtype: torch.dtype) -> None:
    q = torch.randn(2, 4, 300, 64, device="cuda", dtype=dtype)
    k = torch.randn(2, 4, 300, 70, device="cuda", dtype=dtype)[..., 3:67]
    out, _ = attention(q, k, k, impl="sdpa")
    wanted, _ = attention(q, k, k, impl="reference")
    torch.testing.assert_close(out, wanted, atol=5e-3, rtol=5e-3)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_without_any_key_get_zero_and_minus_infinity(device: str, causal: bool) -> None:
    q = torch.randn(2, 2, 6, 16, device=device)
    bias = torch.zeros(2, 6, device=device)
    bias[0] = -torch.inf
    bias[1, 0] = -torch.inf
    out, lse = attention(q, q, q, key_bias=bias, causal=causal, impl="sdpa")
    wanted, wanted_lse = attention(q, q, q, key_bias=bias, causal=causal, impl="reference")
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(lse.isneginf(), wanted_lse.isneginf())
    assert lse.isneginf().sum() == 12 + 2 * causal


def test_queries_of_no_weight_give_no_attention() -> None:
    q = torch.randn(1, 2, 5, 16)
    _, lse = attention(q, q, q)
    assert torch.equal(
        received_attention(q, q, lse, weight=torch.zeros(1, 5)), torch.zeros(1, 2, 5)
    )


@pytest.mark.parametrize("shape", [(2, 7), (1, 5)])
def test_the_bias_of_a_plan_is_checked(shape: tuple[int, int]) -> None:
    q = torch.randn(2, 2, 5, 16)
    with pytest.raises(ShapeError, match=r"plan\.bias"):
        attention(q, q, q, AttentionPlan(bias=torch.zeros(shape)))


@pytest.mark.gpu
def test_flex_stays_fused_over_many_lengths() -> None:
    for blocks in range(1, 13):
        q = torch.randn(1, 1, 2048 * blocks, 64, device="cuda", dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, q, q, impl="flex")
        map_bytes = 2 * (2048 * blocks) ** 2
        # The compiled kernel keeps a work area of about 63 MB whatever the length.
        assert torch.cuda.max_memory_allocated() - before < max(map_bytes / 4, 80e6)
