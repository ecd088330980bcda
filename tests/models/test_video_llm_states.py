"""Caches that go on, calls that are interrupted, and several models or threads at once."""

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ConflictError, UnsupportedError
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import PromptReduction, param
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.recipes import AShape, FastV, RandomPrompt, TidalDecode, ZipCache
from tubelet.testing import catalogue_llm, tiny_llm

HOSTS = {name: tiny_llm.build(name) for name in ("qwen3_vl", "llava_onevision", "internvl")}
HALF = RandomPrompt(keep_ratio=0.5)
SPARSE = AShape(block=(16, 16), sink=16, window=16)
ZIP, TIDAL = ZipCache(every=3, sampled=0), TidalDecode(layers=(0, 2), tokens=9)
BOUND = 2e-5
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
hosts = pytest.mark.parametrize("name", HOSTS)
stages = pytest.mark.parametrize("recipes", [(HALF,), (FastV(),), (HALF, FastV())], ids=len)


@dataclass(frozen=True, kw_only=True)
class First(PromptReduction):
    """Keeps the first tokens: many or few, by what the first one holds."""

    identity: ClassVar = {}
    limit: float = param(0.0, "first channel of the first token")

    def plan(self, ctx: PromptContext) -> TokenAssignment:
        num = 10 if float(ctx.hidden[0, 0, 0]) > self.limit else 30
        return TokenAssignment.keep(torch.arange(num)[None], ctx.num_tokens)


def answer(model: Any, inputs: dict[str, Any], num: int = 6) -> Any:
    return model.generate(**inputs, max_new_tokens=num, do_sample=False)[0, -num:]


# Caches that go on


@hosts
@stages
@torch.no_grad()
def test_a_cache_of_the_caller_s_knows_its_prompt(name, recipes):
    from transformers import DynamicCache

    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    with accelerate(model, *recipes):
        wanted = answer(model, inputs)
        held = DynamicCache()
        model.generate(**inputs, max_new_tokens=3, do_sample=False, past_key_values=held)
        found = model(input_ids=wanted[None, 2:3], past_key_values=held)
        assert int(found.logits[0, -1].argmax()) == wanted[3]
        for given in (DynamicCache(), None):
            out = model(**inputs, past_key_values=given, return_dict=False)
            held = next(part for part in out if hasattr(part, "get_seq_length"))
            found = model(input_ids=wanted[None, :1], past_key_values=held)
            assert int(found.logits[0, -1].argmax()) == wanted[1]


@hosts
@torch.no_grad()
def test_a_cache_goes_on_under_the_same_recipes_only(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    step = torch.tensor([[7]])
    with accelerate(model, FastV()):
        held = model(**inputs).past_key_values
        wanted = model(input_ids=step, past_key_values=copy.deepcopy(held)).logits
    for others in ((FastV(layer=3),), (HALF,), (HALF, FastV())):
        with (
            accelerate(model, *others),
            pytest.raises(UnsupportedError, match="was filled under FastV;"),
        ):
            model(input_ids=step, past_key_values=held)
    with accelerate(model, FastV()):
        assert torch.equal(model(input_ids=step, past_key_values=held).logits, wanted)


@hosts
@stages
@torch.no_grad()
def test_a_second_video_behind_a_prompt_is_refused(name, recipes):
    with accelerate(HOSTS[name], *recipes):
        held = HOSTS[name](**tiny_llm.prompt(name)).past_key_values
        with pytest.raises(UnsupportedError, match="no further video"):
            HOSTS[name](**tiny_llm.prompt(name, seed=3), past_key_values=held)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
@stages
@pytest.mark.parametrize("with_mask", [True, False])
@torch.no_grad()
def test_several_samples_of_a_prompt_go_on(name, recipes, with_mask):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(6,))
    width = inputs["input_ids"].shape[1]
    with accelerate(model, *recipes):
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            do_sample=True,
            top_k=1,
            num_return_sequences=2,
            return_dict_in_generate=True,
        )
        mask = torch.ones(4, width + 2, dtype=torch.long)
        found = model(
            input_ids=out.sequences[:, -1:],
            past_key_values=out.past_key_values,
            **({"attention_mask": mask} if with_mask else {}),
        ).logits[:, -1]
    assert torch.equal(found.argmax(-1), wanted[:, width + 2].repeat_interleave(2))


@hosts
@torch.no_grad()
def test_padding_that_the_caller_does_not_know_of_is_masked(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(6,))
    seen: list[float] = []

    @dataclass(frozen=True, kw_only=True)
    class Look(PromptReduction):
        identity: ClassVar = {}

        def plan(self, ctx: PromptContext) -> None:
            seen.append(float(ctx.hidden[0, 0, 0]))

    with accelerate(model, Look()):
        model(**inputs)
    step = torch.tensor([[20], [21]])
    with accelerate(model, First(limit=sum(seen) / 2)):
        out = model(**inputs)
        assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - 34
        found = model(input_ids=step, past_key_values=out.past_key_values).logits[:, -1]
        for row in range(2):
            alone = tiny_llm.prompt(name, seed=row, question=(6,))
            held = model(**alone).past_key_values
            wanted = model(input_ids=step[row : row + 1], past_key_values=held).logits[0, -1]
            assert (found[row] - wanted).abs().max() < BOUND


@hosts
@torch.no_grad()
def test_answers_behind_right_padding_stand_behind_their_prompt(name):
    model = HOSTS[name]
    inputs = tiny_llm.prompt(name, [[4], [4]], question=(9, 6), side="right")
    step = torch.tensor([[20], [21]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], 1)
    with accelerate(model, HALF):
        held = model(**inputs).past_key_values
        found = model(input_ids=step, past_key_values=held, attention_mask=mask).logits[:, -1]
        for row, words in enumerate((9, 6)):
            alone = model(**tiny_llm.prompt(name, seed=row, question=(words,))).past_key_values
            wanted = model(input_ids=step[row : row + 1], past_key_values=alone).logits[0, -1]
            assert (found[row] - wanted).abs().max() < BOUND


@hosts
@pytest.mark.parametrize("with_mask", [True, False])
@torch.no_grad()
def test_a_cache_may_be_cut_back_to_its_video_but_not_into_it(name, with_mask):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    other = {key: x.clone() for key, x in inputs.items()}
    other["input_ids"][0, -3:] = torch.tensor([11, 12, 13])
    mask = {"attention_mask": inputs["attention_mask"]} if with_mask else {}
    with accelerate(model, HALF):
        wanted = model(**other).logits[0, -1]
        held = model(**inputs).past_key_values
        held.crop(-3)
        found = model(input_ids=other["input_ids"][:, -3:], past_key_values=held, **mask)
        assert (found.logits[0, -1] - wanted).abs().max() < BOUND
        held.crop(-20)
        with pytest.raises(UnsupportedError, match="cut back into its video"):
            model(input_ids=other["input_ids"][:, -3:], past_key_values=held)


# Interruptions


@hosts
@pytest.mark.parametrize("recipe", [HALF, FastV(), SPARSE, ZIP], ids=lambda r: r.name)
@pytest.mark.parametrize("how", ["generate", "forward"])
@torch.no_grad()
def test_an_interrupted_call_is_forgotten(name, recipe, how):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    dense = model.model(**inputs).last_hidden_state
    text = adapter_for(model).text_model(model)

    def interrupt(*call: Any) -> None:
        raise KeyboardInterrupt

    with accelerate(model, recipe):
        wanted = catalogue_llm.answer(model, inputs)
        for place in (text.layers[3].mlp, model.lm_head):
            hook = place.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs) if how == "generate" else model(**inputs)
            hook.remove()
            assert torch.equal(model.model(**inputs).last_hidden_state, dense)
        found = catalogue_llm.answer(model, inputs)
        assert torch.equal(found[1], wanted[1])
    assert torch.equal(model.model(**inputs).last_hidden_state, dense)


# Several at once


def test_generating_from_two_threads_is_refused():
    model, inputs = HOSTS["qwen3_vl"], tiny_llm.prompt("qwen3_vl")
    said: list[str] = []
    started: list[bool] = []

    def other(*call: Any) -> None:
        for run in (model.generate, model):
            try:
                run(**inputs)
            except UnsupportedError as error:
                said.append(str(error))

    def meanwhile(*call: Any) -> None:
        if not started:
            started.append(True)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    with accelerate(model, HALF):
        wanted = answer(model, inputs)
        hook = model.lm_head.register_forward_pre_hook(meanwhile)
        found = answer(model, inputs)
        hook.remove()
        assert torch.equal(found, wanted)
        assert torch.equal(answer(model, inputs), wanted)
    assert ["generating" in text for text in said] == [True, True]


@pytest.mark.parametrize("recipe", [FastV(), SPARSE, ZIP, TIDAL], ids=lambda r: r.name)
def test_models_of_one_config_are_not_mixed_up(recipe):
    first, inputs = tiny_llm.build("qwen3_vl", 1), tiny_llm.prompt("qwen3_vl")
    second = type(first)(first.config).eval()
    dense = [catalogue_llm.answer(model, inputs)[1] for model in (first, second)]
    with accelerate(first, recipe):
        wanted = catalogue_llm.answer(first, inputs)[1]
        with pytest.raises(ConflictError, match="shares its config"):
            accelerate(second, recipe)
        assert torch.equal(catalogue_llm.answer(first, inputs)[1], wanted)
        assert torch.equal(catalogue_llm.answer(second, inputs)[1], dense[1])
    assert torch.equal(catalogue_llm.answer(first, inputs)[1], dense[0])
    with accelerate(second, recipe):
        assert not torch.equal(catalogue_llm.answer(second, inputs)[1], dense[1])


@hosts
def test_an_accelerated_model_is_neither_copied_nor_saved(name):
    with accelerate(HOSTS[name], HALF):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedError, match=r"remove\(\) the recipes first"):
                way(HOSTS[name])


# Training and compiling


@pytest.mark.parametrize("recipe", [SPARSE, ZIP], ids=lambda r: r.name)
def test_gradient_checkpointing_is_refused_where_layers_act(recipe):
    model, inputs = tiny_llm.build("llava_onevision").train(), tiny_llm.prompt("llava_onevision")
    model.gradient_checkpointing_enable()
    with accelerate(model, recipe), pytest.raises(UnsupportedError, match="cannot replay"):
        model(**inputs)


@hosts
def test_labels_and_named_places_of_logits_are_refused_where_they_would_be_others(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    with accelerate(model, FastV()), pytest.raises(UnsupportedError, match="labels are for"):
        model(**inputs, labels=inputs["input_ids"])
    with accelerate(model, HALF), pytest.raises(UnsupportedError, match="logits_to_keep names"):
        model(**inputs, logits_to_keep=torch.tensor([3]))


@pytest.mark.parametrize("recipe", [SPARSE, TIDAL], ids=lambda r: r.name)
def test_a_compiled_forward_gives_the_same(recipe):
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    torch.compiler.reset()
    with accelerate(model, recipe):
        wanted = catalogue_llm.answer(model, inputs)[1]
    model.forward = torch.compile(model.forward, backend="eager")
    with accelerate(model, recipe):
        assert (catalogue_llm.answer(model, inputs)[1] - wanted).abs().max() < BOUND
    torch.compiler.reset()
