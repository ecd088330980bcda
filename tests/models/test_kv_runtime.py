"""Recipes for key-value caches on video language models, against dense caches and loops."""

import copy
from dataclasses import replace
from typing import Any

import kv_reference
import llm_reference
import pytest
import torch
from torch import Tensor

from tubelet.core.errors import ConflictError, ShapeError, UnsupportedError
from tubelet.core.recipe import KVPolicy, Recipe
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.recipes import (
    DyCokeDecoding,
    FastV,
    PyramidDrop,
    RandomPrompt,
    TidalDecode,
    ToMe,
    ZipCache,
    catalogue,
)
from tubelet.testing import catalogue_llm, tiny_llm
from tubelet.testing.catalogue import snapshot, spying, survives_serialisation
from tubelet.testing.catalogue_llm import assert_host_untouched, assert_same

HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
STEPS, BOUND = 7, 5e-4
ZIP = ZipCache(every=3, sampled=0)
TIDAL = TidalDecode(layers=(0, 2), tokens=9)
COKE = DyCokeDecoding(layer=2)
TRIED = (ZIP, TIDAL, COKE)
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
hosts = pytest.mark.parametrize("name", HOSTS)
each = pytest.mark.parametrize("recipe", TRIED, ids=lambda r: r.name)


@pytest.fixture(scope="module", autouse=True)
def _ran_before() -> None:
    """Transformers puts hooks of its own on a model when it first runs."""
    for name, model in HOSTS.items():
        model(**tiny_llm.prompt(name))


def prompts(name: str) -> dict[str, Tensor]:
    """Two prompts, the second with left padding."""
    return tiny_llm.prompt(name, [[4], [4]], question=(9, 6))


def answer(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return catalogue_llm.answer(model, inputs, max_new_tokens=STEPS, **options)


def text_model(name: str) -> Any:
    return adapter_for(HOSTS[name]).text_model(HOSTS[name])


def played(name: str, recipe: Recipe, inputs: dict[str, Tensor]) -> kv_reference.Dense:
    if isinstance(recipe, ZipCache):
        return kv_reference.Zip(recipe.every)
    if isinstance(recipe, TidalDecode):
        return kv_reference.Tidal(recipe.layers, recipe.tokens)
    placeholder = tiny_llm.HOSTS[name].placeholder
    video = llm_reference.whole(HOSTS[name], name, inputs, placeholder).video
    return kv_reference.DyCoke(2, 20, video.nonzero()[:, 0].tolist())


def behind_cuts(recipe: Recipe) -> Recipe:
    """The recipe with what it reads chosen behind layer 2."""
    if isinstance(recipe, TidalDecode):
        return replace(recipe, layers=(2,))
    return replace(recipe, layer=3) if isinstance(recipe, DyCokeDecoding) else recipe


def close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], wanted[0])
    assert (found[1] - wanted[1]).abs().max() < BOUND


def test_every_recipe_for_caches_is_tried_here():
    known = {name for name, cls in catalogue().items() if issubclass(cls, KVPolicy)}
    assert known == {recipe.name for recipe in TRIED}
    for recipe in TRIED:
        survives_serialisation(recipe)


@hosts
@each
def test_greedy_answer_equals_attention_by_hand(name, recipe):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    with kv_reference.playing(model, text_model(name), played(name, recipe, inputs)):
        wanted = answer(model, inputs)
    dense = answer(model, inputs)
    for implementation in ("sdpa", "eager"):
        text_model(name).set_attn_implementation(implementation)
        with accelerate(model, recipe) as handle:
            close(answer(model, inputs), wanted)
        assert handle.report().acted(str(recipe))
    text_model(name).set_attn_implementation("sdpa")
    assert (dense[1] - wanted[1]).abs().max() > 100 * BOUND, "nothing is shown"


@hosts
@each
@pytest.mark.parametrize("other", [RandomPrompt(), FastV(layer=2)], ids=lambda r: r.name)
def test_answer_to_a_shortened_prompt_equals_attention_by_hand(name, recipe, other):
    recipe = behind_cuts(recipe) if isinstance(other, FastV) else recipe
    if isinstance(recipe, DyCokeDecoding):
        pytest.skip("where the video is left is not known to the reference")
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    with (
        kv_reference.playing(model, text_model(name), played(name, recipe, inputs)),
        accelerate(model, other),
    ):
        wanted = answer(model, inputs)
    with accelerate(model, other, recipe):
        close(answer(model, inputs), wanted)


@hosts
@each
def test_identity_point_is_bit_identical_to_dense(name, recipe):
    catalogue_llm.identity_equals_dense(HOSTS[name], recipe, prompts(name))


@hosts
@each
def test_remove_restores_the_language_model(name, recipe):
    catalogue_llm.remove_restores(HOSTS[name], recipe, prompts(name))
    recipes = behind_cuts(recipe), FastV(layer=2), RandomPrompt()
    before = snapshot(HOSTS[name])
    with accelerate(HOSTS[name], *recipes):
        answer(HOSTS[name], prompts(name))
    assert_host_untouched(HOSTS[name], before)
    assert "generate" not in vars(HOSTS[name])


@hosts
@each
def test_padded_batch_equals_its_prompts(name, recipe):
    singles = [
        tiny_llm.prompt(name, seed=seed, question=(words,)) for seed, words in enumerate((9, 6))
    ]
    catalogue_llm.batch_equals_singles(HOSTS[name], recipe, prompts(name), singles)


@each
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_videos_of_different_lengths_equal_singles(name, recipe):
    together = tiny_llm.prompt(name, [[4], [2]], question=(6, 9))
    with accelerate(HOSTS[name], recipe):
        found = answer(HOSTS[name], together)
        for sample, (frames, words) in enumerate(((4, 6), (2, 9))):
            alone = tiny_llm.prompt(name, [[frames]], seed=sample, question=(words,))
            wanted = answer(HOSTS[name], alone)
            close((found[0][[sample]], found[1][[sample]]), wanted)


@hosts
@each
def test_one_run_leaves_no_state_for_the_next(name, recipe):
    other = tiny_llm.prompt(name, [[4]], seed=5)
    catalogue_llm.state_never_survives(HOSTS[name], recipe, prompts(name), other)


@hosts
@each
def test_an_error_inside_a_decision_leaves_the_model_usable(name, recipe):
    model, inputs = HOSTS[name], prompts(name)
    with accelerate(model, recipe):
        wanted = answer(model, inputs)
    before, armed = snapshot(model), True

    def explode(ctx: Any, plan: Any) -> None:
        if armed:
            raise KeyError

    with accelerate(model, spying(recipe, explode)):
        with pytest.raises(KeyError):
            answer(model, inputs)
        armed = False
        assert_same(answer(model, inputs), wanted, "the run after an error")
    assert_host_untouched(model, before)


@hosts
@pytest.mark.parametrize("recipes", [(ZIP,), (TIDAL,), (COKE,), (ZIP, TIDAL)], ids=str)
def test_own_decoding_loop_equals_generate(name, recipes):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    with accelerate(model, *recipes), torch.no_grad():
        wanted = answer(model, inputs)[0][0].tolist()
        out, tokens = model(**inputs), []
        for _ in range(STEPS):
            tokens.append(int(out.logits[0, -1].argmax()))
            # A copy of the cache goes on just as well, and the other is as it was.
            held = copy.deepcopy(out.past_key_values)
            out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=held)
    assert tokens == wanted


@hosts
@each
def test_sampling_several_answers_to_a_prompt_runs_each_for_itself(name, recipe):
    model, inputs = HOSTS[name], prompts(name)
    with accelerate(model, recipe):
        torch.manual_seed(0)
        found = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2, top_k=1
        )
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted.repeat_interleave(2, 0))


@hosts
@each
def test_text_alone_is_taken(name, recipe):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[]], question=(20,))
    dense = answer(model, inputs)
    with accelerate(model, recipe) as handle:
        found = answer(model, inputs)
    acted = handle.report().acted(str(recipe))
    assert acted == (recipe is not COKE)
    if not acted:
        assert_same(found, dense, "nothing to choose from")


# Bytes


@hosts
def test_bytes_in_the_report_are_those_of_the_cache(name):
    model, inputs = HOSTS[name], prompts(name)
    plain = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    for recipe in (ZIP, TIDAL):
        with accelerate(model, recipe) as handle:
            cache = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True
            ).past_key_values
        held, would = handle.report().cache_bytes
        assert would == dense
        mine, queries = tensor_bytes(cache), 0
        if recipe is ZIP:
            # 6 tokens were generated and seen: two chunks of three, so nothing waits.
            assert all(layer.num_waiting == 0 for layer in cache.layers)
            assert held < 0.45 * dense
        else:
            assert held == dense
        assert held == mine + queries
    said = handle.report().to_dict()
    assert said["cache_bytes"] == [held, would]
    assert "key-value cache: " in str(handle.report())


def tensor_bytes(cache: Any) -> int:
    """Bytes of the storages of all tensors that hang on the layers of a cache."""
    seen: dict[int, int] = {}

    def visit(x: Any) -> None:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes() if x.numel() else 0
        elif isinstance(x, list | tuple):
            for item in x:
                visit(item)
        elif hasattr(x, "__dict__"):
            for item in vars(x).values():
                visit(item)

    for layer in cache.layers:
        visit([layer.keys, layer.values, getattr(layer, "chunks", [])])
    return sum(seen.values())


def test_queries_that_wait_are_counted():
    model, inputs = HOSTS["qwen3_vl"], tiny_llm.prompt("qwen3_vl")
    with accelerate(model, replace(ZIP, every=50)) as handle:
        result = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
    # 4 tokens were seen, in 4 layers, with 4 heads of 8 channels, in float32.
    waiting = 4 * 4 * 4 * 8 * 4
    assert handle.report().cache_bytes[0] == tensor_bytes(result.past_key_values) + waiting


def test_report_tells_how_much_was_read_and_stored():
    model, inputs = HOSTS["llava_onevision"], tiny_llm.prompt("llava_onevision")
    num = inputs["input_ids"].shape[1]
    with accelerate(model, ZipCache(sampled=0), TIDAL) as handle:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    report = handle.report().to_dict()
    # Two steps read 9 of the prompt's tokens and one or two new ones, in layers 1 and 3.
    assert [(c["site"][-1], c["before"], c["after"]) for c in report["changes"]] == [
        ("1", num + 1.5, 9),
        ("3", num + 1.5, 9),
    ]
    four = round(0.6 * num)
    assert report["stored"] == {
        "ZipCache(sampled=0.0): 4 bits": 4 * four,
        "ZipCache(sampled=0.0): 2 bits": 4 * (num - four),
    }


# What is refused


def refused(name: str, recipe: Recipe, **options: Any) -> str:
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    before = snapshot(model)
    with accelerate(model, recipe), pytest.raises(UnsupportedError) as caught:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
    assert_host_untouched(model, before)
    return str(caught.value)


@hosts
@each
def test_other_kinds_of_generation_are_refused_with_the_reason(name, recipe):
    assert "beam search" in refused(name, recipe, num_beams=2)
    assert "assisted decoding" in refused(name, recipe, prompt_lookup_num_tokens=2)
    assert "(static)" in refused(name, recipe, cache_implementation="static")
    assert "(offloaded)" in refused(name, recipe, cache_implementation="offloaded")
    assert "use_cache=False" in refused(name, recipe, use_cache=False)
    assert "prefill_chunk_size" in refused(name, recipe, prefill_chunk_size=16)
    assert "draft model" in refused(name, recipe, assistant_model=HOSTS[name])


def test_generation_defaults_of_the_model_are_heeded():
    model = tiny_llm.build("qwen3_vl")
    model.generation_config.num_beams = 3
    with accelerate(model, TIDAL), pytest.raises(UnsupportedError, match="beam search"):
        model.generate(**tiny_llm.prompt("qwen3_vl"), max_new_tokens=2)


@each
def test_caches_of_other_makes_are_refused(recipe):
    from transformers import DynamicCache, StaticCache

    model, inputs = HOSTS["internvl"], tiny_llm.prompt("internvl")
    config = text_model("internvl").config
    static = StaticCache(config=config, max_cache_len=200)
    assert "StaticLayer" in refused("internvl", recipe, past_key_values=static)
    offloaded = DynamicCache(config=config)
    offloaded.offloading = True
    assert "offloaded" in refused("internvl", recipe, past_key_values=offloaded)
    filled = model(**inputs).past_key_values
    step = {"input_ids": torch.tensor([[7]]), "past_key_values": filled}
    with accelerate(model, recipe), pytest.raises(UnsupportedError, match="without the recipes"):
        model(**step)


@each
def test_direct_calls_without_cache_or_of_several_tokens_are_refused(recipe):
    model, inputs = HOSTS["qwen2_5_vl"], tiny_llm.prompt("qwen2_5_vl")
    with accelerate(model, recipe), torch.no_grad():
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            model(**inputs, use_cache=False)
        held = model(**inputs).past_key_values
        with pytest.raises(UnsupportedError, match="not 2 at once"):
            model(input_ids=torch.tensor([[7, 8]]), past_key_values=held)
        with pytest.raises(UnsupportedError, match="be reordered"):
            held.reorder_cache(torch.tensor([0]))
        with pytest.raises(UnsupportedError, match="give tokens back"):
            held.crop(-1)


@each
def test_an_empty_default_cache_of_the_user_is_taken(recipe):
    from transformers import DynamicCache

    model, inputs = HOSTS["smolvlm"], tiny_llm.prompt("smolvlm")
    with accelerate(model, recipe):
        wanted = answer(model, inputs)
        for held in (DynamicCache(config=text_model("smolvlm").config), DynamicCache()):
            assert_same(answer(model, inputs, past_key_values=held), wanted, "another cache")


def test_cuts_inside_what_shares_its_choice_are_refused():
    model = HOSTS["llava_onevision"]
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"from 2 on, but PyramidDrop.* layer 3"):
        accelerate(model, COKE, PyramidDrop(layers=(3,)))
    assert_host_untouched(model, before)
    accelerate(model, COKE, PyramidDrop(layers=(1,))).remove()
    accelerate(model, ZIP, PyramidDrop(layers=(1, 2, 3))).remove()


@each
def test_a_step_from_a_cache_records_gradients(recipe):
    model, inputs = copy.deepcopy(HOSTS["internvl"]).requires_grad_(), tiny_llm.prompt("internvl")
    step = {"input_ids": torch.tensor([[7]])}
    with accelerate(model, recipe):
        with torch.no_grad():
            held = model(**inputs).past_key_values
            wanted = model(**step, past_key_values=copy.deepcopy(held)).logits
        found = model(**step, past_key_values=held).logits
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_two_recipes_of_one_kind_conflict_and_encoders_refuse():
    with pytest.raises(ConflictError, match="both decide cache reads"):
        accelerate(HOSTS["internvl"], TIDAL, COKE)
    with pytest.raises(UnsupportedError, match="prompts, layers and caches only"):
        accelerate(HOSTS["internvl"], ToMe())


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4).long(), torch.zeros(1, 0).long()])
def test_places_of_a_wrong_shape_are_an_error(wrong):
    recipe = replace(TIDAL)
    object.__setattr__(recipe, "read", lambda ctx: wrong)
    with accelerate(HOSTS["internvl"], recipe), pytest.raises(ShapeError, match="must read"):
        answer(HOSTS["internvl"], tiny_llm.prompt("internvl"))


def test_bits_of_a_wrong_number_are_an_error():
    recipe = replace(ZIP)
    for wrong in (torch.full((3,), 4), torch.full((84,), 5)):
        object.__setattr__(recipe, "store", lambda ctx, wrong=wrong: wrong)
        with (
            accelerate(HOSTS["internvl"], recipe),
            pytest.raises(ShapeError, match=r"ZipCache.* needs one of"),
        ):
            answer(HOSTS["internvl"], tiny_llm.prompt("internvl"))


def test_prompts_that_read_different_numbers_need_a_mask_of_four_axes():
    from tubelet.models.kv_runtime import _gathered

    k = torch.randn(2, 2, 6, 4)
    columns = [torch.tensor([[0, 2, 3]]), torch.tensor([[1, 2], [4, 5]])]
    with pytest.raises(UnsupportedError, match="mask of four axes"):
        _gathered(k, k, None, columns)
    keys, _, mask = _gathered(k, k, torch.ones(2, 1, 1, 6).bool(), columns)
    assert mask[:, 0, 0].tolist() == [[True] * 3, [True, True, False]]
    assert torch.equal(keys[1, 1, :2], k[1, 1, 4:])
    assert _gathered(k, k, None, columns[:1] * 2)[2] is None
