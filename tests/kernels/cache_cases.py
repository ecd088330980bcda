"""The kernel that restores a cache against plain torch; run by test_attention_triton.py."""

import os

import pytest
import torch

from tubelet.kernels.cache import PackedChunk, storage
from tubelet.kernels.triton_support import unavailable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def restored(chunk: PackedChunk, like: torch.Tensor, fused: bool, monkeypatch) -> torch.Tensor:
    """[2, B, H, n + 3, D] keys and values between others that stay as they are."""
    batch, heads, num, channels = chunk.shape
    whole = like.new_full((2, batch, heads, num + 3, channels), 7.0)
    with monkeypatch.context() as patch:
        if fused:
            # Falling back to plain torch would make the comparison empty.
            assert unavailable(like.device) is None
            patch.setattr(storage.Quantized, "restore", None)
        else:
            patch.setattr(storage, "unavailable", lambda device: "not here")
        chunk.restore_into(*whole[:, :, :, 1 : 1 + num])
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("channels", [8, 20, 128])
@pytest.mark.parametrize("num", [1, 70, 200])
def test_tokens_of_mixed_precision_are_restored_to_their_columns(num, channels, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(num)
    keys, values = torch.randn(2, 2, 3, num + 4, channels, generator=generator).to(DEVICE, dtype)
    columns = [torch.arange(4, num + 4), torch.arange(num + 4)]
    choices = torch.tensor([2, 4, 8, 16])
    bits = [choices[torch.randint(0, 4, (len(c),), generator=generator)] for c in columns]
    chunk = PackedChunk.of(
        keys, values, [c.to(DEVICE) for c in columns], [b.to(DEVICE) for b in bits]
    )
    have = restored(chunk, keys, True, monkeypatch)
    want = restored(chunk, keys, False, monkeypatch)
    # A product and a sum in one step may round to the neighbour.
    torch.testing.assert_close(have, want)
    assert bool((have[:, 0, :, 1:5] == 0).all())
    assert bool((have[:, :, :, [0, -2, -1]] == 7).all())
