"""Quality measures against slow float64 arithmetic, their ranges and their symmetries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.bench.quality import (
    PSNR_CAP,
    bootstrap,
    cosine,
    fidelity,
    flicker,
    high_frequency_energy,
    motion_energy,
    psnr,
    psnr_frames,
    relative_error,
    ssim,
    ssim_frames,
)
from tubelet.core.errors import ShapeError


def clip(seed, frames=3, size=(13, 14), batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, *size, generator=generator)


def slow_ssim(a, b):
    """SSIM of one channel by the definition: every window on its own."""
    taps = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = torch.tensor([[p * q for q in taps] for p in taps], dtype=torch.float64)
    weight = weight / weight.sum()
    total, count = 0.0, 0
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (c[y : y + 11, x : x + 11].double() for c in (a, b))
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            cov = (weight * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
            total += float(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
            count += 1
    return total / count


def test_ssim_is_its_definition():
    a = clip(0, frames=2)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    expected = [
        sum(slow_ssim(a[0, t, c], b[0, t, c]) for c in range(3)) / 3 for t in range(a.shape[1])
    ]
    found = ssim_frames(a, b)
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(a, b).item() == pytest.approx(sum(expected) / 2, abs=1e-9)


def test_psnr_is_per_frame_then_mean():
    a = torch.zeros(1, 2, 3, 4, 4)
    b = a.clone()
    b[0, 0] = 0.1
    b[0, 1] = 0.01
    assert psnr_frames(a, b)[0].tolist() == pytest.approx([20, 40])
    assert psnr(a, b).item() == pytest.approx(30)
    assert psnr(a, a).item() == PSNR_CAP == 100
    assert psnr(a, a + 1e-6).item() == PSNR_CAP


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.integers(1, 3))
def test_fidelity_is_symmetric_and_in_range(seed, noise, frames):
    a = clip(seed, frames)
    b = (a + noise * torch.randn_like(a)).clamp(0, 1)
    assert torch.equal(psnr_frames(a, b), psnr_frames(b, a))
    assert ((psnr_frames(a, b) >= 0) & (psnr_frames(a, b) <= PSNR_CAP)).all()
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    assert (ssim_frames(a, b).abs() <= 1 + 1e-12).all()
    torch.testing.assert_close(ssim(a, a), torch.ones(1, dtype=torch.float64))
    assert (cosine(a, b) <= 1).all()
    assert (high_frequency_energy(a) >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 10), st.floats(0.05, 0.9))
def test_relative_error_and_cosine_follow_their_scale(seed, factor, share):
    a = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    expected = torch.full((2,), abs(factor - 1), dtype=torch.float64)
    torch.testing.assert_close(relative_error(factor * a, a), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cosine(factor * a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(cosine(-a, a), -torch.ones(2, dtype=torch.float64))
    assert (relative_error(a + share * a.roll(1, 0), a) > 0).all()


def test_zero_vectors_have_a_meaning():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert relative_error(zero, zero).item() == 0
    assert relative_error(one, zero).item() == math.inf
    assert relative_error(zero, one).item() == 1
    assert cosine(zero, one).item() == 0


def test_motion_and_flicker_are_frame_differences():
    still = clip(0).expand(1, 3, 3, 13, 14)[:, :1].expand(-1, 4, -1, -1, -1)
    assert motion_energy(still).item() == 0
    assert flicker(still).item() == 1
    blinking = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 5, 5)
    assert motion_energy(blinking).item() == 1
    assert flicker(blinking).item() == 0
    ramp = torch.tensor([0.0, 0.1, 0.3]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 5, 5)
    assert motion_energy(ramp).item() == pytest.approx(0.15)


def test_high_frequencies_are_the_laplacian():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    plane = (0.03 * x + 0.05 * y).expand(1, 2, 3, 9, 9)
    assert high_frequency_energy(plane).item() < 1e-12
    bowl = (0.01 * x**2).expand(1, 2, 3, 9, 9)
    assert high_frequency_energy(bowl).item() == pytest.approx(0.02**2, rel=1e-4)
    checker = ((x + y) % 2).expand(1, 2, 3, 9, 9)
    assert high_frequency_energy(checker).item() == pytest.approx(16)


def test_blur_lowers_sharpness_and_a_freeze_lowers_motion():
    a = clip(1, frames=6, size=(16, 16), batch=2)
    soft = torch.nn.functional.avg_pool3d(a.transpose(1, 2), (1, 3, 3), 1, (0, 1, 1))
    soft = soft.transpose(1, 2)
    frozen = a[:, :1].expand_as(a)
    assert (fidelity(soft, a).sharpness_ratio < 0.3).all()
    assert (fidelity(frozen, a).motion_ratio == 0).all()
    assert (fidelity(frozen, a).flicker > 0.2).all()
    same = fidelity(a, a)
    for name in ("ssim", "motion_ratio", "sharpness_ratio"):
        torch.testing.assert_close(getattr(same, name), torch.ones(2, dtype=torch.float64))
    assert (same.psnr == PSNR_CAP).all()
    assert (same.relative_error == 0).all()
    assert (fidelity(frozen, frozen).motion_ratio == 1).all()


def test_the_worst_frame_and_the_low_end_are_kept():
    a = torch.zeros(1, 21, 3, 11, 11)
    b = a + 0.01
    b[0, 7] = 0.5
    b[0, 8] = 0.1
    found = fidelity(b, a)
    assert found.psnr_worst.item() == pytest.approx(20 * math.log10(2))
    # The 5th percentile of 21 frames is the second lowest.
    assert found.psnr_low.item() == pytest.approx(20, abs=1e-4)
    assert found.psnr.item() == pytest.approx((19 * 40 + 20 + 20 * math.log10(2)) / 21, abs=1e-3)


def test_clips_of_a_batch_do_not_meet():
    a, b = clip(0, batch=2), clip(1, batch=2)
    both, alone = fidelity(a, b), fidelity(a[1:], b[1:])
    for name in vars(both):
        torch.testing.assert_close(getattr(both, name)[1:], getattr(alone, name))


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        values = torch.randn(40, generator=generator) + 3
        found = bootstrap(values, lambda x: x.mean(-1), trial, resamples=400, level=0.9)
        assert found.low <= found.value <= found.high
        inside += found.low <= 3 <= found.high
    assert 0.82 <= inside / 200 <= 0.95


@pytest.mark.parametrize(("level", "width"), [(0.9, 1.645), (0.5, 0.674)])
def test_bootstrap_of_a_mean_is_as_wide_as_theory_says(level, width):
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = bootstrap(values, lambda x: x.mean(-1), 0, level=level)
    error = float(values.std()) / 20
    assert (found.high - found.low) / 2 / error == pytest.approx(width, rel=0.08)


def test_bootstrap_repeats_and_takes_any_statistic():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])

    def median(x):
        return x.median(-1).values

    first = bootstrap(values, median, 5)
    assert first == bootstrap(values, median, 5)
    assert first.value == 3
    assert 1 <= first.low < 3 < first.high <= 100
    lone = bootstrap(torch.tensor([2.0]), median, 0)
    assert (lone.low, lone.value, lone.high) == (2, 2, 2)


def test_what_cannot_be_compared_is_refused():
    a = clip(0)
    for measure in (psnr, ssim, fidelity):
        with pytest.raises(ShapeError, match="one shape"):
            measure(a, a[:, :2])
        with pytest.raises(ShapeError, match="NaN or infinity"):
            measure(a, a.clone().fill_(torch.nan))
        with pytest.raises(ShapeError, match="floating point"):
            measure(a[0], a[0])
    for measure in (motion_energy, flicker):
        with pytest.raises(ShapeError, match="2 frames"):
            measure(a[:, :1])
    with pytest.raises(ShapeError, match="11 x 11"):
        ssim(a[..., :10], a[..., :10])
    with pytest.raises(ShapeError, match="3 x 3"):
        high_frequency_energy(a[..., :2])
    with pytest.raises(ShapeError, match="equal shapes"):
        relative_error(a, a[:, :1])
    for values in (torch.tensor([]), torch.tensor([1.0, torch.nan]), torch.ones(2, 2)):
        with pytest.raises(ShapeError, match="row of numbers"):
            bootstrap(values, lambda x: x.mean(-1), 0)
    with pytest.raises(ShapeError, match="level must be"):
        bootstrap(torch.ones(3), lambda x: x.mean(-1), 0, level=1.0)
