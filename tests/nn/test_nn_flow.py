"""Flow matching: paths, loss, samplers, guidance, seeds."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.flow import (
    clip_noise,
    generate,
    integrate,
    interpolate,
    sample_times,
    time_grid,
    training_loss,
)

CONFIG = VideoDiTConfig(width=16, depth=1, heads=1, patch=(1, 4, 4), frames=2, size=(8, 8))
WANTED = torch.tensor([[0, 1, 2, 3, 1], [4, 5, 7, 0, 0]])


class Known(nn.Module):
    """Predicts one clip where attributes are given and another where they are dropped."""

    def __init__(self, conditional=0.6, unconditional=-0.2):
        super().__init__()
        self.config, self.calls = CONFIG, []
        self.answers = conditional, unconditional

    def forward(self, noisy, time, attributes):
        self.calls.append((noisy.shape[0], time.tolist(), attributes.clone()))
        conditional, unconditional = self.answers
        told = (attributes >= 0).all(1)[:, None, None, None, None]
        return torch.where(told, conditional, unconditional).expand_as(noisy).to(noisy.dtype)


def stirred():
    model = VideoDiT(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def test_paths_go_from_noise_to_data():
    data, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    found = interpolate(data, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(found[0], noise[0])
    torch.testing.assert_close(found[1], 0.75 * noise[1] + 0.25 * data[1])
    torch.testing.assert_close(found[2], data[2])


def test_training_times_are_logit_normal_and_shifted_towards_noise():
    generator = torch.Generator().manual_seed(0)
    plain = sample_times(20_000, generator, shift=1.0)
    assert abs(plain.logit().mean()) < 0.03
    assert abs(plain.logit().std() - 1) < 0.03
    moved = sample_times(20_000, generator, shift=4.0)
    # On the logit scale a shift is a translation.
    assert abs(moved.logit().mean() + math.log(4.0)) < 0.03
    assert moved.min() > 0
    assert moved.max() < 1


def test_the_loss_is_the_error_of_the_velocity():
    seen = {}

    def model(noisy, time, attributes):
        seen.update(noisy=noisy, time=time, attributes=attributes)
        return torch.zeros_like(noisy)

    pixels = torch.rand(64, 2, 3, 8, 8)
    attributes = torch.zeros(64, 5, dtype=torch.long)
    loss = training_loss(model, pixels, attributes, torch.Generator().manual_seed(1), shift=0.2)
    clean, time = 2 * pixels - 1, seen["time"][:, None, None, None, None]
    noise = (seen["noisy"] - time * clean) / (1 - time)
    near = (1 - time) < 0.05
    assert near.any()
    velocity = torch.where(near, (clean - seen["noisy"]) / 0.05, clean - noise)
    predicted = (0 - seen["noisy"]) / (1 - time).clamp(min=0.05)
    torch.testing.assert_close(loss, (velocity - predicted).square().mean(), rtol=1e-3, atol=1e-3)


def test_the_exact_clip_costs_nothing():
    pixels = torch.rand(3, 2, 3, 8, 8)
    loss = training_loss(
        lambda *_: 2 * pixels - 1, pixels, WANTED[[0, 0, 1]], torch.Generator().manual_seed(0)
    )
    assert loss == 0


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_whole_rows_of_attributes_are_dropped(drop):
    seen = []

    def model(noisy, time, attributes):
        seen.append(attributes)
        return noisy

    pixels = torch.rand(400, 1, 3, 4, 4)
    attributes = torch.ones(400, 5, dtype=torch.long)
    training_loss(model, pixels, attributes, torch.Generator().manual_seed(0), drop=drop)
    gone = seen[0] == -1
    assert torch.equal(gone.all(1), gone.any(1))
    assert abs(gone[:, 0].float().mean() - drop) < 0.06
    assert (attributes == 1).all()


def test_the_loss_repeats_with_its_generator():
    pixels, model = torch.rand(2, 2, 3, 8, 8), stirred()
    losses = [
        training_loss(model, pixels, WANTED, torch.Generator().manual_seed(seed)).item()
        for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_time_grids_end_at_both_ends_and_crowd_near_noise():
    even = time_grid(5, 1.0)
    assert even == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    shifted = time_grid(5, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    # sigma' = 3 sigma / (1 + 2 sigma) at sigma = 0.8
    assert shifted[1] == pytest.approx(1 - 2.4 / 2.6)
    steps = [b - a for a, b in pairwise(shifted)]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_samplers_have_their_order(method, order):
    # dx/dt = x cos(t), x(0) = 1 has the solution exp(sin t).
    def velocity(x, t):
        return x * t.cos()

    errors = []
    for steps in (64, 128, 256):
        times = [i / steps for i in range(steps + 1)]
        found = integrate(velocity, torch.ones(1, dtype=torch.float64), times, method)
        errors.append(abs(found.item() - math.exp(math.sin(1.0))))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_a_model_that_knows_the_clip_is_reached_exactly(method, steps):
    found = generate(Known(), WANTED, seed=0, steps=steps, method=method, guidance=1.0)
    torch.testing.assert_close(found, torch.full_like(found, 0.8), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("method", "calls"), [("euler", 4), ("midpoint", 8)])
def test_calls_per_step(method, calls):
    model = Known()
    generate(model, WANTED, seed=0, steps=4, method=method)
    assert len(model.calls) == calls
    times = [call[1][0] for call in model.calls]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] < 1


def test_guidance_one_is_the_conditional_branch_alone():
    model = Known()
    generate(model, WANTED, seed=0, steps=2, guidance=1.0)
    assert all(torch.equal(call[2], WANTED) for call in model.calls)


def test_guidance_goes_past_the_unconditional_prediction_in_one_batch():
    model = Known(conditional=0.3, unconditional=-0.1)
    found = generate(model, WANTED, seed=0, steps=2, guidance=2.0)
    torch.testing.assert_close(found, torch.full_like(found, (0.7 + 1) / 2), atol=1e-6, rtol=0)
    assert [call[0] for call in model.calls] == [4, 4]
    for *_, attributes in model.calls:
        assert torch.equal(attributes[:2], WANTED)
        assert (attributes[2:] == -1).all()


def test_guidance_zero_is_unconditional():
    found = generate(Known(), WANTED, seed=0, steps=2, guidance=0.0)
    torch.testing.assert_close(found, torch.full_like(found, 0.4), atol=1e-6, rtol=0)


def test_guidance_close_to_one_meets_the_skipped_branch():
    model = stirred()
    alone = generate(model, WANTED, seed=0, steps=3, guidance=1.0)
    guided = generate(model, WANTED, seed=0, steps=3, guidance=1.0 + 1e-7)
    torch.testing.assert_close(alone, guided, atol=1e-5, rtol=0)


def test_a_seed_repeats_and_a_clip_does_not_know_its_batch():
    model = stirred()
    first = generate(model, WANTED, seed=5, steps=3)
    assert torch.equal(first, generate(model, WANTED, seed=5, steps=3))
    assert not torch.equal(first, generate(model, WANTED, seed=7, steps=3))
    second = generate(model, WANTED[1:], seed=6, steps=3)
    torch.testing.assert_close(first[1:], second, atol=1e-5, rtol=0)


def test_noise_is_standard_and_of_its_seed():
    noise = clip_noise(2, (4, 3, 32, 32), 9)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert torch.equal(noise[1:], clip_noise(1, (4, 3, 32, 32), 10))


def test_the_callback_sees_every_state():
    seen = []
    model = Known(conditional=0.3)
    found = generate(model, WANTED, seed=0, steps=3, callback=lambda *call: seen.append(call))
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert all(x.shape == v.shape == found.shape for _, x, v in seen)
    torch.testing.assert_close((seen[-1][1] + 1) / 2, found)


def test_other_geometry_autocast_and_range():
    found = generate(
        stirred(), WANTED, seed=0, steps=2, frames=3, size=(4, 12), dtype=torch.bfloat16
    )
    assert found.shape == (2, 3, 3, 4, 12)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "heun"},
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"guidance": -1.0},
        {"guidance": math.nan},
        {"shift": 0.0},
        {"shift": math.nan},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UnsupportedError):
        generate(Known(), WANTED, **{"seed": 0, **wrong})


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"size": (8, 9)}, {"frames": -2}], ids=str)
def test_geometry_that_cannot_be_is_refused(wrong):
    with pytest.raises(ShapeError, match="whole number of patches"):
        generate(Known(), WANTED, seed=0, **wrong)


def test_bad_attributes_and_broken_models_are_refused():
    with pytest.raises(ShapeError, match="attribute 0"):
        generate(Known(), WANTED + 1, seed=0)
    with pytest.raises(ShapeError, match="not finite"):
        generate(Known(conditional=math.nan), WANTED, seed=0, steps=2)
    with pytest.raises(UnsupportedError, match="unknown sampler"):
        integrate(lambda x, t: x, torch.zeros(1), [0, 1], "rk4")
    for wrong in ({"drop": 1.5}, {"shift": 0.0}, {"drop": math.nan}):
        with pytest.raises(ShapeError, match="drop must be"):
            training_loss(
                lambda x, *_: x, torch.rand(2, 1, 3, 4, 4), WANTED, torch.Generator(), **wrong
            )
