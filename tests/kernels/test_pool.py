"""Block means against a loop over blocks."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.kernels.pool import block_means

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


@SETTINGS
@given(st.data())
def test_means_of_the_real_tokens_of_each_block(data):
    total, block = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 45))
    num = data.draw(st.integers(1, total))
    orders = data.draw(st.sampled_from([None, 1, 3]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    x = torch.randn(2, total, 3, 5).transpose(1, 2)
    order = None if orders is None else torch.stack([torch.randperm(total) for _ in range(orders)])
    places = torch.arange(total)[None] if order is None else order
    for head in range(3):
        x[:, head, places[head % len(places), num:]] = torch.nan
    means = block_means(x, block, order, num)
    assert means.shape == (2, 3, -(-num // block), 5)
    for head in range(3):
        mine = x[:, head, places[head % len(places), :num]]
        want = torch.stack([part.mean(1) for part in mine.split(block, dim=1)], dim=1)
        torch.testing.assert_close(means[:, head], want, atol=1e-6, rtol=0)


def test_sums_are_kept_in_float32():
    x = torch.full((1, 1, 4096, 1), 1.0, dtype=torch.bfloat16)
    x[:, :, ::2] = 3.0
    means = block_means(x, 4096)
    assert means.dtype == torch.float32
    assert means.item() == 2.0


@pytest.fixture
def untyped():
    """Own messages instead of shape checking."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "block >= 1"),
        ((4, None, 0), r"num in 1\.\.9"),
        ((4, None, 10), r"num in 1\.\.9"),
        ((4, torch.zeros(1, 8, dtype=torch.int64)), r"order is \(1, 8\)"),
        ((4, torch.zeros(3, 9, dtype=torch.int64)), r"order is \(3, 9\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(untyped, arguments, message):
    with pytest.raises(ShapeError, match=message):
        block_means(torch.zeros(1, 2, 9, 4), *arguments)


def test_named_implementations_are_never_replaced():
    x = torch.zeros(1, 2, 9, 4)
    with pytest.raises(UnsupportedError, match="'triton' cannot run this"):
        block_means(x, 4, impl="triton")
    with pytest.raises(UnsupportedError, match="use one of auto, triton, reference"):
        block_means(x, 4, impl="fast")
