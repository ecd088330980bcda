"""What a caller of `generate` sees and says is about the whole prompt."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tubelet.core.errors import UnsupportedError
from tubelet.models.accelerate import accelerate
from tubelet.recipes import AShape, FastV, RandomPrompt, ZipCache
from tubelet.testing import catalogue_llm, tiny_llm

HOSTS = {name: tiny_llm.build(name) for name in ("qwen3_vl", "llava_onevision", "internvl")}
HALF = RandomPrompt(keep_ratio=0.5)
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
hosts = pytest.mark.parametrize("name", HOSTS)


class Seen(StoppingCriteria):
    """Remembers what it was shown, and stops behind so many tokens in total."""

    def __init__(self, most: int) -> None:
        self.most, self.ids = most, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ids.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.most)


class SeenToo(LogitsProcessor):
    def __init__(self) -> None:
        self.ids = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(input_ids.clone())
        return scores


class Stream:
    def __init__(self) -> None:
        self.parts = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.parts.append(torch.tensor([-1]))


@hosts
@pytest.mark.parametrize("copies", [{}, {"num_beams": 2}, {"num_return_sequences": 2}], ids=str)
def test_what_looks_at_the_prompt_is_shown_all_of_it(name, copies):
    inputs = tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    width, criterion, processor = inputs["input_ids"].shape[1], Seen(10_000), SeenToo()
    fronts = []

    def allowed(number: int, tokens: Tensor) -> list[int]:
        fronts.append(tokens[:width])
        return list(range(128))

    with accelerate(HOSTS[name], HALF):
        HOSTS[name].generate(
            **inputs,
            max_new_tokens=3,
            do_sample="num_return_sequences" in copies,
            stopping_criteria=StoppingCriteriaList([criterion]),
            logits_processor=LogitsProcessorList([processor]),
            prefix_allowed_tokens_fn=allowed,
            **copies,
        )
    for seen, first in ((processor.ids, 0), (criterion.ids, 1)):
        assert [ids.shape[1] - width for ids in seen] == [first, first + 1, first + 2]
        wanted = inputs["input_ids"].repeat_interleave(len(seen[0]) // 2, 0)
        assert all(torch.equal(ids[:, :width], wanted) for ids in seen)
    for front in fronts:
        assert any(torch.equal(front, row) for row in inputs["input_ids"])
    assert len({tuple(front.tolist()) for front in fronts}) == 2


@hosts
def test_streamers_get_the_whole_prompt_first(name):
    inputs, stream = tiny_llm.prompt(name), Stream()
    with accelerate(HOSTS[name], HALF):
        found = HOSTS[name].generate(**inputs, max_new_tokens=3, do_sample=False, streamer=stream)
    assert torch.equal(stream.parts[0], inputs["input_ids"][0])
    assert torch.cat(stream.parts).tolist() == [*found[0].tolist(), -1]


@hosts
def test_a_limit_in_total_stops_where_it_says(name):
    inputs = tiny_llm.prompt(name)
    most = inputs["input_ids"].shape[1] + 4
    with accelerate(HOSTS[name], HALF):
        for criterion in (Seen(most), MaxLengthCriteria(most)):
            limits = StoppingCriteriaList([criterion])
            found = HOSTS[name].generate(
                **inputs, max_new_tokens=9, do_sample=False, stopping_criteria=limits
            )
            assert found.shape[1] == most
            assert list(limits) == [criterion]


def test_limits_of_the_model_s_own_settings_count_the_whole_prompt():
    model, inputs = tiny_llm.build("qwen3_vl"), tiny_llm.prompt("qwen3_vl")
    model.generation_config.max_length = inputs["input_ids"].shape[1] + 4
    with accelerate(model, HALF):
        assert (
            model.generate(**inputs, do_sample=False).shape[1] == model.generation_config.max_length
        )
    model.generation_config.max_length = None
    with accelerate(model, HALF):
        found = model.generate(**inputs, do_sample=False)
    assert found.shape == model.generate(**inputs, do_sample=False).shape


@hosts
@pytest.mark.parametrize(
    "recipe",
    [HALF, FastV(), AShape(block=(16, 16), sink=16, window=16), ZipCache(every=3, sampled=0)],
    ids=lambda r: r.name,
)
def test_padding_is_padding_also_without_a_mask(name, recipe):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[4], [4]], question=(19, 6))
    bare = {key: x for key, x in inputs.items() if key != "attention_mask"}
    with accelerate(model, recipe):
        wanted = catalogue_llm.answer(model, inputs)
        found = catalogue_llm.answer(model, bare)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_padding_that_ends_answers_is_no_padding_without_a_mask():
    # transformers cannot tell either.
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    model.generation_config.eos_token_id = [3, tiny_llm.PAD]
    inputs["input_ids"][0, :2] = tiny_llm.PAD
    bare = {key: x for key, x in inputs.items() if key != "attention_mask"}
    with accelerate(model, HALF):
        wanted = catalogue_llm.answer(model, inputs)
        assert torch.equal(catalogue_llm.answer(model, bare)[1], wanted[1])


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
@pytest.mark.parametrize("recipe", [HALF, FastV()], ids=lambda r: r.name)
def test_ids_of_32_bits_are_taken(name, recipe):
    inputs = tiny_llm.prompt(name)
    with accelerate(HOSTS[name], recipe):
        wanted = catalogue_llm.answer(HOSTS[name], inputs)
        short = {**inputs, "input_ids": inputs["input_ids"].int()}
        assert torch.equal(catalogue_llm.answer(HOSTS[name], short)[1], wanted[1])


def test_guidance_by_a_second_prompt_is_refused():
    model, inputs = HOSTS["llava_onevision"], tiny_llm.prompt("llava_onevision")
    other = {"guidance_scale": 2.0, "negative_prompt_ids": torch.randint(5, 90, (1, 60))}
    dense = catalogue_llm.answer(model, inputs, **other)
    with accelerate(model, HALF), pytest.raises(UnsupportedError, match="a second prompt"):
        model.generate(**inputs, max_new_tokens=2, **other)
    assert torch.equal(catalogue_llm.answer(model, inputs, **other)[1], dense[1])


@hosts
@pytest.mark.parametrize("recipe", [HALF, FastV()], ids=lambda r: r.name)
def test_masks_that_hide_video_tokens_are_refused(name, recipe):
    inputs = tiny_llm.prompt(name)
    spots = (inputs["input_ids"][0] == tiny_llm.HOSTS[name].placeholder).nonzero()[:, 0]
    inputs["attention_mask"][0, spots[5:8]] = 0
    with accelerate(HOSTS[name], recipe), pytest.raises(UnsupportedError, match="hides tokens"):
        HOSTS[name](**inputs)
