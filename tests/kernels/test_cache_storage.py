"""Codes of a few bits, and stretches of a key-value cache in mixed precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.kernels.cache import PackedChunk, RawChunk, pack_codes, quantize, unpack_codes

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


@SETTINGS
@given(st.sampled_from([2, 4, 8]), st.integers(1, 19), st.integers(0, 99))
def test_codes_come_back_from_as_few_bytes_as_they_take(bits, num, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, num), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, -(-num * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, num), codes)


def test_the_first_code_is_in_the_lowest_bits():
    codes = torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [1 + 2 * 4 + 3 * 16, 2]


@SETTINGS
@given(
    st.sampled_from([2, 4, 8]),
    st.integers(0, 1),
    st.integers(0, 99),
    st.sampled_from([1e-3, 1, 1e4]),
)
def test_numbers_are_rounded_to_the_nearest_of_evenly_spaced_levels(bits, dim, seed, size):
    x = size * torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    found = quantize(x, bits, dim)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    steps = torch.arange(2**bits) / (2**bits - 1)
    levels = low[..., None] + (high - low)[..., None] * steps
    nearest = (x[..., None] - levels).abs().amin(-1)
    assert bool(((found.restore() - x).abs() <= nearest + 1e-5 * size).all())
    assert found.packed.nbytes == x.shape[0] * -(-6 * bits // 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_are_held_in_the_dtype_and_codes_know_it(dtype):
    x = (10 + torch.randn(64, 8)).to(dtype)
    found = quantize(x, 4, 0)
    assert found.scale.dtype == found.low.dtype == dtype
    half = found.scale.float() / 2
    # The lowest level and the last one may have moved by the rounding of scale and low.
    slack = 15 * found.scale.float() * 2**-8 + found.low.float().abs() * 2**-8
    assert bool(((found.restore() - x.float()).abs() <= half + slack).all())


def test_equal_numbers_come_back_exactly():
    x = torch.full((3, 4), 0.7)
    assert torch.equal(quantize(x, 2, 1).restore(), x)


def test_odd_bits_are_refused():
    for call in (
        lambda: pack_codes(torch.zeros(2).byte(), 3),
        lambda: quantize(torch.ones(2), 5, 0),
    ):
        with pytest.raises(ShapeError, match="2, 4, 8 bits"):
            call()


def cache(seed: int = 0, batch: int = 2, num: int = 12, channels: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, num, channels, generator=generator) for _ in range(2)]


def restored(chunk, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Keys and values of a chunk, between others of a cache."""
    batch, heads, num, channels = chunk.shape
    whole = [torch.full((batch, heads, num + 5, channels), 7.0, dtype=dtype) for _ in range(2)]
    places = [x[:, :, 2 : 2 + num] for x in whole]
    chunk.restore_into(*places)
    assert all(bool((x[:, :, [0, 1, -3, -2, -1]] == 7).all()) for x in whole)
    return places


def by_hand(keys: torch.Tensor, values: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """One head of one prompt's group [n, D]."""
    most, keys, values = 2**bits - 1, keys.clone(), values.clone()
    for c in range(keys.shape[1]):
        low, high = keys[:, c].min(), keys[:, c].max()
        step = (high - low) / most
        keys[:, c] = ((keys[:, c] - low) / step).round() * step + low
    norm = values.abs().amax(0).sqrt()
    even = values / norm
    for t in range(len(values)):
        low, high = even[t].min(), even[t].max()
        step = (high - low) / most
        even[t] = ((even[t] - low) / step).round() * step + low
    return keys, even * norm


def test_keys_are_quantised_by_channel_and_values_by_token_behind_the_channels_norm():
    keys, values = cache()
    values[:, :, :, 3] *= 50
    bits = torch.tensor([4, 2, 4, 16, 2, 4, 8, 8, 4, 2, 16, 8])
    found = PackedChunk.of(keys, values, [torch.arange(12)] * 2, [bits, None])
    found = restored(found)
    for number in (2, 4, 8):
        own = bits == number
        for head in range(3):
            wanted = by_hand(keys[0, head, own], values[0, head, own], number)
            for one, other in zip(found, wanted, strict=True):
                assert torch.allclose(one[0, head, own], other, atol=1e-4)
    for one, other in zip(found, (keys, values), strict=True):
        assert torch.equal(one[0][:, bits == 16], other[0][:, bits == 16])
        assert torch.equal(one[1], other[1])


def test_padding_is_neither_read_nor_held():
    keys, values = cache()
    every = torch.arange(12)
    keys[0, :, :5], values[0, :, :5] = torch.nan, torch.nan
    seven, twelve = torch.full((7,), 4), torch.full((12,), 4)
    chunk = PackedChunk.of(keys, values, [every[5:], every], [seven, twelve])
    alone = PackedChunk.of(keys[:1, :, 5:], values[:1, :, 5:], [every[:7]], [seven])
    for one, other in zip(restored(chunk), restored(alone), strict=True):
        assert torch.equal(one[0, :, 5:], other[0])
        assert bool((one[0, :, :5] == 0).all())
    other = PackedChunk.of(keys[1:], values[1:], [every], [twelve])
    assert chunk.nbytes() == alone.nbytes() + other.nbytes()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.157), (4, 0.283), (8, 0.536)])
def test_bytes_are_those_of_the_tensors_held(bits, share):
    keys, values = (x.bfloat16() for x in cache(batch=1, num=1000, channels=128))
    chunk = PackedChunk.of(keys, values, [torch.arange(1000)], [torch.full((1000,), bits)])
    codes = 2 * 3 * 1000 * 128 * bits // 8
    # Two numbers per channel of the keys, two per token of the values, one per channel of these,
    # and where each token stands.
    levels = 2 * (2 * 3 * 128 + 2 * 3 * 1000 + 3 * 128) + 4 * 1000
    assert chunk.nbytes() == codes + levels
    dense = RawChunk(keys=keys, values=values)
    assert dense.nbytes() == 2 * 3 * 1000 * 128 * 2
    assert chunk.nbytes() / dense.nbytes() < share
    assert restored(chunk, torch.bfloat16)[0].dtype == torch.bfloat16
