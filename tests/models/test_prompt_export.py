"""Exported prompts against what the adapter feeds the language model."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import llm_reference
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ConflictError, UnsupportedError
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import PromptReduction
from tubelet.models.accelerate import accelerate
from tubelet.models.prompt_export import export_prompt
from tubelet.recipes import FastV, RandomPrompt, VisionZip
from tubelet.testing import tiny_llm

HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
hosts = pytest.mark.parametrize("name", HOSTS)
BATCH = [[4], [4, 4]]


@dataclass(frozen=True, kw_only=True)
class Pairs(PromptReduction):
    """Averages each token with the next into the second of the two."""

    identity: ClassVar = {}

    def plan(self, ctx: PromptContext) -> TokenAssignment:
        every = torch.arange(ctx.num_tokens)[None]
        return TokenAssignment.merge(every | 1, every[:, 1::2], torch.ones(every.shape))


def fed(model: Any, inputs: dict[str, Tensor], recipe: PromptReduction) -> list[dict[str, Any]]:
    """Arguments of every call of the language model during an answer of two tokens."""
    calls: list[dict[str, Any]] = []
    with accelerate(model, recipe):
        # Registered behind the adapter's own, so it sees what that one made of the call.
        hook = llm_reference.text_model(model).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    hook.remove()
    return calls


def axes(positions: Tensor, row: int) -> Tensor:
    """[axes, S] of one prompt."""
    whole = positions[None] if positions.ndim == 2 else positions[-3:]
    return whole[:, row]


@hosts
@pytest.mark.parametrize(("policy", "side"), [("keep", "left"), ("compact", "right")])
def test_export_is_what_the_language_model_gets(name, policy, side):
    model, recipe = HOSTS[name], RandomPrompt(keep_ratio=0.3, positions=policy)
    videos = [[4], [4]] if name == "smolvlm" else BATCH
    inputs = tiny_llm.prompt(name, videos, question=(9, 6), side=side)
    export = export_prompt(model, inputs, recipe)
    first, second = fed(model, inputs, recipe)
    embeds = first["inputs_embeds"]
    width = embeds.shape[1]
    for row, prompt in enumerate(export.prompts):
        room = width - prompt.length
        part = slice(room, width) if side == "left" else slice(0, prompt.length)
        assert torch.equal(export.embeddings[row], embeds[row, part])
        assert torch.equal(
            torch.tensor(prompt.positions), axes(first["position_ids"], row)[:, part]
        )
        if side == "left":
            answers = axes(second["position_ids"], row)[:, -1]
            assert answers.tolist() == [prompt.next_position] * len(answers)
        assert prompt.decode_offset == prompt.next_position - prompt.length
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert ids[torch.tensor(prompt.columns)].tolist() == prompt.ids
        assert prompt.whole_length == len(ids)
    planes = first.get("deepstack_visual_embeds") or []
    assert [len(own) for own in export.planes] == [len(planes)] * len(export.prompts)
    for number, plane in enumerate(planes):
        own = torch.cat([p[number][p[number].abs().sum(1) > 0] for p in export.planes])
        assert torch.equal(own, plane)


@hosts
def test_an_engine_that_follows_the_export_gives_the_same_answer(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    recipe = RandomPrompt(keep_ratio=0.4)
    prompt = export_prompt(model, inputs, recipe).prompts[0]
    # By hand from the dense prompt: columns and positions of the export, no cache, no tubelet.
    dense = llm_reference.whole(model, name, inputs, tiny_llm.HOSTS[name].placeholder)
    kept = torch.isin(dense.video.nonzero()[:, 0], torch.tensor(prompt.columns)).nonzero()[:, 0]
    reference = llm_reference.without(dense, kept)
    positions = torch.tensor(prompt.positions)
    assert torch.equal(positions, reference.positions.reshape(-1, prompt.length)[: len(positions)])
    tokens, _ = llm_reference.generate(model, reference, 3)
    with accelerate(model, recipe):
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer[0, inputs["input_ids"].shape[1] :].tolist() == tokens


@hosts
def test_kept_places_are_those_of_the_plan(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    recipe = RandomPrompt(keep_ratio=0.25)
    (video,) = export_prompt(model, inputs, recipe).prompts[0].videos
    with accelerate(model, recipe) as handle, torch.no_grad():
        model(**inputs)
        assert handle.assignment is not None
        assert video.kept == handle.assignment[0].anchor[0].tolist()
    assert (video.group, video.weight) == (None, None)
    assert video.grid == (4, 4, 4)


def test_merged_tokens_carry_their_matrix():
    model, inputs = HOSTS["llava_onevision"], tiny_llm.prompt("llava_onevision")
    export = export_prompt(model, inputs, Pairs())
    (video,) = export.prompts[0].videos
    assert video.kept == list(range(1, 64, 2))
    assert video.group == [n // 2 for n in range(64)]
    assert video.weight == [0.5] * 64


def test_statistics_of_the_vision_tower_are_read():
    model, inputs = HOSTS["qwen2_5_vl"], tiny_llm.prompt("qwen2_5_vl")
    recipe = VisionZip(keep_ratio=0.4)
    export = export_prompt(model, inputs, recipe)
    assert torch.equal(export.embeddings[0], fed(model, inputs, recipe)[0]["inputs_embeds"][0])


@hosts
def test_nothing_dropped_is_the_dense_prompt(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name)
    export = export_prompt(model, inputs, RandomPrompt(keep_ratio=1.0, positions="compact"))
    dense = llm_reference.whole(model, name, inputs, tiny_llm.HOSTS[name].placeholder)
    assert torch.equal(export.embeddings[0], dense.embeds[0])
    assert export.prompts[0].columns == list(range(inputs["input_ids"].shape[1]))
    own = torch.tensor(export.prompts[0].positions)
    assert torch.equal(own, dense.positions.reshape(own.shape))


def test_files_hold_the_plan_and_the_embeddings(tmp_path):
    model, inputs = HOSTS["qwen3_vl"], tiny_llm.prompt("qwen3_vl", BATCH)
    export = export_prompt(model, inputs, RandomPrompt(keep_ratio=0.5))
    data = json.loads(export.to_json(tmp_path / "plan.json").read_text())
    assert (data["kind"], data["schema"]) == ("tubelet prompt", 1)
    assert data["recipe"] == {"recipe": "RandomPrompt", **RandomPrompt(keep_ratio=0.5).to_dict()}
    assert data["prompts"][1]["columns"] == export.prompts[1].columns
    tensors = load_file(export.save_embeddings(tmp_path / "prompt.safetensors"))
    assert tensors.keys() == {"embeds.0", "embeds.1", "plane.0.0", "plane.0.1", "plane.1.0",
                              "plane.1.1"}  # fmt: skip
    assert torch.equal(tensors["embeds.1"], export.embeddings[1])


def test_what_cannot_be_exported_is_refused_and_the_model_stays_clean():
    model, inputs = HOSTS["qwen2_5_vl"], tiny_llm.prompt("qwen2_5_vl")
    with pytest.raises(UnsupportedError, match="decides inside the model"):
        export_prompt(model, inputs, FastV())
    with pytest.raises(UnsupportedError, match="no video"):
        export_prompt(model, {"input_ids": inputs["input_ids"]}, RandomPrompt())
    with accelerate(model, RandomPrompt()), pytest.raises(ConflictError, match="already"):
        export_prompt(model, inputs, RandomPrompt())
    export_prompt(model, inputs, RandomPrompt())
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks
