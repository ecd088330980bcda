"""Flow matching: what a video diffusion transformer is trained on and how clips are drawn from it.

Straight paths x_t = (1 - t) noise + t data, t from 0 (noise) to 1 (data); the velocity along one
is data - noise = (data - x_t) / (1 - t). Networks predict the clean clip (see `tubelet.nn.dit`),
in [-1, 1]; pixels on the outside are in [0, 1].

Sources: Flow Matching (Lipman et al., 2022, arXiv:2210.02747), Rectified Flow (Liu et al., 2022,
arXiv:2209.03003); logit-normal times and the shift by resolution (Esser et al., 2024,
arXiv:2403.03206); classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.nn.dit import check_attributes, count_tokens

SHIFT = 10.0
"""Times are moved towards noise by this: a clip has so many alike pixels that its layout is
decided while a single pixel still is mostly noise."""

NEAREST = 0.05
"""Smallest 1 - t that the training loss divides by."""

METHODS = {"euler": 1, "midpoint": 2}
"""Samplers, with the velocities that each computes per step."""

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


def interpolate(
    data: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], time: Float[Tensor, "b"]
) -> Float[Tensor, "b ..."]:
    """x_t = (1 - t) noise + t data, with one time for each sample."""
    time = time.reshape(-1, *[1] * (data.ndim - 1))
    return torch.lerp(noise, data, time.to(data.dtype))


def sample_times(
    batch: int, generator: torch.Generator, shift: float = SHIFT
) -> Float[Tensor, "b"]:
    """Training times in (0, 1): the logistic of a standard normal, shifted towards noise.

    Args:
        batch: How many.
        generator: Source of randomness; its device is that of the result.
        shift: > 0; the median of 1 - t is shift / (1 + shift).
    """
    normal = torch.randn(batch, generator=generator, device=generator.device)
    return 1 - shifted(torch.sigmoid(normal), shift)


def shifted(noise_level: Tensor, shift: float) -> Tensor:
    """Move noise levels 1 - t in [0, 1] up (shift > 1) or down (< 1); both ends stay."""
    return shift * noise_level / (1 + (shift - 1) * noise_level)


def training_loss(
    model: nn.Module,
    pixels: Float[Tensor, "b t 3 h w"],
    attributes: Int[Tensor, "b a"],
    generator: torch.Generator,
    *,
    drop: float = 0.1,
    shift: float = SHIFT,
) -> Float[Tensor, ""]:
    """Mean squared error of the velocity at random times and noises.

    Nothing waits for the device, so values are not checked.

    Args:
        model: Called as model(noisy, time, attributes); predicts the clean clip in [-1, 1].
        pixels: Clips in [0, 1].
        attributes: int64 values of each attribute.
        generator: Source of randomness, on the device of `pixels`.
        drop: Share of clips whose attributes are all dropped, in [0, 1]; guidance needs some.
        shift: Towards noise, > 0; see `SHIFT`.

    Returns:
        float32 scalar. The velocity divides by 1 - t; below 0.05 by 0.05, in target and
        prediction alike, so that the cleanest clips do not outweigh all others.

    Raises:
        ShapeError: `drop` or `shift` is out of range, or the generator is on another device.
    """
    if not 0 <= drop <= 1 or not 0 < shift < math.inf:
        raise ShapeError(f"drop must be in [0, 1] and shift > 0, got {drop} and {shift}")
    if generator.device.type != pixels.device.type:
        raise ShapeError(f"the generator is on {generator.device}, the pixels on {pixels.device}")
    clean = 2 * pixels.float() - 1
    time = sample_times(len(clean), generator, shift)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    dropped = torch.rand(len(clean), 1, generator=generator, device=clean.device) < drop
    predicted = model(interpolate(clean, noise, time), time, attributes.masked_fill(dropped, -1))
    error = (predicted.float() - clean).square().mean(dim=(1, 2, 3, 4))
    return (error / (1 - time).clamp(min=NEAREST).square()).mean()


def time_grid(steps: int, shift: float = SHIFT) -> list[float]:
    """steps + 1 times from 0 to 1, denser near noise the larger the shift.

    Raises:
        UnsupportedError: `steps` < 1, or `shift` is not positive.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UnsupportedError(f"steps must be a whole number from 1 on, got {steps!r}")
    if not 0 < shift < math.inf:
        raise UnsupportedError(f"shift must be a positive number, got {shift}")
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (1 - shifted(levels, shift)).tolist()


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    method: str = "euler",
    callback: Callback | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) along a grid of times.

    Args:
        velocity: Called with x and t as a scalar tensor in x's dtype, on the CPU.
        x: State at times[0].
        times: Ascending; the velocity is never asked for at the last one.
        method: "euler", first order, one velocity per step; "midpoint", second order, two.
        callback: Called after each step with its number from 0, the new state and the velocity
            that the step used.

    Raises:
        UnsupportedError: The method is unknown.
    """
    if method not in METHODS:
        raise UnsupportedError(f"unknown sampler {method!r}; use one of {', '.join(METHODS)}")
    for step, (now, then) in enumerate(pairwise(times)):
        v = velocity(x, torch.tensor(now, dtype=x.dtype))
        if method == "midpoint":
            middle = x + (then - now) / 2 * v
            v = velocity(middle, torch.tensor((now + then) / 2, dtype=x.dtype))
        x = x + (then - now) * v
        if callback is not None:
            callback(step, x, v)
    return x


def clip_noise(
    batch: int, shape: Sequence[int], seed: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "b ..."]:
    """Standard normal noise, the same on every device; sample i is that of seed + i alone."""
    parts = [torch.randn(*shape, generator=_seeded(seed + i)) for i in range(batch)]
    return torch.stack(parts).to(device)


@torch.no_grad()
def generate(
    model: nn.Module,
    attributes: Int[Tensor, "b a"],
    *,
    seed: int,
    steps: int = 20,
    method: str = "euler",
    guidance: float = 2.0,
    shift: float = SHIFT,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "b t 3 h w"]:
    """Draw clips with the given attributes.

    Args:
        model: A `VideoDiT`, or anything with its `config` and call; set to eval() by the caller.
        attributes: int64 values of each attribute, -1 for dropped.
        seed: In [0, 2**63); clip i starts from the noise of seed + i, the same on every device.
        steps: Steps of the sampler, >= 1.
        method: "euler" (one model call per step) or "midpoint" (two).
        guidance: >= 0, how far past the unconditional prediction to go; 1 is the model itself and
            skips the unconditional branch. Otherwise both branches run as one batch, first all
            clips with attributes, then all without.
        shift: Of the time grid towards noise, > 0; best the one of the training.
        frames: Of the clips; default is the model's.
        size: (height, width) in pixels; default is the model's.
        dtype: Autocast the model to this, such as torch.bfloat16; None leaves it as it is. The
            state of the sampler is float32 always.
        device: Where to run; default is where the model is.
        callback: Called after each step with its number, the state in [-1, 1] and the velocity.

    Returns:
        float32 pixels in [0, 1], clamped, on `device`.

    Raises:
        UnsupportedError: Unknown method, or steps, guidance, shift or seed out of range.
        ShapeError: Attributes out of range or of the wrong shape, a clip that is not whole
            patches, or a model that returned values that are not finite.
    """
    weights = next(model.parameters(), None)
    home = weights.device if weights is not None else attributes.device
    device = torch.device(home if device is None else device)
    check_attributes(attributes, model.config.attributes)
    times = _checked_grid(steps, method, guidance, shift, seed)
    frames = model.config.frames if frames is None else frames
    height, width = model.config.size if size is None else size
    count_tokens((frames, height, width), model.config.patch)
    x = clip_noise(len(attributes), (frames, 3, height, width), seed, device)
    values = _both_branches(attributes.to(device), guidance)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return (_predict(model, x, time, values, guidance, dtype) - x) / (1 - time)

    x = integrate(velocity, x, times, method, callback)
    if not bool(x.isfinite().all()):
        raise ShapeError("the model returned values that are not finite; check its weights")
    return ((x + 1) / 2).clamp(0, 1)


def _predict(
    model: nn.Module,
    x: Tensor,
    time: Tensor,
    values: Tensor,
    guidance: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """The clean clip, guided; the velocity is affine in it, so guiding either is the same."""
    both = len(values) > len(x)
    state = torch.cat([x, x]) if both else x
    times = time.to(x.device).expand(len(state))
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        clean = model(state, times, values).float()
    if not both:
        return clean
    conditional, unconditional = clean.chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


def _both_branches(attributes: Tensor, guidance: float) -> Tensor:
    if guidance == 1:
        return attributes
    return torch.cat([attributes, torch.full_like(attributes, -1)])


def _checked_grid(steps: int, method: str, guidance: float, shift: float, seed: int) -> list[float]:
    if method not in METHODS:
        raise UnsupportedError(f"unknown sampler {method!r}; use one of {', '.join(METHODS)}")
    if not 0 <= guidance < math.inf:
        raise UnsupportedError(f"guidance must be a finite number from 0 on, got {guidance}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UnsupportedError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
    return time_grid(steps, shift)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
