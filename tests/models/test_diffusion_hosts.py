"""Video transformers of diffusers: sites, geometry, unchanged results, exact removal, refusals."""

import copy

import pytest
import torch

import tubelet.models.diffusion as diffusion
from tubelet import accelerate
from tubelet.core.errors import ConflictError, ShapeError, UnsupportedError
from tubelet.models.attend_op import open_places
from tubelet.models.catalogue import adapter_for
from tubelet.models.ltx import box
from tubelet.recipes import ToMe
from tubelet.testing import tiny_diffusion
from tubelet.testing.tiny_diffusion import GRID, TEXT, VALID, Empty, FirstBlock, Whole

HOSTS = list(tiny_diffusion.HOSTS)
MASKED = ("hunyuan_video", "hunyuan_token_replace", "hunyuan_video15", "mochi")
VIDEO = GRID[0] * GRID[1] * GRID[2]


def sample(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def error(got, want):
    return float((got - want).abs().max())


SITES = {
    "hunyuan_video": ["transformer_blocks.{}.attn"] * 2 + ["single_transformer_blocks.{}.attn"] * 2,
    "hunyuan_token_replace": ["transformer_blocks.{}.attn"] * 2
    + ["single_transformer_blocks.{}.attn"] * 2,
    "hunyuan_video15": ["transformer_blocks.{}.attn"] * 2,
    "mochi": ["transformer_blocks.{}.attn1"] * 3,
}


@pytest.mark.parametrize("name", HOSTS)
def test_sites_are_the_self_attention_of_the_video_blocks_in_order(made, name):
    model, inputs = tiny_diffusion.build(name)
    stack = "blocks" if name.startswith("wan") else "transformer_blocks"
    patterns = SITES.get(name, [stack + ".{}.attn1"] * 2)
    want = [pattern.format(patterns[:i].count(pattern)) for i, pattern in enumerate(patterns)]
    sites = adapter_for(model).sites(model)
    assert [site.name for site in sites] == want
    assert [site.layer for site in sites] == list(range(len(want)))
    assert {(site.num_layers, site.kind) for site in sites} == {(len(want), "joint")}
    with accelerate(model, Empty()):
        sample(model, inputs)
    # They run in that order, each once.
    assert [site for site, _ in made[0].attended] == sites


LAYOUTS = {
    "hunyuan_video": (0, TEXT, [VIDEO + VALID] * 2),
    "hunyuan_token_replace": (0, TEXT, [VIDEO + VALID] * 2),
    # 3 image tokens of zeros, so none is real; 2 of 4 glyph tokens.
    "hunyuan_video15": (0, TEXT + 7, [VIDEO + VALID + 2] * 2),
    "cogvideox": (TEXT, 0, None),
    "cogvideox15": (TEXT, 0, None),
    "mochi": (0, TEXT, [VIDEO + VALID] * 2),
}


@pytest.mark.parametrize("name", HOSTS)
def test_geometry_of_a_forward_pass(made, name):
    model, inputs = tiny_diffusion.build(name)
    with accelerate(model, Empty()):
        sample(model, inputs)
    ((grid, step, lengths),) = made[0].begun
    before, after, want = LAYOUTS.get(name, (0, 0, None))
    assert (grid.frames, grid.height, grid.width) == GRID
    assert (grid.before, grid.after, lengths) == (before, after, want)
    assert (step.step, step.num_steps, step.branch) == (0, None, "pass 0")
    assert {shape[2] for _, shape in made[0].attended} == {grid.num_tokens}


@pytest.mark.parametrize("name", HOSTS)
def test_recipes_that_leave_nothing_out_change_nothing(made, name):
    model, inputs = tiny_diffusion.build(name)
    want = sample(model, inputs)
    with accelerate(model, Empty()):
        empty = sample(model, inputs)
    with accelerate(model, Whole()):
        whole = sample(model, inputs)
    with accelerate(model, FirstBlock()):
        other = sample(model, inputs)
    # HunyuanVideo loses its mask, which selects another kernel; the others are bit-identical.
    assert error(empty, want) < (1e-5 if name.startswith("hunyuan") else 1e-12)
    assert error(whole, want) < 1e-5
    assert error(other, want) > 1e-3


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_runtime_itself_carries_plans_out(name, batch):
    model, inputs = tiny_diffusion.build(name, batch)
    if batch > 1 and name in MASKED:
        inputs["encoder_attention_mask"][1, 3:] = 0
    want = sample(model, inputs)
    for recipe in (Empty(), Whole(), FirstBlock()):
        handle = accelerate(model, recipe)
        got = sample(model, inputs)
        handle.remove()
        assert (error(got, want) < 1e-5) == (recipe != FirstBlock())
        assert handle.report().calls == 1
    assert torch.equal(sample(model, inputs), want)


@pytest.mark.parametrize("name", MASKED)
def test_padding_never_reaches_the_video(made, name):
    model, inputs = tiny_diffusion.build(name)
    mask = inputs["encoder_attention_mask"]
    text = inputs["encoder_hidden_states"]
    with accelerate(model, Whole()):
        want = sample(model, inputs)
        noisy = torch.where(mask.bool()[..., None], text, 100 * torch.randn_like(text))
        assert error(sample(model, {**inputs, "encoder_hidden_states": noisy}), want) < 1e-5
        other = torch.where(mask.bool()[..., None], torch.randn_like(text), text)
        assert error(sample(model, {**inputs, "encoder_hidden_states": other}), want) > 1e-3


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("recipe", [Empty(), Whole()], ids=str)
def test_samples_of_different_text_lengths(made, name, recipe):
    model, inputs = tiny_diffusion.build(name)
    inputs["encoder_attention_mask"][1, 3:] = 0
    want = sample(model, inputs)
    with accelerate(model, recipe):
        assert error(sample(model, inputs), want) < 1e-5
    lengths = made[0].begun[0][2]
    assert lengths[0] - lengths[1] == VALID - 3


@pytest.mark.parametrize("name", MASKED)
def test_text_without_padding_has_no_lengths(made, name):
    model, inputs = tiny_diffusion.build(name)
    for key in ("encoder_attention_mask", "encoder_attention_mask_2"):
        if key in inputs:
            inputs[key] = torch.ones_like(inputs[key])
    if "image_embeds" in inputs:
        inputs["image_embeds"] = torch.randn_like(inputs["image_embeds"])
    want = sample(model, inputs)
    with accelerate(model, Whole()):
        assert error(sample(model, inputs), want) < 1e-5
    assert made[0].begun[0][2] is None


def test_text_lengths_of_masks_in_half_precision(made):
    # Pipelines cast masks to the model's precision.
    model, inputs = tiny_diffusion.build("hunyuan_video")
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bfloat16()
    with accelerate(model, Empty()):
        sample(model, inputs)
    assert all(type(n) is int for n in made[0].begun[0][2])


@pytest.mark.parametrize("name", HOSTS)
def test_remove_leaves_no_trace(made, name):
    model, inputs = tiny_diffusion.build(name)
    modules = dict(model.named_modules())
    want, before = sample(model, inputs), {p: dict(vars(m)) for p, m in modules.items()}
    weights = copy.deepcopy(model.state_dict())
    handle = accelerate(model, FirstBlock())
    assert open_places() == len(adapter_for(model).sites(model))
    sample(model, inputs)
    handle.remove()
    assert open_places() == 0
    for path, module in modules.items():
        assert vars(module).keys() == before[path].keys(), path
        assert all(vars(module)[key] is value for key, value in before[path].items()), path
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], x) for key, x in model.state_dict().items())
    assert torch.equal(sample(model, inputs), want)


def test_remove_keeps_hooks_of_others(made):
    from diffusers.hooks import HookRegistry, ModelHook

    class Other(ModelHook):
        seen = 0

        def pre_forward(self, module, *args, **kwargs):
            self.seen += 1
            return args, kwargs

    model, inputs = tiny_diffusion.build("wan")
    handle, other = accelerate(model, Empty()), Other()
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(other, "other")
    sample(model, inputs)
    handle.remove()
    sample(model, inputs)
    assert other.seen == 2
    assert model._diffusers_hook is registry
    assert list(registry.hooks) == ["other"]
    assert len(made[0].begun) == 1


def test_remove_behind_a_foreign_wrapper_does_not_cut_it_off(made):
    model, inputs = tiny_diffusion.build("wan")
    handle = accelerate(model, FirstBlock())
    inner, seen = model.forward, []
    model.forward = lambda *args, **kwargs: (seen.append(1), inner(*args, **kwargs))[1]
    handle.remove()
    calls = len(made[0].begun)
    sample(model, inputs)
    assert seen == [1]
    assert len(made[0].begun) == calls


def test_a_failing_installation_leaves_no_trace(made, monkeypatch):
    model, inputs = tiny_diffusion.build("wan")
    want, before = sample(model, inputs), dict(vars(model))
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]

    def fails(*_):
        raise RuntimeError("no hook")

    monkeypatch.setattr(diffusion.diffusion_hooks, "hook", fails)
    with pytest.raises(RuntimeError, match="no hook"):
        accelerate(model, FirstBlock())
    assert vars(model) == before
    assert [m.processor for m in model.modules() if hasattr(m, "processor")] == processors
    assert open_places() == 0
    assert torch.equal(sample(model, inputs), want)


def test_the_backend_of_other_models_and_modules_stays(made):
    model, inputs = tiny_diffusion.build("wan")
    other, _ = tiny_diffusion.build("wan")
    want = sample(other, inputs)
    with accelerate(model, FirstBlock()):
        assert model.blocks[0].attn2.processor._attention_backend is None
        assert torch.equal(sample(other, inputs), want)


def test_one_processor_shared_by_all_modules_is_not_changed(made):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model, inputs = tiny_diffusion.build("wan")
    shared = WanAttnProcessor()
    model.set_attn_processor(shared)
    with accelerate(model, Empty()):
        sample(model, inputs)
        assert vars(shared) == {}
        assert len({site.name for site, _ in made[0].attended}) == 2
    assert model.blocks[0].attn1.processor is shared


def test_the_backend_chosen_before_computes_dense_calls(made, monkeypatch):
    from diffusers.models import attention_dispatch

    model, inputs = tiny_diffusion.build("wan")
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = attention_dispatch.AttentionBackendName.NATIVE
    seen = []
    dispatch = attention_dispatch.dispatch_attention_fn

    def watched(*args, **kwargs):
        seen.append(kwargs["backend"])
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", watched)
    with accelerate(model, Empty()):
        sample(model, inputs)
    assert seen == [attention_dispatch.AttentionBackendName.NATIVE] * 2


def test_changing_processors_or_backend_under_recipes_is_refused(made):
    model, inputs = tiny_diffusion.build("wan")
    with accelerate(model, FirstBlock()):
        model.reset_attention_backend()
        with pytest.raises(UnsupportedError, match="back-end of this WanTransformer3DModel"):
            sample(model, inputs)
    with accelerate(model, FirstBlock()):
        model.blocks[1].attn1.processor = type(model.blocks[1].attn2.processor)()
        with pytest.raises(UnsupportedError, match="were changed under recipes"):
            sample(model, inputs)


@pytest.mark.parametrize("name", HOSTS)
def test_foreign_processors_are_refused(made, name):
    class Custom:
        pass

    model, _ = tiny_diffusion.build(name)
    site = adapter_for(model).sites(model)[-1]
    model.get_submodule(site.name).processor = Custom()
    with pytest.raises(UnsupportedError, match=rf"{site.name} has the processor Custom instead"):
        accelerate(model, Empty())


def test_fused_projections(made):
    model, inputs = tiny_diffusion.build("wan")
    want = sample(model, inputs)
    model.fuse_qkv_projections()
    with accelerate(model, Whole()):
        assert error(sample(model, inputs), want) < 1e-5
    model, _ = tiny_diffusion.build("cogvideox")
    model.fuse_qkv_projections()
    with pytest.raises(UnsupportedError, match="unfuse"):
        accelerate(model, Whole())


@pytest.mark.parametrize("name", tiny_diffusion.REFUSED)
def test_hosts_without_attention_over_whole_videos_say_why(name):
    model, _ = tiny_diffusion.build(name)
    reason = {"latte": "within a frame and along time", "sana_video": "linear attention"}[name]
    assert adapter_for(model).sites(model)
    with pytest.raises(UnsupportedError, match=reason):
        accelerate(model, Empty())


@pytest.mark.parametrize("name", HOSTS)
def test_token_recipes_are_refused(name):
    model, _ = tiny_diffusion.build(name)
    with pytest.raises(UnsupportedError, match="do not run on generators yet"):
        accelerate(model, ToMe(r=4))


def test_an_accelerated_model_is_neither_accelerated_again_nor_copied(made):
    model, _ = tiny_diffusion.build("wan")
    with accelerate(model, Empty()):
        with pytest.raises(ConflictError, match="accelerated already"):
            accelerate(model, Empty())
        with pytest.raises(UnsupportedError, match="cannot be copied"):
            copy.deepcopy(model)


def test_gradients_are_refused_and_plain_calls_need_no_guard(made):
    model, inputs = tiny_diffusion.build("wan")
    with accelerate(model, Whole()):
        out = model(**inputs).sample
        with pytest.raises(UnsupportedError, match="no gradient on generators"):
            out.sum().backward()


def test_blocks_outside_of_their_transformer_are_refused(made):
    model, _ = tiny_diffusion.build("wan")
    with accelerate(model, Whole()), pytest.raises(UnsupportedError, match="outside of its"):
        model.blocks[0].attn1(torch.randn(1, 8, 24))


def test_calls_of_other_tokens_than_the_grid_are_refused_with_both_numbers(made):
    model, inputs = tiny_diffusion.build("wan")
    block = model.blocks[1]
    forward = block.forward
    with accelerate(model, Whole()):
        block.forward = lambda x, text, temb, rotary: forward(
            x[:, 1:], text, temb, [r[:, 1:] for r in rotary]
        )
        with pytest.raises(ShapeError, match="from 71 to 71 tokens, but the video is 3x4x6 = 72"):
            sample(model, inputs)


def test_masks_that_cannot_be_kept_are_refused(made):
    model, inputs = tiny_diffusion.build("allegro")
    with accelerate(model, Whole()):
        want = sample(model, inputs)
        assert torch.equal(sample(model, {**inputs, "attention_mask": None}), want)
        inputs["attention_mask"][0, 0] = 0
        with pytest.raises(UnsupportedError, match="only None or all ones"):
            sample(model, inputs)
    model, inputs = tiny_diffusion.build("mochi")
    inputs["encoder_attention_mask"][0, 0] = False
    with accelerate(model, Whole()), pytest.raises(ShapeError, match="behind the real tokens"):
        sample(model, inputs)
    model, inputs = tiny_diffusion.build("cogvideox")
    extra = {"attention_kwargs": {"attention_mask": torch.ones(2, VIDEO + TEXT)}}
    with accelerate(model, Whole()), pytest.raises(UnsupportedError, match="an attention mask"):
        sample(model, {**inputs, **extra})


def test_arguments_by_position_and_tuples_as_results(made):
    model, inputs = tiny_diffusion.build("wan")
    order = ("hidden_states", "timestep", "encoder_hidden_states")
    with torch.no_grad(), accelerate(model, Empty()):
        (out,) = model(*(inputs[key] for key in order), return_dict=False)
    assert torch.equal(out, sample(model, inputs))
    assert made[0].begun[0][0].num_tokens == VIDEO


def coordinates(conditions: dict[int, int], scale: float = 1 / 25):
    """As LTX's condition pipeline makes them: frame of each condition -> its token frames."""
    from diffusers import LTXConditionPipeline as Pipeline

    def ids(frames, first):
        grid = Pipeline._prepare_video_ids(2, frames, GRID[1], GRID[2])
        return Pipeline._scale_video_ids(grid, frame_index=first)

    parts = [ids(frames, first) for first, frames in conditions.items()]
    joined = torch.cat([*parts, ids(GRID[0], 0)], dim=2).float()
    joined[:, 0] *= scale
    return joined


@pytest.mark.parametrize("conditions", [{}, {8: 1}, {16: 1, 8: 2}, {0: 1}, {1: 1}], ids=str)
def test_LTX_condition_tokens_stand_in_front_of_the_video(made, conditions):
    coords = coordinates(conditions)
    assert box(coords) == GRID
    model, inputs = tiny_diffusion.build("ltx")
    for key in ("num_frames", "height", "width"):
        del inputs[key]
    extra = coords.shape[2] - VIDEO
    inputs["hidden_states"] = torch.randn(2, coords.shape[2], 4)
    inputs["video_coords"] = coords
    want = sample(model, inputs)
    with accelerate(model, Whole()):
        assert error(sample(model, inputs), want) < 1e-5
    grid = made[0].begun[0][0]
    assert (grid.before, grid.after, grid.num_video) == (extra, 0, VIDEO)


def test_LTX_without_a_grid_is_refused(made):
    model, inputs = tiny_diffusion.build("ltx")
    with accelerate(model, Whole()):
        with pytest.raises(ShapeError, match="72 tokens, fewer than its grid of 4x4x6"):
            sample(model, {**inputs, "num_frames": 4})
        del inputs["width"]
        with pytest.raises(ShapeError, match="by num_frames, height and width"):
            sample(model, inputs)


def test_class_and_processor_names_of_the_adapters_still_exist():
    import diffusers

    for name in (*tiny_diffusion.HOSTS, *tiny_diffusion.REFUSED):
        model, _ = tiny_diffusion.build(name)
        adapter = adapter_for(model)
        assert all(hasattr(diffusers, cls) for cls in adapter.classes)
        for site in adapter.sites(model):
            processor = model.get_submodule(site.name).processor
            assert type(processor).__name__ == adapter.processor
