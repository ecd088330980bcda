"""Presets of video diffusion transformers: size, tokens, and a forward pass that stays finite."""

import dataclasses

import pytest
import torch

from tubelet.core.errors import ModelError, ShapeError
from tubelet.models.generator_presets import GENERATOR_PRESETS, generator_preset

PARAMETERS = {
    "wan2.1-1.3b": 1.42e9,
    "wan2.1-14b": 14.3e9,
    "hunyuanvideo": 12.8e9,
    "ltx": 1.92e9,
    "cogvideox1.5-5b": 5.57e9,
}
TOKENS = {
    "wan2.1-1.3b": 32_760,
    "wan2.1-14b": 75_600,
    "hunyuanvideo": 118_800 + 256,
    "ltx": 6_144,
    "cogvideox1.5-5b": 44_880 + 226,
}
SMALL = {
    "WanTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32},
    "HunyuanVideoTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "rope_axes_dim": (4, 6, 6),
        "num_refiner_layers": 1,
    },
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
    },
    "CogVideoXTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 16},
}
"""Sizes that make a forward pass at full depth a matter of a second."""

each = pytest.mark.parametrize("name", GENERATOR_PRESETS)


@each
def test_preset_has_the_published_number_of_parameters(name):
    model = GENERATOR_PRESETS[name].build(device="meta")
    count = sum(weight.numel() for weight in model.parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=0.006)


@each
def test_preset_has_the_published_number_of_tokens(name):
    assert GENERATOR_PRESETS[name].grid().num_tokens == TOKENS[name]


@each
def test_full_depth_stays_finite_and_moves_with_the_input(name):
    preset = GENERATOR_PRESETS[name]
    tiny = dataclasses.replace(preset, config={**preset.config, **SMALL[preset.host]}, text=8)
    steps = [c * p for c, p in zip(preset.compression, preset.patch, strict=True)]
    clip = {"frames": 2 * steps[0] + 1, "height": 2 * steps[1], "width": 3 * steps[2]}
    grid = tiny.grid(**clip)
    assert (grid.height, grid.width) == (2, 3)
    model = tiny.build(seed=1)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    outputs = [model(**tiny.inputs(**clip, seed=seed))[0] for seed in (0, 1)]
    assert outputs[0].isfinite().all()
    assert not torch.equal(*outputs)
    assert outputs[0].numel() == tiny.inputs(**clip)["hidden_states"].numel()


def test_one_seed_gives_one_model_and_leaves_the_default_precision():
    preset = GENERATOR_PRESETS["ltx"]
    tiny = dataclasses.replace(preset, config={**preset.config, **SMALL[preset.host]})
    first, again, other = (tiny.build(layers=1, seed=s).proj_in.weight for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.get_default_dtype() == torch.float32


def test_layers_keep_the_proportion_of_the_two_streams():
    model = GENERATOR_PRESETS["hunyuanvideo"].build(layers=6, device="meta")
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (2, 4)
    assert GENERATOR_PRESETS["hunyuanvideo"].num_layers == 60


@pytest.mark.parametrize("layers", [0, 31])
def test_a_depth_that_the_preset_lacks_is_refused(layers):
    with pytest.raises(ModelError, match="30 layers"):
        GENERATOR_PRESETS["wan2.1-1.3b"].build(layers=layers, device="meta")


def test_a_clip_smaller_than_a_token_is_refused():
    with pytest.raises(ShapeError, match="16 x 16"):
        GENERATOR_PRESETS["wan2.1-1.3b"].grid(height=8)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ModelError, match="'wan'; there are wan2"):
        generator_preset("wan")
