"""Recipes that look at every word of a question look at a few words at a time."""

from dataclasses import replace

import pytest
import torch
from prompt_contexts import GivenStatistics, layer_context

from tubelet.core.prompt import LayerContext
from tubelet.core.recipe import LayerReduction
from tubelet.ops.rows import row_parts
from tubelet.recipes import MustDrop, PruneVidInner, SparseVLM

WORDS, NUM = 41, 30


def long_question(seed: int) -> tuple[LayerContext, list[int]]:
    """A prompt with a question of 41 words, and how many rows were read at once each time."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, WORDS, NUM, generator=generator) ** 8
    read: list[int] = []

    class Recorded(GivenStatistics):
        def rows(self, queries, softmax=True):
            read.append(len(queries))
            return super().rows(queries, softmax)

    # Words that are nearly alike: about half of them are raters.
    hidden, words = 0.1 * torch.randn(2, WORDS, 8, generator=generator)
    stats = Recorded(attention, range(WORDS))
    context = layer_context(hidden[:NUM], text=words, stats=stats)
    vision = {("received", -1): torch.rand(1, NUM, generator=generator)}
    return replace(context, num_question=WORDS, vision=vision), read


@pytest.mark.parametrize(
    "recipe",
    [
        PruneVidInner(keep_ratio=0.3),
        SparseVLM(keep_ratios=(0.3,), recycled=0),
        MustDrop(share=0.035, single=0.9, key_ratio=0.05),
    ],
    ids=lambda r: r.name,
)
def test_long_questions_are_read_in_parts_to_the_last_word(recipe: LayerReduction, monkeypatch):
    module = type(recipe).__module__
    for seed in range(4):
        ctx, read = long_question(seed)
        plan = recipe.plan(ctx)
        assert plan is not None
        assert max(read) <= 16
        assert len(read) > 1
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.row_parts", lambda rows, q, softmax=True: [rows(q, softmax)])
            whole = recipe.plan(ctx)
        assert torch.equal(plan.anchor, whole.anchor)


@pytest.mark.parametrize("num", [1, 15, 16, 17, 40])
def test_rows_come_in_order_and_each_once(num):
    asked = [part for part in row_parts(lambda q, softmax: torch.tensor([[q]]), range(num))]
    assert torch.cat(asked, 2).flatten().tolist() == list(range(num))
