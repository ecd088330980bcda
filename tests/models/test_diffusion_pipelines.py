"""Pipelines of diffusers, built from tiny parts and given embeddings: steps, runs, branches."""

import functools

import numpy as np
import pytest
import torch

from tubelet import accelerate
from tubelet.core.errors import ConflictError, UnsupportedError
from tubelet.models.attend_op import open_places
from tubelet.models.pipelines import transformers_of
from tubelet.testing import tiny_diffusion
from tubelet.testing.tiny_diffusion import GRID, TEXT, Empty, FirstBlock, Recorder

BOTH = ("cond", "uncond")


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def mask(valid):
    return (torch.arange(TEXT) < valid).long()[None]


def prompts(width=8, masks=True, tokens=TEXT):
    given = {
        "prompt_embeds": noise(1, tokens, width),
        "negative_prompt_embeds": noise(1, tokens, width),
    }
    if masks:
        given |= {"prompt_attention_mask": mask(7), "negative_prompt_attention_mask": mask(4)}
    return given


def flow(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def unipc():
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def heun():
    from diffusers import FlowMatchHeunDiscreteScheduler

    return FlowMatchHeunDiscreteScheduler(shift=3.0)


def model(name, **changes):
    return tiny_diffusion.build(name, batch=1, **changes)[0]


def wan(experts=1):
    from diffusers import WanPipeline

    second = {"transformer_2": model("wan", seed=1), "boundary_ratio": 0.875} if experts > 1 else {}
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=unipc(),
        transformer=model("wan"),
        **second,
    )
    return pipe, {**prompts(masks=False), "height": 64, "width": 96, "num_frames": 9}


def wan_image(scheduler=unipc, experts=1, per_token=False):
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
    from PIL import Image

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    channels = {} if per_token else {"in_channels": 12}
    second = {"transformer_2": model("wan", **channels), "boundary_ratio": 0.9}
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler(),
        image_processor=None,
        image_encoder=None,
        transformer=model("wan", **channels),
        expand_timesteps=per_token,
        **(second if experts > 1 else {}),
    )
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 96, 3), dtype=np.uint8))
    return pipe, {
        **prompts(masks=False),
        "image": image,
        "height": 64,
        "width": 96,
        "num_frames": 9,
    }


def hunyuan_video(guided=False, shift=7.0):
    from diffusers import HunyuanVideoPipeline

    transformer = model("hunyuan_video")
    pipe = HunyuanVideoPipeline(None, None, transformer, None, flow(shift=shift), None, None)
    given = {**prompts(), "pooled_prompt_embeds": noise(1, 8)}
    if guided:
        given |= {"true_cfg_scale": 3.0, "negative_pooled_prompt_embeds": noise(1, 8)}
    return pipe, {**given, "height": 64, "width": 96, "num_frames": 9}


def cogvideox():
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    pipe = CogVideoXPipeline(None, None, None, model("cogvideox"), CogVideoXDDIMScheduler())
    return pipe, {**prompts(masks=False), "height": 64, "width": 96, "num_frames": 9}


def ltx():
    from diffusers import LTXPipeline

    pipe = LTXPipeline(flow(use_dynamic_shifting=True), None, None, None, model("ltx"))
    return pipe, {**prompts(), "height": 128, "width": 192, "num_frames": 17}


def mochi():
    from diffusers import MochiPipeline

    pipe = MochiPipeline(flow(invert_sigmas=True), None, None, None, model("mochi"))
    return pipe, {**prompts(16), "height": 64, "width": 96, "num_frames": 13}


def allegro():
    from diffusers import AllegroPipeline, EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler()
    pipe = AllegroPipeline(None, None, None, model("allegro"), scheduler)
    given = {**prompts(), "negative_prompt": None}
    return pipe, {**given, "height": 64, "width": 96, "num_frames": 12}


PIPELINES = {
    "wan": (wan, BOTH),
    "wan 2.2": (functools.partial(wan, experts=2), BOTH),
    "wan 2.2 image": (functools.partial(wan_image, experts=2), BOTH),
    "wan 2.2 text and image": (functools.partial(wan_image, per_token=True), BOTH),
    "hunyuan_video": (hunyuan_video, ("cond",)),
    "hunyuan_video, guided": (functools.partial(hunyuan_video, guided=True), BOTH),
    "cogvideox": (cogvideox, ("cond_uncond",)),
    "ltx": (ltx, ("cond_uncond",)),
    "mochi": (mochi, ("cond_uncond",)),
    # Its pipeline names no branch.
    "allegro": (allegro, ("pass 0",)),
}


def generate(pipe, given, steps=4):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        **given, num_inference_steps=steps, output_type="latent", generator=generator
    ).frames


def expected(steps, branches):
    return [(step, steps, branch) for step in range(steps) for branch in branches]


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_branches_and_runs_of_a_pipeline(made, name):
    build, branches = PIPELINES[name]
    pipe, given = build()
    want = generate(pipe, given)
    with accelerate(pipe, Empty()):
        got = generate(pipe, given)
        assert made[0].steps == expected(4, branches)
        again = generate(pipe, given)
        assert made[0].steps == expected(4, branches) * 2
    assert float((got - want).abs().max()) < 1e-5
    assert torch.equal(got, again)
    grid = made[0].begun[0][0]
    assert (grid.frames, grid.height, grid.width) == GRID
    # Every run was ended, and so was the last.
    assert made[0].ended >= 2
    assert open_places() == 0
    assert torch.equal(generate(pipe, given), want)


def test_guidance_branches_have_their_own_text_lengths(made):
    pipe, given = hunyuan_video(guided=True)
    with accelerate(pipe, Empty()):
        generate(pipe, given, steps=1)
    assert [lengths for _, _, lengths in made[0].begun] == [[79], [76]]
    pipe, given = mochi()
    with accelerate(pipe, Empty()):
        generate(pipe, given, steps=2)
    assert made[1].begun[0][2] == [76, 79]


def test_two_experts_share_a_run_under_one_handle(made):
    pipe, given = wan(experts=2)
    with accelerate(pipe, Empty()):
        generate(pipe, given)
    (runtime,) = made
    names = [site.name for site, _ in runtime.attended]
    assert names[0].startswith("transformer.blocks.0")
    assert names[-1].startswith("transformer_2.blocks.1")
    assert {site.name for site in runtime.sites} == set(names)
    assert [site.layer for site in runtime.sites] == [0, 1, 0, 1]


def test_the_first_expert_may_get_no_step(made):
    pipe, given = wan_image(experts=2)
    pipe.register_to_config(boundary_ratio=1.1)
    with accelerate(pipe, Empty()):
        generate(pipe, given)
        generate(pipe, given)
    assert made[0].steps == expected(4, BOTH) * 2
    assert {site.name.split(".")[0] for site, _ in made[0].attended} == {"transformer_2"}


def test_second_order_samplers_evaluate_a_step_twice(made):
    pipe, given = wan_image(heun)
    with accelerate(pipe, Empty()):
        generate(pipe, given, steps=3)
    assert [step for step, _, branch in made[0].steps if branch == "cond"] == [0, 1, 1, 2, 2]
    assert {count for _, count, _ in made[0].steps} == {3}


def test_timesteps_that_coincide_in_half_precision_stay_apart(made):
    def rounds(_, args, kwargs):
        return args, {**kwargs, "timestep": kwargs["timestep"].bfloat16()}

    # With this shift the first steps differ by 1, and bfloat16 holds multiples of 4 there.
    pipe, given = hunyuan_video(shift=60.0)
    pipe.transformer.register_forward_pre_hook(rounds, with_kwargs=True)
    with accelerate(pipe, Empty()):
        generate(pipe, given, steps=16)
    assert made[0].steps == expected(16, ("cond",))


def test_a_run_after_an_error_begins_anew(made, monkeypatch):
    pipe, given = wan_image(experts=2)
    attend, calls = Recorder.attend, []

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError("in the second step")
        return attend(self, *args)

    monkeypatch.setattr(Recorder, "attend", fails)
    with accelerate(pipe, FirstBlock()):
        with pytest.raises(MemoryError):
            generate(pipe, given)
        ended = made[0].ended
        got = generate(pipe, given)
        assert made[0].steps[-8:] == expected(4, BOTH)
        assert made[0].ended > ended
    with accelerate(pipe, FirstBlock()):
        assert torch.equal(generate(pipe, given), got)


def test_a_pipeline_and_its_transformer_are_not_accelerated_together(made):
    pipe, _ = wan(experts=2)
    with accelerate(pipe, Empty()) as handle:
        assert handle.report().model == "WanPipeline"
        with pytest.raises(ConflictError, match="accelerated already"):
            accelerate(pipe.transformer_2, Empty())
    with accelerate(pipe.transformer_2, Empty()), pytest.raises(ConflictError):
        accelerate(pipe, Empty())
    assert open_places() == 0


def test_an_expert_that_cannot_be_accelerated_leaves_the_other_alone(made):
    pipe, _ = wan(experts=2)
    before = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    pipe.transformer_2.blocks[0].attn1.processor = object()
    with pytest.raises(UnsupportedError, match="has the processor object"):
        accelerate(pipe, Empty())
    assert [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")] == before


def test_pipelines_of_other_models_are_refused_with_the_known_ones():
    class Denoiser(torch.nn.Module):
        pass

    pipe, _ = wan()
    pipe.transformer = Denoiser()
    with pytest.raises(UnsupportedError, match=r"no adapter for Denoiser.*WanTransformer3DModel"):
        accelerate(pipe, Empty())
    assert transformers_of(torch.nn.Identity()) == {}
    with pytest.raises(UnsupportedError, match="no adapter for object"):
        accelerate(object(), Empty())
