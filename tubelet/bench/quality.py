"""How far a clip is from its reference, and how alive and sharp it is; needs no weights.

Clips are [B, T, 3, H, W] in [0, 1]; every measure returns one float64 value per clip (or per frame
where it says so), on the device of its input. Sums run in float64.

Fidelity (PSNR, SSIM, relative error) only means something between runs of one seed. Flicker falls
with motion, so read it with `motion_energy`; blur shows in `high_frequency_energy`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import ShapeError

PSNR_CAP = 100.0
"""dB given to equal frames, and the most that any frame gets."""

TAPS, SIGMA = 11, 1.5
"""Gaussian window of SSIM."""

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
"""Constants of SSIM at a data range of 1."""


def psnr_frames(
    clip: Float[Tensor, "b t 3 h w"], reference: Float[Tensor, "b t 3 h w"]
) -> Float[Tensor, "b t"]:
    """Peak signal-to-noise ratio of each frame in dB, data range 1, at most 100.

    Raises:
        ShapeError: The clips differ in shape, are not clips, or hold NaN or infinity.
    """
    _check_pair(clip, reference)
    error = (clip.double() - reference.double()).square().mean(dim=(2, 3, 4))
    return (-10 * error.clamp(min=10 ** (-PSNR_CAP / 10)).log10()).clamp(max=PSNR_CAP)


def psnr(
    clip: Float[Tensor, "b t 3 h w"], reference: Float[Tensor, "b t 3 h w"]
) -> Float[Tensor, "b"]:
    """Mean over frames of `psnr_frames`: per frame, then mean, as video papers do."""
    return psnr_frames(clip, reference).mean(1)


def ssim_frames(
    clip: Float[Tensor, "b t 3 h w"], reference: Float[Tensor, "b t 3 h w"]
) -> Float[Tensor, "b t"]:
    """Structural similarity of each frame in [-1, 1]: per channel, then mean.

    Gaussian window of 11 taps, sigma 1.5, at the places where it fits whole; data range 1;
    population variances.

    Raises:
        ShapeError: As for `psnr_frames`, or a frame smaller than the window.

    Source:
        Wang et al., 2004, doi:10.1109/TIP.2003.819861.
    """
    _check_pair(clip, reference)
    if min(clip.shape[3:]) < TAPS:
        raise ShapeError(f"SSIM needs frames of at least {TAPS} x {TAPS}, got {clip.shape[3:]}")
    # One clip at a time: the five maps in float64 would be forty times the clip.
    parts = [_ssim(a.double(), b.double()) for a, b in zip(clip, reference, strict=True)]
    return torch.stack(parts)


def ssim(
    clip: Float[Tensor, "b t 3 h w"], reference: Float[Tensor, "b t 3 h w"]
) -> Float[Tensor, "b"]:
    """Mean over frames of `ssim_frames`."""
    return ssim_frames(clip, reference).mean(1)


def relative_error(value: Float[Tensor, "b ..."], reference: Float[Tensor, "b ..."]) -> Tensor:
    """||value - reference|| / ||reference|| of each sample, Euclidean, of latents or velocities.

    0 where both are zero, infinite where only the reference is.

    Raises:
        ShapeError: The shapes differ.
    """
    a, b = _flat_pair(value, reference)
    error, norm = (a - b).norm(dim=1), b.norm(dim=1)
    return torch.where(error == 0, torch.zeros_like(error), error / norm)


def cosine(value: Float[Tensor, "b ..."], reference: Float[Tensor, "b ..."]) -> Tensor:
    """Cosine of the angle between each sample and its reference; 0 if one of them is zero.

    Raises:
        ShapeError: The shapes differ.
    """
    a, b = _flat_pair(value, reference)
    scale = a.norm(dim=1) * b.norm(dim=1)
    product = (a * b).sum(1)
    return torch.where(scale > 0, product / scale, torch.zeros_like(scale)).clamp(-1, 1)


def motion_energy(clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b"]:
    """Mean absolute difference between successive frames, in [0, 1] for pixels in [0, 1].

    Raises:
        ShapeError: Not a finite clip of at least 2 frames.
    """
    _check_clip(clip)
    if clip.shape[1] < 2:
        raise ShapeError("motion needs at least 2 frames, got 1")
    return clip.double().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def flicker(clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b"]:
    """Temporal flickering score, (255 - mean absolute frame difference of bytes) / 255; 1 is still.

    Source:
        VBench (Huang et al., 2023, arXiv:2311.17982), without rounding to bytes.
    """
    return 1 - motion_energy(clip)


def high_frequency_energy(clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b"]:
    """Mean square of the 5-point Laplacian, per channel, in the interior of the frames.

    Raises:
        ShapeError: Not a finite clip, or frames below 3 x 3.
    """
    _check_clip(clip)
    if min(clip.shape[3:]) < 3:
        raise ShapeError(f"a Laplacian needs frames of at least 3 x 3, got {clip.shape[3:]}")
    x = clip.double()
    sides = x[..., 1:-1, :-2] + x[..., 1:-1, 2:] + x[..., :-2, 1:-1] + x[..., 2:, 1:-1]
    return (sides - 4 * x[..., 1:-1, 1:-1]).square().mean(dim=(1, 2, 3, 4))


@dataclass(frozen=True)
class Fidelity:
    """Measures of clips against their references; each holds one float64 value per clip."""

    psnr: Tensor
    """dB, mean over frames."""

    psnr_worst: Tensor
    """dB of the worst frame."""

    psnr_low: Tensor
    """dB, 5th percentile over frames, interpolated."""

    ssim: Tensor
    relative_error: Tensor
    flicker: Tensor
    """Score of the clip minus that of the reference: above 0 is stiller."""

    motion_ratio: Tensor
    """Motion energy over that of the reference; 1 if neither moves."""

    sharpness_ratio: Tensor
    """High-frequency energy over that of the reference; below 1 is blurred."""


def fidelity(clip: Float[Tensor, "b t 3 h w"], reference: Float[Tensor, "b t 3 h w"]) -> Fidelity:
    """All measures at once, for clips of at least 2 frames of 11 x 11.

    Raises:
        ShapeError: As for the single measures.
    """
    frames = psnr_frames(clip, reference)
    return Fidelity(
        psnr=frames.mean(1),
        psnr_worst=frames.amin(1),
        psnr_low=frames.quantile(0.05, dim=1),
        ssim=ssim(clip, reference),
        relative_error=relative_error(clip, reference),
        flicker=flicker(clip) - flicker(reference),
        motion_ratio=_ratio(motion_energy(clip), motion_energy(reference)),
        sharpness_ratio=_ratio(high_frequency_energy(clip), high_frequency_energy(reference)),
    )


@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Float[Tensor, "n"],
    statistic: Callable[[Tensor], Tensor],
    seed: int,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a statistic of independent values.

    Pairs are compared by giving their differences.

    Args:
        values: One number per clip.
        statistic: Maps [..., n] to [...], such as `lambda x: x.mean(-1)`.
        seed: Of the resampling, from 0 on; the same on every machine.
        resamples: >= 1.
        level: Share of resamples inside the interval, in (0, 1).

    Raises:
        ShapeError: No values, NaN among them, or a number out of range.
    """
    if values.ndim != 1 or not len(values) or bool(values.isnan().any()):
        raise ShapeError(f"bootstrap needs a row of numbers, got {tuple(values.shape)} or NaN")
    if not 0 < level < 1 or resamples < 1:
        raise ShapeError(f"level must be in (0, 1), resamples >= 1: got {level}, {resamples}")
    values = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    spread = statistic(values[drawn])
    tail = (1 - level) / 2
    low, high = spread.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(statistic(values)), low, high)


def _ssim(a: Float[Tensor, "t 3 h w"], b: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "t"]:
    maps = torch.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, aa, bb, ab = _window(maps.flatten(0, 2)[:, None]).unflatten(0, maps.shape[:3])
    covariance = ab - mean_a * mean_b
    variances = (aa - mean_a.square()) + (bb - mean_b.square())
    light = (2 * mean_a * mean_b + SSIM_C1) / (mean_a.square() + mean_b.square() + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (light * structure).mean(dim=(1, 2, 3, 4))


def _window(x: Float[Tensor, "n 1 h w"]) -> Tensor:
    """Gaussian means over the windows that fit whole, rows after columns."""
    offset = torch.arange(TAPS, dtype=x.dtype, device=x.device) - TAPS // 2
    taps = torch.exp(-offset.square() / (2 * SIGMA**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x, taps[None, None, :, None]), taps[None, None, None, :])


def _ratio(value: Tensor, reference: Tensor) -> Tensor:
    still = (value == 0) & (reference == 0)
    return torch.where(still, torch.ones_like(value), value / reference)


def _flat_pair(value: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if value.shape != reference.shape or value.ndim < 2:
        raise ShapeError(
            f"need two equal shapes [batch, ...], got {tuple(value.shape)} and "
            f"{tuple(reference.shape)}"
        )
    return value.flatten(1).double(), reference.flatten(1).double()


def _check_pair(clip: Tensor, reference: Tensor) -> None:
    if clip.shape != reference.shape:
        raise ShapeError(
            f"clips must have one shape, got {tuple(clip.shape)} and {tuple(reference.shape)}"
        )
    _check_clip(clip)
    _check_clip(reference)


def _check_clip(clip: Tensor) -> None:
    if clip.ndim != 5 or clip.shape[2] != 3 or 0 in clip.shape or not clip.is_floating_point():
        raise ShapeError(
            "a clip must be floating point [batch, frames, 3, height, width], got "
            f"{clip.dtype} {tuple(clip.shape)}"
        )
    if not bool(clip.isfinite().all()):
        raise ShapeError("a clip holds NaN or infinity")
