"""What the papers claim of reductions inside a language model that words steer."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from prompt_contexts import GivenStatistics, kept, layer_context

from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.core.prompt import LayerContext, PromptContext
from tubelet.core.recipe import PromptReduction
from tubelet.models.accelerate import accelerate
from tubelet.recipes import DivPrune, MustDrop, SparseVLM
from tubelet.testing import catalogue_llm, tiny_llm


def rated_context(hidden: torch.Tensor, logits: torch.Tensor, words: torch.Tensor) -> LayerContext:
    """Video tokens [N, C] rated by the last words of a prompt; all others attend to nothing."""
    num, asked = len(hidden), len(words)
    attention = torch.full((2, num + 2 + asked, num), 1e-4)
    attention[:, -asked:] = logits.exp()
    stats = GivenStatistics(attention, range(num + 2, num + 2 + asked))
    text = torch.cat([torch.ones(2, hidden.shape[1]), words])
    context = layer_context(hidden, stats=stats, text=text)
    return replace(context, num_question=asked, embeds=hidden[None], text_embeds=text)


def test_SparseVLM_asks_only_the_words_that_the_video_is_about():
    hidden = torch.eye(12, 8).cumsum(0)
    hidden[:, 0] = 3
    words = torch.zeros(3, 8)
    words[1, 0] = 2
    logits = torch.zeros(2, 3, 12)
    # The two other words want the first tokens, more than the rater wants the last.
    logits[:, 0, :4], logits[:, 2, :4], logits[:, 1, 8:] = 5, 5, 1
    context = rated_context(hidden, logits, words)
    plan = SparseVLM(keep_ratios=(4 / 12,), recycled=0).plan(context)
    assert kept(plan) == [8, 9, 10, 11]


def test_SparseVLM_finds_its_raters_in_what_entered_the_first_layer():
    hidden, words = torch.ones(6, 8), torch.zeros(2, 8)
    words[0] = 1
    logits = torch.zeros(2, 2, 6)
    logits[:, 0, 0], logits[:, 1, 5] = 1, 1
    context = rated_context(hidden, logits, words)
    later = replace(context, hidden=-context.hidden)
    for ctx in (context, later):
        assert kept(SparseVLM(keep_ratios=(1 / 6,), recycled=0).plan(ctx)) == [0]
    assert kept(SparseVLM(keep_ratios=(1 / 6,), recycled=0).plan(replace(later, embeds=None))) == [
        5
    ]


def test_SparseVLM_recycles_the_best_of_what_goes_as_means_around_density_peaks():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator)
    # Of 30 that go the best 12 are recycled: two heaps of six, far apart.
    hidden[10:16] = 9 + 0.1 * hidden[10:16]
    hidden[16:22] = -9 + 0.1 * hidden[16:22]
    logits = torch.arange(40, 0, -1.0).expand(2, 1, 40) / 10
    context = rated_context(hidden, logits, torch.ones(1, 8))
    plan = SparseVLM(keep_ratios=(0.25,), recycled=0.4).plan(context)
    assert plan is not None
    plan.check()
    assert plan.num_out == 10 + 2
    assert plan.anchor[0, :10].tolist() == list(range(10))
    out = plan.reduce(context.hidden)[0]
    assert torch.equal(out[:10], hidden[:10])
    assert torch.allclose(out[10], hidden[10:16].mean(0), atol=1e-5)
    assert torch.allclose(out[11], hidden[16:22].mean(0), atol=1e-5)
    assert plan.index[0, 22:].tolist() == [-1] * 18
    assert plan.anchor[0, 10] in range(10, 16)
    assert plan.anchor[0, 11] in range(16, 22)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_SparseVLM_keeps_shares_of_what_entered_the_model(name):
    model, inputs = tiny_llm.build(name), tiny_llm.prompt(name)
    shares = SparseVLM(layers=(2, 3), keep_ratios=(0.75, 0.25))
    with accelerate(model, DivPrune(keep_ratio=0.5), shares) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    text = float((inputs["input_ids"] != tiny_llm.HOSTS[name].placeholder).sum())
    # 8 of 32 go, of which 2 become 1; then 17 of 25, of which 5 become 1.
    assert handle.report().tokens_per_layer == [text + n for n in (32, 32, 24 + 1, 8 + 1)]


def test_SparseVLM_takes_one_share_or_one_for_each_layer():
    SparseVLM(layers=(1, 2), keep_ratios=(0.5,))
    with pytest.raises(RecipeError, match="one for each of 2 layers"):
        SparseVLM(layers=(1, 2), keep_ratios=(0.5, 0.4, 0.3))


@pytest.mark.parametrize("name", tiny_llm.HOSTS)
def test_what_entered_the_model_is_shown_as_the_host_made_it(name):
    model, inputs = tiny_llm.build(name), tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    recipe = catalogue_llm.placed(SparseVLM(layers=(2,), keep_ratios=(0.5,)), name)
    seen: list[Any] = []
    hook = model.model.get_submodule(
        "text_model" if name == "smolvlm" else "language_model"
    ).register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    found = catalogue_llm.decisions(model, recipe, inputs)
    hook.remove()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    for sample, (ctx, _) in enumerate(found):
        video = ids[sample] == tiny_llm.HOSTS[name].placeholder
        words = seen[0][sample, mask[sample] & ~video]
        assert torch.equal(ctx.text_embeds, words)
        assert ctx.text_embeds.shape == ctx.text.shape
        rows = seen[0][sample, video].tolist()
        assert ctx.embeds.shape[1] == 64
        assert all(row in rows for row in ctx.embeds[0].tolist())


def must_context(words: torch.Tensor, saliency: torch.Tensor, key: Any = None) -> LayerContext:
    """Video tokens that some words [Q, N] attend to."""
    asked, num = words.shape
    attention = torch.cat([torch.ones(num, num), words])[None].repeat(2, 1, 1)
    # Only the mean over heads counts.
    attention[0, num:], attention[1, num:] = 0.5 * words, 1.5 * words
    context = layer_context(
        torch.zeros(num, 4), stats=GivenStatistics(attention, range(num, num + asked))
    )
    return replace(context, vision={key or ("received", -1): saliency[None]})


def test_MustDrop_drops_what_all_words_and_each_word_pass_over():
    words = torch.full((4, 10), 0.2)
    # Too little from each word but not from all; one word alone; nearly nothing.
    words[:, 1] = 0.045
    words[:, 2], words[0, 2] = 0.0, 0.07
    words[:, 3] = 0.001
    rank = torch.arange(10.0, 0, -1)
    rules = MustDrop(share=0.02, single=0.05, key_ratio=0.1)
    assert kept(rules.plan(must_context(words, rank))) == [0, 1, 2, *range(4, 10)]


def test_MustDrop_never_drops_the_key_tokens_of_the_tower():
    words = torch.full((4, 10), 0.2)
    words[:, 5:] = 0.0
    saliency = torch.zeros(10)
    saliency[7], saliency[9] = 2, 1
    rules = MustDrop(share=0.05, single=0.05, key_ratio=0.2)
    assert kept(rules.plan(must_context(words, saliency))) == [0, 1, 2, 3, 4, 7, 9]
    found = replace(rules, saliency="class").plan(must_context(words, saliency, ("class", -1)))
    assert kept(found) == [0, 1, 2, 3, 4, 7, 9]


@pytest.mark.parametrize("name", ["video_llava", "internvl", "qwen3_vl", "smolvlm"])
def test_MustDrop_sees_the_tower_s_statistics_of_the_tokens_that_are_left(name):
    model, inputs = tiny_llm.build(name), tiny_llm.prompt(name, [[4], [4]], question=(9, 6))
    recipe = MustDrop(layers=(2, 3), share=0.015, single=0.05)
    found = catalogue_llm.decisions(model, recipe, inputs)
    first, then = found[:2], found[2:]
    for (before, plan), (after, _) in zip(first, then, strict=True):
        assert before.statistic("received", -1).shape == (1, 64)
        assert abs(float(before.statistic("received", -1).mean())) > 0
        assert torch.equal(
            after.statistic("received", -1), plan.reduce(before.statistic("received", -1))
        )
        assert before.statistic("received", -1).std() > 0
    with pytest.raises(UnsupportedError, match="asks for received of layer -1"):
        first[0][0].statistic("class", -1)


@dataclass(frozen=True, kw_only=True)
class Looks(PromptReduction):
    """Asks for what MustDrop asks for, and keeps everything."""

    identity: ClassVar = {}

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("received", -1)})

    def plan(self, ctx: PromptContext) -> None:
        return None


@pytest.mark.parametrize("name", tiny_llm.HOSTS)
@pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
def test_MustDrop_is_shown_the_statistics_that_prompts_are_decided_by(name):
    model, inputs = tiny_llm.build(name), tiny_llm.prompt(name, [[2, 2]])
    ((inside, _), *_) = catalogue_llm.decisions(model, MustDrop(layers=(2,)), inputs)
    prompts = catalogue_llm.decisions(model, Looks(), inputs)
    wanted = torch.cat([ctx.statistic("received", -1) for ctx, _ in prompts], 1)
    assert torch.equal(inside.statistic("received", -1), wanted)


def test_MustDrop_refuses_a_class_token_that_is_not_there():
    with pytest.raises(UnsupportedError, match="no class token"):
        accelerate(tiny_llm.build("qwen3_vl"), MustDrop(layers=(2,), saliency="class"))
    with pytest.raises(RecipeError, match="class or received"):
        MustDrop(saliency="keys")
