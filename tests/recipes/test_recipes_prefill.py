"""What the recipes for sparse prefill decide, on prompts made by hand."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.core.recipe import SparsePrefill
from tubelet.recipes import AShape, GridAttention, VerticalSlash
from tubelet.recipes.prefill import attention_rows

SIDE, WIDTH = 4, 64
BLOCK = (16, 16)


def prompt(
    frames: Sequence[int] = (32,),
    stamps: Sequence[int] = (0,),
    question: int = 20,
    heads: int = 1,
    key_heads: int = 1,
) -> PrefillContext:
    """Videos of 4 x 4 tokens per frame, `stamps` words in front of frame after frame in turn."""
    grids = tuple(TokenGrid(frames=num, height=SIDE, width=SIDE) for num in frames)
    video, place = [-1] * 6, [0] * 6
    for number, grid in enumerate(grids):
        for frame in range(grid.frames):
            words = stamps[frame % len(stamps)]
            video += [-1] * words + [number] * grid.per_frame
            place += [0] * words + list(range(frame * 16, frame * 16 + 16))
    num = len(video) + question
    return PrefillContext(
        site=Site(name="layers.2", layer=2, num_layers=4, kind="llm"),
        grids=grids,
        query=torch.zeros(1, heads, num, WIDTH),
        key=torch.zeros(1, key_heads, num, WIDTH),
        value=torch.randn(1, key_heads, num, 8),
        scale=1.0,
        video=torch.tensor(video + [-1] * question),
        place=torch.tensor(place + [0] * question),
    )


def drawn_to(ctx: PrefillContext, tokens: Tensor, group: int = 0, channel: int = 0) -> None:
    """Let every query of a key head attend to some tokens [N] bool above all."""
    ctx.key[0, group, tokens, channel] = 1.0
    heads = slice(group * ctx.groups, (group + 1) * ctx.groups)
    ctx.query[0, heads, :, channel] = 12.0


def table(plan: AttentionPlan, ctx: PrefillContext) -> Tensor:
    """[H, N, N] pairs of tokens that are attended to, in the order of the prompt."""
    heads, num = ctx.query.shape[1], ctx.num_tokens
    if plan.mask is None:
        return torch.ones(heads, num, num, dtype=torch.bool).tril()
    tokens = plan.mask.token_mask()[0].expand(heads, -1, -1)
    order = torch.arange(num)[None] if plan.order is None else plan.order
    found = torch.empty_like(tokens)
    for head in range(heads):
        places = order[head * len(order) // heads]
        found[head, places[:, None], places] = tokens[head]
    return found.tril()


def share(plan: AttentionPlan) -> float:
    """Listed blocks, of those that dense causal attention computes."""
    rows = plan.mask.grid[0]
    return float(plan.mask.counts.float().sum(2).mean()) / (rows * (rows + 1) / 2)


def error(plan: AttentionPlan, ctx: PrefillContext) -> float:
    """|O - O_dense| / |O_dense| over all heads."""
    key, value = (x.repeat_interleave(ctx.groups, 1)[0] for x in (ctx.key, ctx.value))
    logits = ctx.query[0] @ key.mT * ctx.scale
    every = torch.ones_like(logits, dtype=torch.bool).tril()
    outs = [
        logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        for seen in (table(plan, ctx), every)
    ]
    return float((outs[0] - outs[1]).norm() / outs[1].norm())


def blocks_of(pairs: Tensor) -> Tensor:
    """Pairs of tokens [N, N] rounded up to whole blocks, as pairs of tokens up to the query."""
    missing = -len(pairs) % 16
    padded = F.pad(pairs, (0, missing, 0, missing)).unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
    whole = padded.any(3).any(1).repeat_interleave(16, 0).repeat_interleave(16, 1)
    return whole[: len(pairs), : len(pairs)].tril()


@st.composite
def policies(draw) -> SparsePrefill:
    block = (draw(st.sampled_from([8, 16, 24])), draw(st.sampled_from([8, 16, 32])))
    window = draw(st.integers(1, 60))
    sink = draw(st.integers(0, 40))
    kind = draw(st.sampled_from([AShape, VerticalSlash, GridAttention]))
    if kind is AShape:
        return AShape(block=block, window=window, sink=sink, last=draw(st.integers(0, 30)))
    if kind is GridAttention:
        boundary = draw(st.sampled_from(["none", "query", "both"]))
        return GridAttention(block=block, window=window, sink=sink, boundary=boundary)
    size = st.integers(1, 50)
    return VerticalSlash(
        block=block, window=window, sink=sink, vertical=draw(size), slash=draw(size)
    )


@settings(deadline=None, max_examples=40, derandomize=True)
@given(policies(), st.sampled_from([1, 2]), st.integers(0, 2**16))
def test_every_token_sees_its_window_and_the_sink_and_lists_hold_nothing_later(
    recipe, key_heads, seed
):
    torch.manual_seed(seed)
    ctx = prompt((4, 3), stamps=(0, 5), heads=4, key_heads=key_heads)
    ctx = replace(ctx, query=torch.randn_like(ctx.query), key=torch.randn_like(ctx.key))
    plan = recipe.plan(ctx)
    seen = table(plan, ctx)
    places = torch.arange(ctx.num_tokens)
    back = places[:, None] - places
    assert bool(seen[:, (back >= 0) & (back < recipe.window)].all())
    if isinstance(recipe, AShape | GridAttention):
        assert bool(seen[:, (back >= 0) & (places < recipe.sink)].all())
    assert plan.mask is not None
    order = places[None] if plan.order is None else plan.order
    listed = plan.mask.to_dense()[0]
    firsts = F.pad(order, (0, -len(places) % recipe.block[1]), value=len(places))
    lasts = F.pad(order, (0, -len(places) % recipe.block[0]), value=-1)
    first = firsts.unflatten(1, (-1, recipe.block[1])).amin(2)
    last = lasts.unflatten(1, (-1, recipe.block[0])).amax(2)
    visible = first[:, None] <= last[:, :, None]
    assert not bool((listed & ~visible.repeat_interleave(len(listed) // len(visible), 0)).any())


@pytest.mark.parametrize("recipe", [AShape(), VerticalSlash(), GridAttention()])
def test_prompts_within_the_window_stay_dense(recipe):
    assert replace(recipe, window=700).plan(prompt()).is_dense
    at_identity = replace(recipe, **recipe.identity)
    assert at_identity.plan(prompt()).is_dense


def test_AShape_sees_the_first_and_the_latest_tokens_and_nothing_between():
    ctx = prompt(question=21)
    num = ctx.num_tokens
    plan = AShape(block=BLOCK, window=40, sink=20).plan(ctx)
    places = torch.arange(num)
    back = places[:, None] - places
    wanted = (back >= 0) & ((back < 40) | (places < 20))
    assert torch.equal(table(plan, ctx)[0], blocks_of(wanted))
    assert plan.order is None
    # Its cost grows with the length, not with its square.
    longer = prompt((128,))
    assert share(AShape(block=BLOCK, window=40, sink=20).plan(longer)) < share(plan) / 2.5


def test_AShape_lets_the_last_tokens_see_everything():
    ctx = prompt()
    plan = AShape(block=BLOCK, window=16, sink=0, last=30).plan(ctx)
    seen = table(plan, ctx)[0]
    assert bool(seen[-30:].sum(1).eq(torch.arange(ctx.num_tokens - 29, ctx.num_tokens + 1)).all())
    assert not bool(seen[200, :100].any())


def slashed(distances: Sequence[int], columns: Tensor) -> PrefillContext:
    """Each head attends to the token some way back, and all to some columns."""
    ctx = prompt((60,), heads=len(distances))
    num = ctx.num_tokens
    own = F.normalize(torch.randn(num, WIDTH), dim=1) * 4
    own[:, 0] = 0
    ctx.key[0, 0] = own
    for head, distance in enumerate(distances):
        ctx.query[0, head, distance:] = own[:-distance] * 0.8
    ctx.key[0, 0, columns] = 0
    drawn_to(ctx, columns)
    ctx.query[0, :, :, 0] = 11.0
    return ctx


COLUMNS = torch.arange(37, 900, 61)
"""Tokens that all look at, each in a block of its own."""


def test_VerticalSlash_finds_the_columns_and_diagonals_of_each_head():
    ctx = slashed((150, 333), COLUMNS)
    recipe = VerticalSlash(block=BLOCK, window=1, vertical=len(COLUMNS), slash=2, sink=0)
    plan = recipe.plan(ctx)
    seen = table(plan, ctx)
    for column in COLUMNS.tolist():
        assert bool(seen[:, column:, column].all())
    places = torch.arange(ctx.num_tokens)
    for head, (own, other) in enumerate([(150, 333), (333, 150)]):
        assert bool(seen[head, places[own:], places[own:] - own].all())
        assert seen[head, places[other:], places[other:] - other].float().mean() < 0.35
    # Columns that lie in blocks of their own cost as little as if they were neighbours.
    assert share(plan) < 0.35
    assert error(plan, ctx) < 0.1
    window = AShape(block=BLOCK, window=192, sink=64).plan(ctx)
    assert share(window) > share(plan)
    assert error(window, ctx) > 0.4


def test_VerticalSlash_gathers_its_columns_per_key_head_and_keeps_the_first_ones():
    ctx = prompt((60,), heads=4, key_heads=2)
    drawn_to(ctx, torch.tensor([100, 400]), group=0)
    drawn_to(ctx, torch.tensor([222, 707]), group=1)
    plan = VerticalSlash(block=BLOCK, vertical=5, slash=20, window=20, sink=3).plan(ctx)
    assert plan.order.shape == (2, ctx.num_tokens)
    assert plan.order[:, :5].tolist() == [[0, 1, 2, 100, 400], [0, 1, 2, 222, 707]]
    seen = table(plan, ctx)
    assert bool(seen[:2, 400:, 400].all())
    # Its row of gathered queries aside, the other key head has no use for it.
    assert not bool(seen[2:, 600:707, 400].any())


def test_VerticalSlash_looks_at_the_last_queries_only():
    ctx = prompt((60,))
    drawn_to(ctx, torch.tensor([300]))
    drawn_to(ctx, torch.tensor([500]), channel=1)
    ctx.query[0, 0, -64:, 0] = 0
    ctx.query[0, 0, :-64, 1] = 0
    plan = VerticalSlash(block=BLOCK, vertical=1, slash=1, window=1, sink=0).plan(ctx)
    assert plan.order[0, 0] == 500


def on(ctx: PrefillContext, spacing: int, phase: int) -> Tensor:
    return (ctx.video >= 0) & (ctx.place % spacing == phase)


GRID = GridAttention(block=BLOCK, window=16, sink=0)


@pytest.mark.parametrize(("spacing", "phase"), [(16, 5), (16, 0), (4, 2)])
def test_GridAttention_finds_lines_a_frame_or_a_row_apart(spacing, phase):
    ctx = prompt((60,))
    line = on(ctx, spacing, phase)
    drawn_to(ctx, line)
    plan = GRID.plan(ctx)
    seen = table(plan, ctx)[0]
    every = torch.ones_like(seen).tril()
    # As keys all see the line, as queries the line sees all.
    assert torch.equal(seen[:, line], every[:, line])
    assert torch.equal(seen[line], every[line])
    assert error(plan, ctx) < 0.02
    assert share(plan) < (0.4 if spacing == 16 else 0.65)
    window = AShape(block=BLOCK, window=400, sink=16).plan(ctx)
    assert share(window) > share(plan)
    assert error(window, ctx) > 0.1


def test_GridAttention_counts_lines_within_the_video_and_not_within_the_prompt():
    # Words between the frames shift the line in the sequence, as time stamps do.
    ctx = prompt((60,), stamps=(3, 1, 4, 1, 5, 9, 2, 6))
    drawn_to(ctx, on(ctx, 16, 7))
    apart, blind = GRID.plan(ctx), replace(GRID, boundary="query").plan(ctx)
    assert error(apart, ctx) < 0.02
    assert error(blind, ctx) > 0.3


def test_GridAttention_asks_the_queries_of_the_video_and_not_the_question():
    ctx = prompt((60,), question=80)
    text = ctx.video < 0
    drawn_to(ctx, on(ctx, 16, 3))
    drawn_to(ctx, on(ctx, 16, 12), channel=1)
    ctx.query[0, 0, text, 0] = 0
    ctx.query[0, 0, ~text, 1] = 0
    apart, blind = GRID.plan(ctx), replace(GRID, boundary="none").plan(ctx)
    line = torch.where(on(ctx, 16, 3))[0]
    seen = table(apart, ctx)[0]
    assert torch.equal(seen[:, line], torch.ones_like(seen).tril()[:, line])
    assert error(apart, ctx) < 0.02
    assert error(blind, ctx) > 0.3


def test_GridAttention_keeps_text_whole():
    ctx = prompt((30,), stamps=(2,), question=30)
    drawn_to(ctx, on(ctx, 4, 1))
    text = ctx.video < 0
    seen = table(GRID.plan(ctx), ctx)[0]
    every = torch.ones_like(seen).tril()
    assert torch.equal(seen[text], every[text])
    assert torch.equal(seen[:, text], every[:, text])
    without = table(replace(GRID, boundary="query").plan(ctx), ctx)[0]
    assert torch.equal(without[text], every[text])
    assert not torch.equal(without[:, text], every[:, text])


def test_GridAttention_finds_the_line_of_tokens_that_a_reduction_left():
    whole = prompt((60,))
    generator = torch.Generator().manual_seed(3)
    left = (torch.rand(whole.num_tokens, generator=generator) < 0.4) | (whole.video < 0)
    ctx = replace(
        whole,
        query=whole.query[:, :, left],
        key=whole.key[:, :, left],
        value=whole.value[:, :, left],
        video=whole.video[left],
        place=whole.place[left],
    )
    drawn_to(ctx, on(ctx, 16, 9))
    assert error(GRID.plan(ctx), ctx) < 0.02


def test_GridAttention_spaces_lines_as_each_video_says():
    ctx = prompt((20, 20))
    wide = TokenGrid(frames=16, height=4, width=5)
    ctx = replace(ctx, grids=(ctx.grids[0], wide))
    spacing = torch.tensor([16, 20])[ctx.video.clamp(min=0)]
    line = (ctx.video >= 0) & (ctx.place % spacing == 6)
    drawn_to(ctx, line)
    plan = GRID.plan(ctx)
    assert error(plan, ctx) < 0.02
    seen = table(plan, ctx)[0]
    assert torch.equal(seen[:, line], torch.ones_like(seen).tril()[:, line])
    # A line a row apart would hold it too, and cost four times as much.
    text = int((ctx.video < 0).sum())
    gathered = plan.order[0, text : text + int(line.sum())]
    assert torch.equal(gathered, line.nonzero()[:, 0])


def test_GridAttention_asks_no_text_where_a_video_is_short():
    ctx = prompt((2,), heads=4, key_heads=2)
    received = replace(GRID, rows=50)._received(ctx, 1)
    assert received.shape == (ctx.num_tokens,)
    # 32 tokens of video, two query heads: no row counts twice, and no text.
    assert float(received.sum()) == pytest.approx(2 * 32, rel=1e-5)


def test_the_rows_that_are_looked_at_are_a_causal_softmax():
    ctx = replace(prompt((2,), heads=4, key_heads=2), scale=0.3)
    ctx = replace(ctx, query=torch.randn_like(ctx.query), key=torch.randn_like(ctx.key))
    queries = torch.tensor([50, 3, 17])
    logits = 0.3 * ctx.query[0, 2:] @ ctx.key[0, 1].mT
    every = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool).tril()
    wanted = logits.masked_fill(~every, -torch.inf).softmax(-1)[:, queries]
    torch.testing.assert_close(attention_rows(ctx, queries, 1), wanted)


def test_GridAttention_gives_each_key_head_its_line():
    ctx = prompt((60,), heads=4, key_heads=2)
    lines = [on(ctx, 16, 5), on(ctx, 4, 2)]
    for group, line in enumerate(lines):
        drawn_to(ctx, line, group=group)
    plan = GRID.plan(ctx)
    text = int((ctx.video < 0).sum())
    for group, line in enumerate(lines):
        gathered = plan.order[group, text : text + int(line.sum())]
        assert torch.equal(gathered, line.nonzero()[:, 0])
    assert error(plan, ctx) < 0.02


def test_GridAttention_leaves_prompts_without_a_video_alone():
    ctx = prompt(())
    assert replace(GRID, window=4).plan(ctx).is_dense


def test_GridAttention_refuses_unknown_boundaries():
    with pytest.raises(RecipeError, match="none, query, both, got 2d"):
        GridAttention(boundary="2d")
