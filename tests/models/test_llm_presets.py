"""Presets of video language models: size, tokens, and an answer that moves with the clip."""

import pytest
import torch

from tubelet.core.errors import ModelError, ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.llm_inputs import clip_shape, geometry_of, inputs_of, prompt_of
from tubelet.models.llm_presets import LLM_PRESETS, is_llm, llm_preset, load_llm

PARAMETERS = {
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-8b": 8_767_123_696,
    "llava-onevision-7b": 8_030_348_832,
}
TOKENS = {"qwen2.5-vl-7b": 16_384, "qwen3-vl-8b": 16_384, "llava-onevision-7b": 6_272}
CLIPS = {
    "qwen2.5-vl-7b": (128, 448, 448),
    "qwen3-vl-8b": (128, 512, 512),
    "llava-onevision-7b": (32, 384, 384),
}
TINY = [name for name in LLM_PRESETS if name.startswith("tiny-")]

whole = pytest.mark.parametrize("name", PARAMETERS)
tiny = pytest.mark.parametrize("name", TINY)


def inputs(model, preset, seeds=(0,)):
    """Prompts that differ in their clips alone."""
    shape = clip_shape(model.config, preset.video)
    ids = prompt_of(model.config, preset.video, [5, 6], [7, 8, 9], lambda frame: [20 + frame])
    dtype = next(model.parameters()).dtype
    clips = [
        torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(s)).to(dtype)
        for s in seeds
    ]
    return inputs_of(model.config, [ids] * len(clips), clips)


@whole
def test_preset_has_the_published_number_of_parameters(name):
    model = llm_preset(name).build(device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]


@whole
def test_preset_has_the_tokens_and_the_clip_of_its_setting(name):
    preset = llm_preset(name)
    assert preset.video.num_video == TOKENS[name]
    assert clip_shape(preset.make_config(), preset.video) == CLIPS[name]


@tiny
def test_answers_move_with_the_clip_in_half_precision(name):
    preset = llm_preset(name)
    model = preset.build(seed=1)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    tables = {n: b.dtype for n, b in model.named_buffers() if "inv_freq" in n}
    assert set(tables.values()) == {torch.float32}, tables
    with torch.no_grad():
        logits = model(**inputs(model, preset, seeds=(0, 1))).logits[:, -1]
    assert logits.isfinite().all()
    assert not torch.allclose(logits[0], logits[1], atol=0.1)


@tiny
def test_answers_never_end_by_themselves(name):
    preset = llm_preset(name)
    model = preset.build()
    given = inputs(model, preset)
    answer = model.generate(**given, max_new_tokens=40, do_sample=False)
    assert answer.shape[1] == given["input_ids"].shape[1] + 40


def test_one_seed_gives_one_model_and_leaves_the_default_precision():
    preset = llm_preset("tiny-qwen3-vl")
    first, again, other = (preset.build(seed=seed).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.get_default_dtype() == torch.float32


def test_layers_are_cut_but_not_below_the_planes():
    preset = llm_preset("qwen3-vl-8b")
    assert len(preset.build(layers=4, device="meta").model.language_model.layers) == 4
    for layers in (2, 37):
        with pytest.raises(ModelError, match="36 layers"):
            preset.make_config(layers)


def test_names_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ModelError, match="there are qwen2"):
        llm_preset("qwen")
    with pytest.raises(ModelError, match="neither a preset"):
        load_llm(tmp_path, dtype=torch.float32)
    with pytest.raises(ModelError, match="only presets"):
        load_llm(tmp_path, dtype=torch.float32, layers=2)


@tiny
def test_a_folder_is_loaded(name, tmp_path):
    preset = llm_preset(name)
    model = preset.build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert is_llm(tmp_path)
    loaded = load_llm(tmp_path, dtype=torch.float32)
    assert not loaded.random_weights
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.stamps == preset.stamps
    clip_shape(loaded.model.config, loaded.grid)


def test_a_damaged_folder_is_refused(tmp_path):
    llm_preset("tiny-qwen3-vl").make_config().save_pretrained(tmp_path)
    assert is_llm(tmp_path)
    with pytest.raises(ModelError, match="cannot load"):
        load_llm(tmp_path, dtype=torch.float32)


# Inputs


def test_patches_lie_where_the_vision_tower_takes_them_to_be():
    vision_utils = pytest.importorskip("transformers.vision_utils")
    config = llm_preset("tiny-qwen3-vl").make_config()
    side, time = config.vision_config.patch_size, config.vision_config.temporal_patch_size
    frames, height, width = 2 * time, 6 * side, 4 * side
    t, y, x = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    # Colours carry the coordinates of their pixel.
    clip = torch.stack([t, y, x], dim=1).float()
    made = geometry_of(config).pixels(config, [clip])
    assert made["video_grid_thw"].tolist() == [[2, 6, 4]]
    rows = made["pixel_values_videos"].reshape(-1, 3, time, side, side)
    places = vision_utils.get_vision_position_ids(made["video_grid_thw"], 2).reshape(-1, 2)
    assert torch.equal(rows[:, 1, 0, 0, 0] // side, places[:, 0].float())
    assert torch.equal(rows[:, 2, 0, 0, 0] // side, places[:, 1].float())
    # Inside a patch: time, rows, columns; patches of the first frames come first.
    assert torch.equal(rows[:, 0, :, 0, 0] % time, torch.arange(time).expand(48, -1).float())
    assert torch.equal(rows[:, 0, 0, 0, 0] // time, torch.arange(2).repeat_interleave(24).float())
    inside = torch.arange(side).float()
    assert torch.equal(rows[:, 1, 0, :, 0] % side, inside.expand(48, -1))
    assert torch.equal(rows[:, 2, 0, 0, :] % side, inside.expand(48, -1))


def test_prompts_hold_the_placeholders_that_their_family_wants():
    grid = TokenGrid(frames=2, height=1, width=2)
    configs = {name: llm_preset(name).make_config() for name in TINY}
    one = prompt_of(configs["tiny-qwen2.5-vl"], grid, [5], [6])
    assert one == [5, 102, 101, 101, 101, 101, 103, 6]
    stamped = prompt_of(configs["tiny-qwen3-vl"], grid, [5], [6], lambda frame: [40 + frame])
    assert stamped == [5, 40, 102, 101, 101, 103, 41, 102, 101, 101, 103, 6]
    # One more for the line break.
    assert prompt_of(configs["tiny-llava-onevision"], grid, [5], [6]) == [5, *[101] * 5, 6]


def test_wrong_shapes_and_families_are_refused():
    config = llm_preset("tiny-llava-onevision").make_config()
    with pytest.raises(ShapeError, match="4x4 tokens"):
        clip_shape(config, TokenGrid(frames=2, height=3, width=4))
    with pytest.raises(ShapeError, match="equal length"):
        inputs_of(config, [[1, 2], [1]], [torch.zeros(1)] * 2)
    config.model_type = "clip"
    with pytest.raises(UnsupportedError, match="'clip'"):
        geometry_of(config)
