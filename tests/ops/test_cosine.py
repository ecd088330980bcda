"""Products and cosines by parts against one product of everything in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.ops import cosine as cosine_module
from tubelet.ops.cosine import cosine, cosines, inverse_length, products
from tubelet.ops.density import density_peaks

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 99), st.data())
def test_cosines_are_those_of_the_whole_table_row_after_row(num, others, seed, data):
    a, b = 3 * random(2, num, 4, seed=seed), random(2, others, 4, seed=seed + 1)
    a[0, 0] = 0
    rows = data.draw(st.none() | st.integers(1, 10))
    starts, parts = zip(*cosines(a, b, rows), strict=True)
    assert list(starts) == list(range(0, num, rows or num))
    wanted = F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).mT
    torch.testing.assert_close(torch.cat(parts, 1), wanted.float(), atol=1e-6, rtol=0)
    assert not parts[0][0, 0].any(), "a zero vector is like nothing"


def test_cosines_hold_no_more_than_a_part_at_once(monkeypatch):
    monkeypatch.setattr(cosine_module, "PART", 100)
    sizes = [part.numel() for _, part in cosines(random(2, 40, 3), random(2, 10, 3))]
    assert sizes == [100] * 8
    assert sum(len(part[0]) for _, part in cosines(random(1, 4, 3), random(1, 300, 3))) == 4


@pytest.mark.parametrize("part", [1, 7, 2**23])
def test_cosine_is_that_of_each_pair(part, monkeypatch):
    monkeypatch.setattr(cosine_module, "PART", part)
    a, b = random(3, 5, 4), random(3, 5, 4, seed=1).bfloat16()
    a[1, 2] = 0
    torch.testing.assert_close(cosine(a, b), F.cosine_similarity(a, b.float(), dim=-1))
    torch.testing.assert_close(cosine(a, b[0, 0]), F.cosine_similarity(a, b[0, 0].float(), dim=-1))


def test_half_precision_is_added_up_in_float32():
    ones = torch.ones(1, 2, 5000, dtype=torch.bfloat16)
    assert products(ones, ones).tolist() == [[[5000.0] * 2] * 2]
    assert inverse_length(300 * torch.ones(1, 16, dtype=torch.float16)).item() == pytest.approx(
        1 / 1200
    )
    assert inverse_length(torch.zeros(2, 3)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_multiplies_half_precision_without_rounding_the_products(dtype):
    a, b = random(3, 70, 256).to("cuda", dtype), random(3, 50, 256, seed=1).to("cuda", dtype)
    found = products(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (a.double() @ b.double().mT).float(), atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_density_peaks_of_half_precision_are_those_of_the_same_numbers_in_float32():
    x = random(4, 128, 256).to("cuda", torch.bfloat16)
    valid = torch.rand(4, 128, device="cuda") < 0.8
    found, wanted = density_peaks(x, 5, valid=valid), density_peaks(x.float(), 5, valid=valid)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
