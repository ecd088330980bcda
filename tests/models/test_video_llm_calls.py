"""Calls of video language models that are refused, direct calls, lengths and what is returned."""

import copy
import inspect
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tubelet.core.errors import ConflictError, ShapeError, TubeletError, UnsupportedError
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.recipes import EVS, DivPrune, FastV, RandomPrompt, ToMe
from tubelet.testing import catalogue_llm, tiny_llm
from tubelet.testing.catalogue import snapshot
from tubelet.testing.catalogue_llm import assert_host_untouched

HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
for _name, _model in HOSTS.items():
    # On their first call the hosts put hooks of their own on.
    _model(**tiny_llm.prompt(_name))
# A run that was refused changed nothing.
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
hosts = pytest.mark.parametrize("name", HOSTS)
HALF = RandomPrompt(keep_ratio=0.5)


def refused(model: Any, recipes: Any, inputs: dict[str, Any], **options: Any) -> str:
    """The message of the refusal; the model comes back untouched and usable."""
    before = snapshot(model)
    with accelerate(model, *recipes), pytest.raises(TubeletError) as caught:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
    assert_host_untouched(model, before)
    return str(caught.value)


@hosts
def test_prompt_without_video_is_refused(name):
    said = refused(HOSTS[name], [HALF], tiny_llm.prompt(name, [[], []], question=(4, 6)))
    assert "holds no video" in said
    assert "remove()" in said


@hosts
def test_direct_call_without_video_is_refused(name):
    with accelerate(HOSTS[name], HALF), pytest.raises(UnsupportedError, match="no video"):
        HOSTS[name](**tiny_llm.prompt(name, [[]]))


@hosts
def test_batch_with_one_text_only_prompt_runs(name):
    model = HOSTS[name]
    if name == "smolvlm":
        pytest.skip("the tiny host's images are stacked per prompt with video")
    inputs = tiny_llm.prompt(name, [[4], []], question=(6, 8))
    alone = model.generate(**tiny_llm.prompt(name, [[]], seed=1, question=(8,)), max_new_tokens=3)
    with accelerate(model, HALF):
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(found[1, -3:], alone[0, -3:])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "video_llava"])
def test_images_beside_a_video_are_refused(name):
    inputs = {**tiny_llm.prompt(name), "pixel_values": torch.zeros(1, 3, 8, 8)}
    with accelerate(HOSTS[name], HALF), pytest.raises(UnsupportedError, match="holds images"):
        HOSTS[name](**inputs)


@hosts
def test_more_videos_than_placeholders_are_refused(name):
    inputs = tiny_llm.prompt(name)
    placeholder = tiny_llm.HOSTS[name].placeholder
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == placeholder).nonzero()[0, 0]] = 7
    before = snapshot(HOSTS[name])
    with accelerate(HOSTS[name], HALF), pytest.raises(ShapeError, match="placeholders"):
        HOSTS[name](**{**inputs, "input_ids": ids})
    assert_host_untouched(HOSTS[name], before)


def test_video_across_two_prompts_is_refused():
    inputs = tiny_llm.prompt("qwen2_5_vl", [[2], [2]])
    grid = torch.tensor([[4, 8, 8]])
    with (
        accelerate(HOSTS["qwen2_5_vl"], HALF),
        pytest.raises(ShapeError, match="would lie in two prompts"),
    ):
        HOSTS["qwen2_5_vl"](**{**inputs, "video_grid_thw": grid})


@hosts
def test_fewer_tokens_than_are_protected_are_refused(name):
    said = refused(HOSTS[name], [EVS(keep_ratio=0.1)], tiny_llm.prompt(name))
    assert "EVS always keeps 16 of 64 tokens" in said
    assert "keep_ratio to 0.25" in said


def test_layer_inside_deepstack_is_refused_with_the_first_free_one():
    before = snapshot(HOSTS["qwen3_vl"])
    with pytest.raises(UnsupportedError, match="from layer 2 on"):
        accelerate(HOSTS["qwen3_vl"], FastV(layer=1))
    assert_host_untouched(HOSTS["qwen3_vl"], before)


@hosts
def test_two_recipes_for_one_prompt_conflict(name):
    with pytest.raises(ConflictError, match="both decide prompt"):
        accelerate(HOSTS[name], HALF, DivPrune())


@hosts
def test_encoder_recipe_is_refused(name):
    with pytest.raises(UnsupportedError, match="prompts, layers and caches only"):
        accelerate(HOSTS[name], ToMe())


@hosts
def test_cache_that_cannot_be_shortened_is_refused(name):
    from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

    layers = [DynamicSlidingWindowLayer(sliding_window=512) for _ in range(4)]
    said = refused(
        HOSTS[name], [FastV()], tiny_llm.prompt(name), past_key_values=Cache(layers=layers)
    )
    assert "DynamicSlidingWindowLayer cannot be shortened" in said


@hosts
def test_filled_cache_draft_model_and_other_inputs_are_refused(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    filled = model(**inputs, use_cache=True).past_key_values
    assert "filled already" in refused(model, [HALF], inputs, past_key_values=filled)
    assert "draft model" in refused(model, [HALF], inputs, assistant_model=model)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert "input_ids" in refused(model, [HALF], rest, inputs_embeds=embeds)
    assert "prefill_chunk_size" in refused(model, [FastV()], inputs, prefill_chunk_size=16)


def test_prompt_that_ends_with_its_video_is_refused():
    inputs = tiny_llm.prompt("video_llava")
    last = int((inputs["input_ids"][0] == tiny_llm.VIDEO).nonzero()[-1]) + 1
    cut = {key: x[:, :last] if x.ndim == 2 else x for key, x in inputs.items()}
    assert "ends with its video" in refused(HOSTS["video_llava"], [HALF], cut)


@pytest.mark.parametrize("chunk", [16, 40])
@hosts
def test_chunked_prefill_of_a_shortened_prompt_is_the_same(name, chunk):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    if (
        name.startswith("qwen")
        and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters
    ):
        pytest.skip("this version of the host takes no prompt in chunks, without recipes too")
    with accelerate(model, HALF):
        whole = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        parts = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=chunk
        )
    assert torch.equal(whole, parts)


@hosts
@pytest.mark.parametrize("recipes", [(HALF,), (FastV(),), (HALF, FastV())], ids=len)
@pytest.mark.parametrize("with_mask", [True, False])
def test_own_decoding_loop_equals_generate(name, recipes, with_mask):
    if name.startswith("qwen") and with_mask and HALF not in recipes:
        pytest.skip("without position_ids the dense host takes no mask in such a loop either")
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    with accelerate(model, *recipes), torch.no_grad():
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        out, mask, tokens = model(**inputs, use_cache=True), inputs["attention_mask"], []
        for _ in range(4):
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            given = {"attention_mask": mask} if with_mask else {}
            cache = copy.deepcopy(out.past_key_values)
            if HALF in recipes:
                # Without it Qwen itself remembers the offsets of its latest prompt only.
                model(**tiny_llm.prompt(name, seed=7))
            out = model(input_ids=tokens[-1], past_key_values=cache, **given)
    if with_mask:
        assert torch.equal(torch.cat(tokens, 1), wanted)
    else:
        assert torch.equal(tokens[0], wanted[:, :1])


@hosts
def test_right_padded_logits_equal_those_of_singles(name):
    model = HOSTS[name]
    inputs = tiny_llm.prompt(name, [[4], [4]], question=(9, 6), side="right")
    with accelerate(model, HALF, FastV()) as handle, torch.no_grad():
        logits = model(**inputs).logits
        for sample, words in enumerate((9, 6)):
            alone = model(**tiny_llm.prompt(name, seed=sample, question=(words,))).logits
            assert (logits[sample, alone.shape[1] - 1] - alone[0, -1]).abs().max() < 2e-5
    assert handle.report().tokens_per_layer[0] > handle.report().tokens_per_layer[-1]


@hosts
def test_loss_counts_the_labels_that_are_left(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == tiny_llm.HOSTS[name].placeholder, -100)
    with accelerate(model, HALF), torch.no_grad():
        out = model(**inputs, labels=labels)
    assert out.loss.isfinite()
    assert out.logits.shape[1] < inputs["input_ids"].shape[1]


@hosts
def test_lengths_in_total_count_the_whole_prompt(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    width = inputs["input_ids"].shape[1]
    with accelerate(model, HALF):
        for given in (
            {"max_length": width + 4},
            {"generation_config": GenerationConfig(max_length=width + 4)},
            {"max_new_tokens": 4},
        ):
            found = model.generate(**inputs, do_sample=False, **given)
            assert found.shape == (1, width + 4)
            assert torch.equal(found[:, :width], inputs["input_ids"])


def test_compiled_decoding_with_a_static_cache_gives_the_same(monkeypatch):
    # transformers compiles it by itself on a GPU only.
    from transformers import CompileConfig

    model = tiny_llm.build("qwen3_vl")
    inputs = tiny_llm.prompt("qwen3_vl", [[4], [4]], question=(9, 6))
    with accelerate(model, HALF, FastV()):
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *a, **k: True)
        found = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            cache_implementation="static",
            compile_config=CompileConfig(backend="eager", fullgraph=False, mode=None),
        )
    assert torch.equal(found, wanted)


def test_gradient_checkpointing_is_refused_inside_the_model():
    model = tiny_llm.build("llava_onevision").train()
    model.gradient_checkpointing_enable()
    with (
        accelerate(model, FastV()),
        pytest.raises(UnsupportedError, match="cannot replay"),
    ):
        model(**tiny_llm.prompt("llava_onevision"))


def test_generate_takes_the_prompt_as_a_positional_argument():
    model, inputs = HOSTS["qwen3_vl"], tiny_llm.prompt("qwen3_vl")
    ids = inputs.pop("input_ids")
    with accelerate(model, HALF):
        found = model.generate(ids, **inputs, max_new_tokens=3, do_sample=False)
        wanted = model.generate(input_ids=ids, **inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, wanted)


@hosts
def test_generate_is_the_host_s_own_behind_remove(name):
    model = HOSTS[name]
    with accelerate(model, HALF):
        assert "generate" in vars(model)
        assert inspect.signature(model.generate) == inspect.signature(
            type(model).generate.__get__(model)
        )
    assert "generate" not in vars(model)


@hosts
def test_the_base_model_on_its_own_stays_dense(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    with torch.no_grad():
        dense = model.model(**inputs).last_hidden_state
        with accelerate(model, HALF, FastV()):
            for run in (
                lambda: model.generate(**inputs, max_new_tokens=2),
                lambda: model(**inputs),
            ):
                run()
                assert torch.equal(model.model(**inputs).last_hidden_state, dense)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("recipe", [HALF, FastV()], ids=str)
def test_nan_in_dropped_tokens_stays_out_where_prompts_come_to_differ(name, recipe):
    inputs = tiny_llm.prompt(name, [[4], [2]], question=(6, 14))
    catalogue_llm.dropped_is_never_read(HOSTS[name], recipe, inputs)


@hosts
def test_report_and_assignment_tell_what_went(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    words = float(inputs["attention_mask"].sum()) / 2
    with accelerate(model, HALF, FastV(layer=3, keep_ratio=0.25)) as handle:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    report = handle.report().to_dict()
    assert report["tokens_in"] == words
    assert report["tokens_per_layer"] == [words - 32] * 3 + [words - 56]
    assert [(c["before"], c["after"]) for c in report["changes"]] == [(64, 32), (32, 8)]
    assert handle.assignment is not None
    assert [(a.num_in, a.num_out) for a in handle.assignment] == [(64, 8)] * 2


@hosts
def test_saved_plan_comes_back(name, tmp_path):
    import tubelet

    with accelerate(HOSTS[name], HALF) as handle:
        HOSTS[name](**tiny_llm.prompt(name))
        path = handle.save(tmp_path / "plan.json")
    plan = tubelet.load_plan(path)
    assert plan.recipes == (HALF,)
    accelerate(HOSTS[name], plan).remove()


# What the adapters count on inside transformers


@hosts
def test_hosts_still_have_what_their_adapters_name(name):
    model, adapter = HOSTS[name], adapter_for(HOSTS[name])
    assert "video prompt" not in adapter.lacks(model)
    tower = model.model.get_submodule(adapter.tower.path)
    for layer in tower.get_submodule(adapter.tower.layers):
        layer.get_submodule(adapter.tower.attention)
    for layer in adapter.text_model(model).layers:
        assert hasattr(layer, "self_attn")


def test_drift_of_a_host_is_a_refusal():
    model = tiny_llm.build("llava_onevision")
    model.model.speech_model = model.model.language_model
    del model.model.language_model
    with pytest.raises(UnsupportedError, match="not where this version of tubelet looks"):
        accelerate(model, HALF)


def test_symbols_of_transformers_are_where_they_were():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import DynamicLayer, StaticLayer
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.vision_utils import get_vision_window_index

    taken = inspect.signature(create_causal_mask).parameters
    assert {"config", "inputs_embeds", "attention_mask", "past_key_values"} <= taken.keys()
    assert {"position_ids", "layer_idx"} <= taken.keys()
    taken = inspect.signature(get_vision_window_index).parameters
    assert {"grid_thw", "spatial_merge_size", "window_size", "patch_size"} <= taken.keys()
    for table in (ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS):
        assert "sdpa" in table
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert callable(interface.register)
    for layer in (DynamicLayer, StaticLayer):
        assert callable(layer.get_seq_length)
