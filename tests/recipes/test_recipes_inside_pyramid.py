"""What the papers claim of reductions at several layers of a language model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from prompt_contexts import GivenStatistics, kept, layer_context, noise, prompt_context

from tubelet.models.accelerate import accelerate
from tubelet.models.layer_statistics import PromptStatistics
from tubelet.recipes import AIMMerging, AIMPruning, PyramidDrop
from tubelet.testing import tiny_llm


def test_PyramidDrop_keeps_at_each_depth_half_of_what_is_left_by_the_last_token():
    attention = torch.full((2, 30, 16), 0.9)
    attention[:, -1] = torch.arange(16) / 100
    # Only the mean over heads puts both of these on top.
    attention[:, -1, :2] = torch.tensor([[0.9, 0.0], [0.0, 0.9]])
    context = layer_context(torch.zeros(16, 8), layer=8, stats=GivenStatistics(attention))
    assert kept(PyramidDrop().plan(context)) == [0, 1, *range(10, 16)]


def test_PyramidDrop_leaves_an_eighth_to_the_deepest_layers():
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    whole = inputs["input_ids"].shape[1]
    with accelerate(model, PyramidDrop(layers=(1, 2, 3))) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert handle.report().tokens_per_layer == [whole, whole - 32, whole - 48, whole - 56]


def merged_by_hand(frame: torch.Tensor, left: int) -> tuple[list[list[int]], torch.Tensor]:
    """Members and means of what is left of a frame [P, C], pair by pair."""
    groups = [[place] for place in range(len(frame))]
    while len(groups) > left:
        means = torch.stack([frame[group].mean(0) for group in groups])
        unit = torch.nn.functional.normalize(means, dim=-1)
        similar = unit[0::2] @ unit[1::2].T
        best, partner = similar.max(1)
        order = best.argsort(descending=True)[: min(len(groups) // 2, len(groups) - left)]
        for source in order.tolist():
            groups[2 * int(partner[source]) + 1] += groups[2 * source]
        gone = {2 * source for source in order.tolist()}
        groups = [group for place, group in enumerate(groups) if place not in gone]
    return groups, torch.stack([frame[group].mean(0) for group in groups])


@pytest.mark.parametrize("keep_ratio", [0.25, 0.4, 0.8])
def test_AIMMerging_averages_the_most_similar_tokens_of_each_frame_round_by_round(keep_ratio):
    tokens = noise(3)
    plan = AIMMerging(keep_ratio=keep_ratio).plan(prompt_context(tokens))
    assert plan is not None
    plan.check()
    left = -(-16 * keep_ratio // 1)
    found = plan.reduce(tokens.reshape(1, 48, -1))[0].unflatten(0, (3, int(left)))
    for number, frame in enumerate(tokens.reshape(3, 16, -1)):
        groups, means = merged_by_hand(frame, int(left))
        assert torch.allclose(found[number], means, atol=1e-5)
        for group in groups:
            slots = plan.index[0, torch.tensor(group) + 16 * number]
            assert len(set(slots.tolist())) == 1
    assert plan.size.sum() == 48


def graph(seed: int = 0) -> PromptStatistics:
    """4 words, 6 video tokens, 2 words; two heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 12, 8, generator=generator)
    return PromptStatistics(
        q, k, 0.35, torch.ones(12).bool(), torch.arange(4, 10), torch.tensor([10, 11])
    )


def ranks_by_hand(stats: PromptStatistics, rounds: int, temperature: float) -> torch.Tensor:
    heads = []
    for q, k in zip(stats.q, stats.k, strict=True):
        share = torch.zeros(12, 12)
        for i in range(12):
            share[i, : i + 1] = (q[i] @ k[: i + 1].T * 0.35 / temperature).softmax(0)
        rank = torch.full((12,), 1 / 12)
        for _ in range(rounds):
            rank = torch.stack([sum(rank[i] * share[i, j] for i in range(12)) for j in range(12)])
        heads.append(rank)
    return torch.stack(heads).square().mean(0).sqrt()[4:10]


def aim_context(stats: Any, layer: int, entered: int = 6) -> Any:
    context = layer_context(torch.zeros(6, 8), layer=layer, num_layers=28, stats=stats)
    return replace(context, embeds=torch.zeros(1, entered, 8))


@pytest.mark.parametrize("seed", range(4))
def test_AIMPruning_ranks_by_page_rank_on_sharpened_attention_of_text_and_video(seed):
    stats = graph(seed)
    ranks = ranks_by_hand(stats, 5, 0.1)
    for num, layer in ((3, 17), (1, 20)):
        plan = AIMPruning().plan(aim_context(stats, layer))
        assert kept(plan) == ranks.topk(num).indices.sort().values.tolist()


def test_AIMPruning_takes_a_fixed_share_of_what_entered_the_model_at_each_layer():
    for layer, num in ((14, None), (16, 5), (18, 3), (20, 1), (24, 1)):
        plan = AIMPruning().plan(aim_context(graph(), layer, entered=8))
        # At layer 14 there may still be 7 of 8 and there are 6.
        assert (None if plan is None else plan.num_out) == num


def test_AIM_halves_compose_on_a_model():
    model, inputs = tiny_llm.build("qwen2_5_vl"), tiny_llm.prompt("qwen2_5_vl")
    text = inputs["input_ids"].shape[1] - 64
    with accelerate(model, AIMMerging(), AIMPruning(layer=1, slope=0.25)) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert handle.report().tokens_per_layer == [text + n for n in (16, 12, 8, 4)]
