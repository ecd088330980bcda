"""Packed samples attend to themselves only."""

import pytest
import torch

from tubelet.core.errors import ShapeError
from tubelet.kernels.attention import attention, packed_attention

DEVICES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    pytest.param(("cuda", torch.float32), marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("where", DEVICES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [64, 20])
def test_packed_attention_equals_one_call_per_sample(where, biased: bool, width: int) -> None:
    device, dtype = where
    lengths = [7, 1, 150, 33]
    q, k, v = (torch.randn(1, 3, sum(lengths), width, device=device, dtype=dtype) for _ in "qkv")
    bias = torch.randint(1, 500, (1, sum(lengths)), device=device).log() if biased else None
    out, lse = packed_attention(q, k, v, lengths, scale=0.2, key_bias=bias)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        wanted, wanted_lse = attention(
            *(x[:, :, rows].double() for x in (q, k, v)),
            scale=0.2,
            key_bias=None if bias is None else bias[:, rows],
            impl="reference",
        )
        bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out[:, :, rows].double(), wanted, atol=bound, rtol=bound)
        torch.testing.assert_close(lse[:, :, rows].double(), wanted_lse, atol=bound, rtol=bound)
        start += length


def test_poison_stays_in_its_sample() -> None:
    q = torch.randn(1, 2, 12, 8)
    q[:, :, 5:] = torch.nan
    out, _ = packed_attention(q, q, q, [5, 7], scale=1.0)
    assert out[:, :, :5].isfinite().all()


@pytest.mark.parametrize("lengths", [[5, 6], [5, 0, 7], [13]])
def test_lengths_must_fill_the_tokens(lengths: list[int]) -> None:
    q = torch.randn(1, 2, 12, 8)
    with pytest.raises(ShapeError, match="lengths"):
        packed_attention(q, q, q, lengths, scale=1.0)
