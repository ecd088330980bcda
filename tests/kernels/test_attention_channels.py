"""A key bias in two extra channels: as exact as the kernel, where one channel is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.kernels.attention.channels import ALIGNMENT, with_bias_channels

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
LOG_SIZES = torch.arange(1, 513).float().log()[None]


def bias_of(q, k, width, scale):
    """The bias that the extra channels add, exactly as the bf16 tensors say."""
    extra_q, extra_k = q[..., width:].double(), k[..., width:].double()
    return (extra_q @ extra_k.mT * scale)[:, 0, 0]


def weight_error(bias):
    """Largest relative change of a softmax weight, relative to the exact bias."""
    exact = LOG_SIZES.double().softmax(-1)
    return ((bias.softmax(-1) - exact) / exact).abs().max().item()


@pytest.mark.parametrize("width", [64, 128])
def test_two_channels_are_exact_enough_for_bf16_and_one_is_not(width):
    scale = width**-0.5
    q, k = torch.zeros(1, 1, 1, width), torch.zeros(1, 1, 512, width)
    q, k = with_bias_channels(q.bfloat16(), k.bfloat16(), LOG_SIZES, scale)
    assert q.dtype == k.dtype == torch.bfloat16
    assert weight_error(bias_of(q, k, width, scale)) < 1e-3
    one = (LOG_SIZES / scale).bfloat16().double() * scale
    assert weight_error(one) > 5e-3


@SETTINGS
@given(st.integers(2, 40), st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16]))
def test_wider_products_are_the_biased_logits(width, seed, dtype):
    torch.manual_seed(seed)
    scale = width**-0.5
    q, k = torch.randn(2, 4, 5, width).to(dtype), torch.randn(2, 2, 7, width).to(dtype)
    key_bias = 4 * torch.randn(2, 7)
    wide_q, wide_k = with_bias_channels(q, k, key_bias, scale)
    logits = wide_q.double() @ wide_k.double().repeat_interleave(2, 1).mT * scale
    plain = q.double() @ k.double().repeat_interleave(2, 1).mT * scale
    # Two bf16 parts carry 16 bits.
    torch.testing.assert_close(
        logits - plain, key_bias.double()[:, None, None].expand_as(plain), atol=1e-4, rtol=2**-14
    )


@pytest.mark.parametrize("width", [6, 7, 8, 62, 63, 64, 128])
def test_widths_are_aligned_and_the_first_channels_untouched(width):
    q, k = torch.randn(1, 2, 3, width), torch.randn(1, 1, 4, width)
    wide_q, wide_k = with_bias_channels(q, k, torch.zeros(1, 4), 0.1)
    wanted = next(w for w in range(width + 2, width + 2 + ALIGNMENT) if w % ALIGNMENT == 0)
    assert wide_q.shape == (1, 2, 3, wanted)
    assert wide_k.shape == (1, 1, 4, wanted)
    assert torch.equal(wide_q[..., :width], q)
    assert torch.equal(wide_k[..., :width], k)
    # Spare channels multiply to nothing.
    assert not wide_q[..., width + 2 :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_excluded_keys_get_no_weight_and_no_nan(width, dtype):
    scale = width**-0.5
    q, k = torch.randn(1, 1, 5, width).to(dtype), torch.randn(1, 1, 6, width).to(dtype)
    key_bias = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf, 6.2, 0.0]])
    q, k = with_bias_channels(q, k, key_bias, scale)
    assert bool(k.isfinite().all())
    logits = q.float() @ k.float().mT * scale
    # Kernels subtract running maxima, where an infinite logit could turn into NaN.
    assert bool(logits.isfinite().all())
    weights = logits.softmax(-1)
    assert bool((weights[..., [1, 3]] == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 5))
