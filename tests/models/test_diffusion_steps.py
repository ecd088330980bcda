"""Which step, branch and run a forward pass belongs to."""

import pytest
import torch

from tubelet import accelerate
from tubelet.models.steps import StepTracker
from tubelet.testing import tiny_diffusion
from tubelet.testing.tiny_diffusion import Empty, FirstBlock, Whole


class Runs(StepTracker):
    """A tracker that counts its runs."""

    def __init__(self):
        self.count = 0
        super().__init__(self.begin)

    def begin(self):
        self.count += 1

    def steps(self, *timesteps):
        return [self.observe(t).step for t in timesteps]


def denoise(model, inputs, timesteps, branches=("cond",), **context):
    with torch.no_grad():
        for index, timestep in enumerate(timesteps):
            told = {"step_index": index, **context} if context else {}
            for branch in branches:
                with model.cache_context(branch, **told):
                    model(**{**inputs, "timestep": torch.full((2,), float(timestep))})


def test_falling_timesteps_are_steps_and_rising_ones_runs():
    tracker = Runs()
    assert tracker.steps(999, 600, 3) == [0, 1, 2]
    assert tracker.count == 1
    assert tracker.steps(999, 600) == [0, 1]
    assert tracker.count == 2


def test_a_repeated_timestep_is_the_same_step():
    # Two guidance branches, then a second-order sampler's second evaluation.
    assert Runs().steps(999, 999, 600, 600, 600, 3) == [0, 0, 1, 1, 1, 2]


def test_passes_without_a_name_are_numbered_within_a_step():
    tracker = Runs()
    names = [tracker.observe(t).branch for t in (999, 999, 600, 600, 3, 3)]
    assert names == ["pass 0", "pass 1"] * 3
    assert tracker.count == 1


def test_a_branch_that_comes_back_at_the_first_step_begins_a_run():
    tracker = Runs()
    for branch in ("cond", "uncond", "cond", "uncond"):
        assert tracker.observe(999, 0, 4, branch).step == 0
    assert tracker.count == 2
    # Later steps may be evaluated twice by second-order samplers.
    for branch in ("cond", "uncond", "cond", "uncond"):
        assert tracker.observe(600, 1, 4, branch).step == 1
    assert tracker.count == 2


def test_geometry_is_compared_once_for_all_that_share_a_tracker():
    tracker = Runs()
    for timestep in (999, 600, 3):
        tracker.see((4, 8, 8))
        tracker.observe(timestep)
    assert tracker.count == 1
    tracker.see((2, 8, 8))
    assert tracker.observe(1).step == 0
    assert tracker.count == 2


def test_a_reset_begins_a_run_even_at_a_smaller_timestep():
    tracker = Runs()
    assert tracker.steps(999, 600) == [0, 1]
    tracker.reset()
    assert tracker.steps(300, 3) == [0, 1]
    assert tracker.count == 2


def test_hosts_that_tell_the_step_are_believed():
    tracker = Runs()
    told = [tracker.observe(t, i, 3, "uncond") for i, t in enumerate((999.0, 999.0, 3.0))]
    assert [(c.step, c.num_steps, c.branch) for c in told] == [
        (0, 3, "uncond"),
        (1, 3, "uncond"),
        (2, 3, "uncond"),
    ]
    assert tracker.count == 1
    assert tracker.observe(999.0, 0, 3).step == 0
    assert tracker.count == 2


def test_branches_come_from_the_cache_context(made):
    model, inputs = tiny_diffusion.build("wan")
    with accelerate(model, Empty(), num_steps=2):
        denoise(model, inputs, (900, 500), ("cond", "uncond"))
    assert made[0].steps == [(0, 2, "cond"), (0, 2, "uncond"), (1, 2, "cond"), (1, 2, "uncond")]


def test_the_context_s_number_of_steps_beats_the_given_one(made):
    model, inputs = tiny_diffusion.build("wan")
    with accelerate(model, Empty(), num_steps=9):
        denoise(model, inputs, (900, 900), num_inference_steps=2)
    assert made[0].steps == [(0, 2, "cond"), (1, 2, "cond")]


def test_the_largest_of_the_timesteps_per_token_counts(made):
    model, inputs = tiny_diffusion.build("wan_ti2v")
    with torch.no_grad(), accelerate(model, Empty()):
        for factor in (1.0, 0.5, 0.1):
            model(**{**inputs, "timestep": inputs["timestep"] * factor})
    assert [step for step, _, _ in made[0].steps] == [0, 1, 2]


def test_timesteps_of_Mochi_rise_within_a_run(made):
    model, inputs = tiny_diffusion.build("mochi")
    with accelerate(model, Empty()):
        denoise(model, inputs, (0, 300, 900, 0, 300))
    assert [step for step, _, _ in made[0].steps] == [0, 1, 2, 0, 1]


def test_another_video_size_begins_a_run(made):
    model, inputs = tiny_diffusion.build("wan")
    larger = {**inputs, "hidden_states": torch.randn(2, 4, 3, 8, 16)}
    with accelerate(model, Empty()):
        denoise(model, inputs, (900, 500))
        denoise(model, larger, (400, 300))
    assert [step for step, _, _ in made[0].steps] == [0, 1, 0, 1]
    assert made[0].ended >= 2


def test_the_end_of_a_pipeline_ends_the_run(made):
    model, inputs = tiny_diffusion.build("wan")
    with accelerate(model, Empty()):
        denoise(model, inputs, (900, 500))
        ended = made[0].ended
        model._reset_stateful_cache()
        assert made[0].ended == ended + 1
        denoise(model, inputs, (400,))
    assert [step for step, _, _ in made[0].steps] == [0, 1, 0]


def test_a_run_after_an_error_is_clean(made, monkeypatch):
    model, inputs = tiny_diffusion.build("wan")
    plan, calls = FirstBlock.plan, []

    def fails_once(self, ctx):
        calls.append(ctx.step.step)
        if len(calls) == 6:
            raise MemoryError("in the second step")
        return plan(self, ctx)

    monkeypatch.setattr(FirstBlock, "plan", fails_once)
    with accelerate(model, FirstBlock()):
        with pytest.raises(MemoryError):
            denoise(model, inputs, (900, 500, 100))
        ended = made[0].ended
        denoise(model, inputs, (900, 500, 100))
        assert made[0].ended == ended + 1
        again = made[0].steps[-3:]
        with torch.no_grad():
            got = model(**inputs).sample
    assert [step for step, _, _ in again] == [0, 1, 2]
    fresh, _ = tiny_diffusion.build("wan")
    with accelerate(fresh, FirstBlock()), torch.no_grad():
        assert torch.equal(fresh(**inputs).sample, got)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
def test_inference_mode(made, name):
    model, inputs = tiny_diffusion.build(name)
    with torch.inference_mode():
        want = model(**inputs).sample
        with accelerate(model, Whole()):
            assert float((model(**inputs).sample - want).abs().max()) < 1e-5
