"""Generation on shortened prompts against tokens removed by hand."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import llm_reference
import pytest
import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import LayerContext, PromptContext
from tubelet.core.recipe import LayerReduction, PromptReduction, Recipe, param
from tubelet.models.accelerate import accelerate
from tubelet.testing import tiny_llm

HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
STEPS, BOUND = 5, 2e-5
OLD = "mm_encoder_outputs" not in inspect.signature(HOSTS["internvl"].forward).parameters
"""Up to transformers 5.17, `generate` expands pixels instead of features."""
hosts = pytest.mark.parametrize("name", HOSTS)


def thinned(num: int, seed: int, share: float) -> Tensor:
    """Some places among `num`, in order."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, int(num * share))].sort().values


@dataclass(frozen=True, kw_only=True)
class Some(PromptReduction):
    """Keeps the places that `thinned` names for a video of that many tokens."""

    identity: ClassVar = {}
    share: float = param(0.4, "kept")

    def plan(self, ctx: PromptContext) -> TokenAssignment:
        return TokenAssignment.keep(thinned(ctx.num_tokens, 0, self.share)[None], ctx.num_tokens)


@dataclass(frozen=True, kw_only=True)
class SomeInside(LayerReduction):
    """Keeps the places that `thinned` names, in front of some layers."""

    identity: ClassVar = {}
    layers: tuple[int, ...] = param((2,), "where")
    share: float = param(0.5, "kept")

    def plan(self, ctx: LayerContext) -> TokenAssignment:
        kept = thinned(ctx.num_tokens, ctx.site.layer, self.share)
        return TokenAssignment.keep(kept[None], ctx.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Pairs(PromptReduction):
    """Averages each token with the next into the second of the two."""

    identity: ClassVar = {}

    def plan(self, ctx: PromptContext) -> TokenAssignment:
        every = torch.arange(ctx.num_tokens)[None]
        return TokenAssignment.merge(every | 1, every[:, 1::2], torch.ones(every.shape))


def answer(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[list[int], Tensor]:
    """Tokens and logits of a single prompt."""
    result = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.stack(result.logits, 1)[0]


def check(found: tuple[list[int], Tensor], wanted: tuple[list[int], Tensor]) -> None:
    assert found[0] == wanted[0]
    assert (found[1] - wanted[1]).abs().max() < BOUND


def kept_of(lengths: list[int], share: float) -> Tensor:
    """Places that `Some` keeps of videos of these many frames, among all video tokens."""
    parts, start = [], 0
    for frames in lengths:
        parts.append(thinned(frames * 16, 0, share) + start)
        start += frames * 16
    return torch.cat(parts)


def whole(name: str, inputs: dict[str, Tensor]) -> llm_reference.Whole:
    return llm_reference.whole(HOSTS[name], name, inputs, tiny_llm.HOSTS[name].placeholder)


@hosts
def test_the_reference_is_the_dense_host(name):
    inputs = tiny_llm.prompt(name)
    check(
        answer(HOSTS[name], inputs),
        llm_reference.generate(HOSTS[name], whole(name, inputs), STEPS),
    )


@hosts
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_shorter_prompt_equals_tokens_removed_by_hand(name, positions):
    inputs = tiny_llm.prompt(name)
    removed = llm_reference.without(
        whole(name, inputs), kept_of([4], 0.4), compact=positions == "compact"
    )
    wanted = llm_reference.generate(HOSTS[name], removed, STEPS)
    with accelerate(HOSTS[name], Some(positions=positions)):
        check(answer(HOSTS[name], inputs), wanted)
        check(answer(HOSTS[name], inputs, cache_implementation="static"), wanted)
        check(answer(HOSTS[name], inputs, use_cache=False), wanted)
        check(answer(HOSTS[name], inputs, prompt_lookup_num_tokens=2), wanted)


@hosts
def test_prompt_of_two_videos_equals_tokens_removed_by_hand(name):
    inputs = tiny_llm.prompt(name, [[3, 3]])
    lengths = [6] if tiny_llm.HOSTS[name].images else [3, 3]
    removed = llm_reference.without(whole(name, inputs), kept_of(lengths, 0.4))
    with accelerate(HOSTS[name], Some()):
        check(answer(HOSTS[name], inputs), llm_reference.generate(HOSTS[name], removed, STEPS))


@hosts
@pytest.mark.parametrize("anchored", [False, True], ids=["keep", "anchor"])
def test_merged_tokens_stand_at_their_anchor_or_their_earliest_member(name, anchored):
    inputs = tiny_llm.prompt(name)
    prompt = whole(name, inputs)
    spots = prompt.video.nonzero()[:, 0]
    mean = prompt.embeds.clone()
    mean[0, spots[1::2]] = (mean[0, spots[0::2]] + mean[0, spots[1::2]]) / 2
    positions = prompt.positions.clone()
    if anchored:
        positions[..., spots[1::2]] = positions[..., spots[0::2]]
    assert prompt.visual is not None
    visual = torch.isin(prompt.visual.nonzero()[:, 0], spots)
    planes = []
    for plane in prompt.planes:
        own = plane[visual]
        plane = plane.clone()
        plane[visual.nonzero()[1::2, 0]] = (own[0::2] + own[1::2]) / 2
        planes.append(plane)
    merged = llm_reference.Whole(mean, positions, prompt.video, tuple(planes), prompt.visual)
    removed = llm_reference.without(merged, torch.arange(1, len(spots), 2))
    with accelerate(HOSTS[name], Pairs(positions="anchor" if anchored else "keep")):
        check(answer(HOSTS[name], inputs), llm_reference.generate(HOSTS[name], removed, STEPS))


def inside(name: str, prompt: llm_reference.Whole, layers: tuple[int, ...]) -> list[Any]:
    """Cuts of `SomeInside` for the reference."""
    cuts, left = [], prompt.video.nonzero()[:, 0]
    for layer in layers:
        left = left[thinned(len(left), layer, 0.5)]
        others = (~prompt.video).nonzero()[:, 0]
        cuts.append((layer, torch.cat([others, left]).sort().values))
    return cuts


@hosts
@pytest.mark.parametrize("layers", [(2,), (2, 3)], ids=["one", "two"])
def test_cut_inside_equals_tokens_removed_by_hand(name, layers):
    inputs = tiny_llm.prompt(name)
    prompt = whole(name, inputs)
    cuts = inside(name, prompt, layers)
    wanted = llm_reference.generate(HOSTS[name], prompt, STEPS, cuts)
    with accelerate(HOSTS[name], SomeInside(layers=layers)):
        check(answer(HOSTS[name], inputs), wanted)
        check(answer(HOSTS[name], inputs, cache_implementation="static"), wanted)
        check(answer(HOSTS[name], inputs, use_cache=False), wanted)
        check(answer(HOSTS[name], inputs, prompt_lookup_num_tokens=2), wanted)


@hosts
def test_both_stages_equal_tokens_removed_by_hand(name):
    inputs = tiny_llm.prompt(name, [[3, 3]])
    lengths = [6] if tiny_llm.HOSTS[name].images else [3, 3]
    removed = llm_reference.without(whole(name, inputs), kept_of(lengths, 0.4))
    cuts = inside(name, removed, (2,))
    wanted = llm_reference.generate(HOSTS[name], removed, STEPS, cuts)
    with accelerate(HOSTS[name], Some(), SomeInside()):
        check(answer(HOSTS[name], inputs), wanted)


@hosts
@pytest.mark.parametrize(
    "recipes", [(Some(),), (SomeInside(),), (Some(), SomeInside())], ids=["prompt", "in", "both"]
)
def test_beam_scores_are_those_of_their_tokens_by_hand(name, recipes: tuple[Recipe, ...]):
    if OLD and tiny_llm.HOSTS[name].images and isinstance(recipes[0], SomeInside):
        pytest.skip("this version mixes up the frames of beams, without recipes too")
    together = tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    with accelerate(HOSTS[name], *recipes):
        beams = HOSTS[name].generate(
            **together,
            max_new_tokens=STEPS,
            do_sample=False,
            num_beams=3,
            num_return_sequences=2,
            output_scores=True,
            return_dict_in_generate=True,
        )
    width = together["input_ids"].shape[1]
    for number, sequence in enumerate(beams.sequences):
        sample = number // 2
        assert torch.equal(sequence[:width], together["input_ids"][sample])
        inputs = tiny_llm.prompt(name, [[4]], seed=sample, question=((9, 6)[sample],))
        prompt = whole(name, inputs)
        if isinstance(recipes[0], Some):
            prompt = llm_reference.without(prompt, kept_of([4], 0.4))
        cuts = inside(name, prompt, (2,)) if isinstance(recipes[-1], SomeInside) else []
        tokens = sequence[width:].tolist()
        _, logits = llm_reference.generate(HOSTS[name], prompt, STEPS, cuts, forced=tokens)
        likely = logits.log_softmax(-1)[torch.arange(STEPS), torch.tensor(tokens)].sum()
        assert abs(float(likely) / STEPS - float(beams.sequences_scores[number])) < BOUND


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"])
@pytest.mark.parametrize("recipes", [(Some(),), (SomeInside(),), (Some(), SomeInside())])
def test_batch_of_videos_of_different_lengths_equals_singles(name, recipes: tuple[Recipe, ...]):
    together = tiny_llm.prompt(name, [[4], [2]], question=(6, 9))
    with accelerate(HOSTS[name], *recipes):
        found = HOSTS[name].generate(**together, max_new_tokens=STEPS, do_sample=False)
        for sample, (frames, words) in enumerate(((4, 6), (2, 9))):
            single = tiny_llm.prompt(name, [[frames]], seed=sample, question=(words,))
            assert found[sample, -STEPS:].tolist() == answer(HOSTS[name], single)[0]
