"""The rotary kernel against plain torch; run by test_rotary.py."""

import os

import pytest
import torch

from tubelet.kernels.rotary import api, rotary
from tubelet.kernels.triton_support import takes
from tubelet.models.vision_fusion import fuse_vision
from tubelet.testing import tiny_llm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


@pytest.fixture(autouse=True)
def _kernel_runs(monkeypatch):
    """Falling back to plain torch would make the comparisons empty."""
    torch.manual_seed(0)
    assert takes(torch.zeros(1, device=DEVICE))
    monkeypatch.setattr(api, "_turned", None)


TURNED = api._turned


def projected(num, heads, width, dtype=torch.float32):
    """Queries and keys as slices of one projection's output, and their angles' cos and sin."""
    qkv = torch.randn(num, 3 * heads * width, device=DEVICE).to(dtype)
    q, k, _ = qkv.view(num, 3, heads, width).unbind(1)
    # The halves of cos and sin differ here, as they may.
    cos, sin = torch.randn(2, num, width, device=DEVICE)
    return q, k, cos, sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num", "heads", "width"),
    [(64, 4, 72), (37, 3, 80), (1, 2, 16), (16, 1, 64), (130, 2, 6), (50, 2, 128)],
)
def test_the_kernel_gives_what_torch_gives_bit_for_bit(num, heads, width, dtype):
    q, k, cos, sin = projected(num, heads, width, dtype)
    for found, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert found.shape == (heads, num, width)
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert torch.equal(found, TURNED(x, cos, sin))


def test_strides_of_any_kind_and_angles_of_any_precision():
    q, _, cos, sin = projected(21, 3, 24)
    odd = torch.randn(24, 3, 21, device=DEVICE).permute(2, 1, 0)
    planes = torch.randn(3, 21, 24, device=DEVICE).transpose(0, 1)
    low = cos.half(), sin.mT.contiguous().mT.double()
    turn = [x.float() for x in low]
    for x in (odd, planes, q.flip(0)):
        assert all(map(torch.equal, rotary(q, x, *low), (TURNED(q, *turn), TURNED(x, *turn))))
        assert all(map(torch.equal, rotary(x, q, *low), (TURNED(x, *turn), TURNED(q, *turn))))


def test_nothing_is_read_or_written_beyond_the_tokens():
    num, heads, width = 19, 2, 72
    whole = projected(num + 8, heads, width)
    q, k, cos, sin = (x[:num] for x in whole)
    for x in whole:
        x[num:] = torch.nan
    assert not any(x.isnan().any() for x in rotary(q, k, cos, sin))


def test_gradients_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(api, "_turned", TURNED)
    q, k, cos, sin = projected(5, 2, 8)
    found, _ = rotary(q.requires_grad_(), k, cos, sin)
    assert found.requires_grad
    with torch.no_grad():
        assert rotary(q, k, cos, sin)[0].is_contiguous()


def test_no_tokens_are_no_launch():
    assert [x.shape for x in rotary(*projected(0, 2, 8))] == [(2, 0, 8)] * 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_fused_tower_runs_the_kernel(name, monkeypatch):
    # The host's convolution takes TF32 by default, the matrix product in its place does not.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = tiny_llm.build(name).to(DEVICE)
    inputs = {key: x.to(DEVICE) for key, x in tiny_llm.prompt(name, [[2]]).items()}
    with torch.inference_mode():
        host = model(**inputs).logits
        with fuse_vision(model) as fusion:
            assert "rotary embedding" in str(fusion)
            torch.testing.assert_close(model(**inputs).logits, host, rtol=0, atol=1e-4)
