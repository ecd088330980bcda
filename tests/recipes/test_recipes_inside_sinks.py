"""What the paper on visual attention sinks claims, for the choice of tokens."""

from dataclasses import replace

import pytest
import torch
from prompt_contexts import GivenStatistics, kept, layer_context

from tubelet.core.prompt import LayerContext
from tubelet.recipes import VAR, FastV

CHANNELS = 1024


def sink_context(rows: torch.Tensor, sinks: list[int]) -> LayerContext:
    """Tokens that the last word attends to as in `rows` [H, N], some of them sinks."""
    heads, num = rows.shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, CHANNELS, generator=generator)
    text = torch.randn(3, CHANNELS, generator=generator)
    text[0, 7], text[0, 500], hidden[sinks, 500] = 400, -300, 200
    # Huge in a channel that is nothing to the first token.
    hidden[1, 9] = 200
    attention = torch.full((heads, num + 1, num), 0.5)
    attention[:, -1] = rows
    return layer_context(hidden, text=text, stats=GivenStatistics(attention))


def test_VAR_rules_out_sinks_that_FastV_falls_for():
    rows = torch.tensor([[0.15, 0.10, 0.02, 0.06, 0.12, 0.05]]).repeat(2, 1)
    context = sink_context(rows, sinks=[0])
    assert kept(FastV(keep_ratio=0.5).plan(context)) == [0, 1, 4]
    assert kept(VAR(keep_ratio=0.5, left=0).plan(context)) == [1, 3, 4]


def test_VAR_hands_what_sinks_give_away_to_the_other_tokens_in_proportion():
    rows = torch.tensor([[0.20, 0.10, 0.0, 0.30], [0.0, 0.12, 0.13, 0.0]])
    # The first head gives away 0.08: token 1 gets 0.02, token 3 the rest.
    context = sink_context(rows, sinks=[0])
    wanted = torch.tensor([[0.12, 0.12, 0.0, 0.36], [0.0, 0.12, 0.13, 0.0]])
    recipe = VAR()
    assert torch.allclose(recipe._redistributed(rows, recipe._sinks(context)), wanted)
    assert kept(replace(recipe, keep_ratio=0.25).plan(context)) == [3]
    assert kept(replace(recipe, keep_ratio=0.5).plan(context)) == [1, 3]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([[0.30, 0.10, 0.05, 0.05]], "mostly on its sink"),
        ([[0.05, 0.04, 0.03, 0.02]], "elsewhere than the video"),
    ],
)
def test_VAR_leaves_heads_alone_that_look(rows, why):
    given = torch.tensor(rows)
    context, recipe = sink_context(given, sinks=[0]), VAR(left=0)
    assert torch.equal(recipe._redistributed(given, recipe._sinks(context)), given), why
    assert kept(replace(recipe, keep_ratio=0.5).plan(context)) == [0, 1]


def test_VAR_finds_sinks_in_the_channels_in_which_the_first_token_is_hugest():
    context = sink_context(torch.full((1, 8), 0.1), sinks=[2, 5])
    assert VAR()._sinks(context).nonzero()[:, 0].tolist() == [2, 5]
    assert VAR(channels=1)._sinks(context).sum() == 0


def test_VAR_judges_how_huge_a_channel_is_beside_the_token_s_others():
    context = sink_context(torch.full((1, 8), 0.1), sinks=[2])
    # As large in that channel as a sink, and nearly so in all others.
    context.hidden[0, 4] = 150
    context.hidden[0, 4, 500] = 200
    context.hidden[0, 6] *= 1e-3
    context.hidden[0, 6, 500] = 0.2
    assert VAR()._sinks(context).nonzero()[:, 0].tolist() == [2, 6]
