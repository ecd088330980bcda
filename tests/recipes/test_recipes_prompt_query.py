"""What the papers claim of prompt reductions that read the question first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_contexts import noise, prompt_context
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.prompt import PromptContext
from tubelet.recipes import FreeVideoLLM, RecoverableCompression
from tubelet.recipes.prompt_query import outlier_factor

QUESTION = torch.eye(16)[:1]


def reduced(plan: TokenAssignment | None) -> TokenAssignment:
    assert plan is not None
    plan.check()
    return plan


def sizes(plan: TokenAssignment, frames: int) -> list[int]:
    """Tokens that each frame of 16 places keeps."""
    return (plan.anchor[0] // 16).bincount(minlength=frames).tolist()


def pointing(frames: int, places: dict[tuple[int, int, int], float]) -> Tensor:
    """[T, 4, 4, 16] tokens unlike the question but for some places (t, y, x)."""
    tokens = noise(frames) * 0.1
    tokens[..., 0] = 0
    for place, strength in places.items():
        tokens[place] = strength * QUESTION[0]
    return tokens


def test_FreeVideoLLM_looks_closely_at_the_frame_that_the_question_is_about():
    tokens = pointing(8, {(5, 1, 1): 4.0})
    recipe = FreeVideoLLM(slow=1, middle=0, window=1.0, pool=2, side=1)
    plan = reduced(recipe.plan(prompt_context(tokens, question=QUESTION)))
    assert sizes(plan, 8) == [1, 1, 1, 1, 1, 8, 1, 1]
    out = plan.reduce(tokens.reshape(1, 128, -1))[0]
    assert torch.allclose(out[0], tokens[0].mean((0, 1)), atol=1e-6)
    halved = tokens[5].unflatten(0, (2, 2)).mean(1).flatten(0, 1)
    assert torch.allclose(out[5:13], halved, atol=1e-6)


def test_FreeVideoLLM_spreads_middle_and_fast_frames_over_what_is_left():
    tokens = pointing(9, {(0, 1, 1): 4.0})
    recipe = FreeVideoLLM(slow=1, middle=2, fast=3, window=1.0, pool=1, side=2)
    plan = reduced(recipe.plan(prompt_context(tokens, question=QUESTION)))
    # Of frames 1 to 8 the middle ones are 3 and 7; of the six others every second is skimmed.
    assert sizes(plan, 9) == [16, 0, 4, 16, 0, 4, 0, 16, 4]


@pytest.mark.parametrize(
    ("corner", "window"), [((0, 0), (0, 0)), ((3, 3), (2, 2)), ((1, 3), (0, 2))]
)
def test_FreeVideoLLM_keeps_a_window_about_what_is_like_the_question(corner, window):
    y, x = corner
    strengths = {}
    for row in range(4):
        for column in range(4):
            # Cosines fall with the distance to the corner.
            strengths[0, row, column] = 8.0 - abs(row - y) - abs(column - x)
    tokens = pointing(1, {})
    for place, strength in strengths.items():
        tokens[place] += strength * 0.1 * QUESTION[0]
    tokens[..., 1:] = 0
    tokens[..., 1] = 1.0
    recipe = FreeVideoLLM(slow=1, window=0.25, pool=1)
    plan = reduced(recipe.plan(prompt_context(tokens, question=QUESTION)))
    top, left = window
    assert plan.num_out == 4
    places = plan.anchor[0].tolist()
    assert (abs(places[0] // 4 - top), abs(places[0] % 4 - left)) <= (1, 1)
    assert y * 4 + x in places
    assert places == [places[0] + step for step in (0, 1, 4, 5)]


def test_FreeVideoLLM_keeps_as_many_tokens_whatever_the_video_shows():
    counts = {
        reduced(
            FreeVideoLLM(slow=1, middle=2, side=2).plan(
                prompt_context(noise(8, seed=seed), question=QUESTION)
            )
        ).num_out
        for seed in range(6)
    }
    assert counts == {3 * 2 * 4 + 5 * 4}


def slow_outlier_factor(x: list[float], k: int) -> list[float]:
    """LOF from its definition, one pair at a time."""
    k = min(k, len(x) - 1)
    near = [
        sorted((j for j in range(len(x)) if j != i), key=lambda j: (abs(x[i] - x[j]), j))[:k]
        for i in range(len(x))
    ]
    radius = [abs(x[i] - x[near[i][-1]]) for i in range(len(x))]
    density = []
    for i in range(len(x)):
        reach = [max(radius[j], abs(x[i] - x[j])) for j in near[i]]
        density.append(1 / (sum(reach) / k + 1e-10))
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(len(x))]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=12), st.integers(1, 14))
def test_outlier_factor_is_that_of_the_definition(values, neighbours):
    x = torch.tensor(values, dtype=torch.float64)
    wanted = slow_outlier_factor([float(v) for v in values], neighbours)
    assert torch.allclose(outlier_factor(x, neighbours), torch.tensor(wanted).double())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans()), min_size=1, max_size=9), st.data())
def test_outlier_factor_of_some_numbers_is_as_if_there_were_no_others(values, data):
    neighbours = data.draw(st.integers(1, 9))
    x = torch.tensor([[v for v, _ in values]] * 2, dtype=torch.float64)
    among = torch.tensor([[own for _, own in values], [not own for _, own in values]])
    found = outlier_factor(x, neighbours, among)
    for row, own, result in zip(x, among, found, strict=True):
        assert torch.allclose(result[own], outlier_factor(row[own], neighbours))


def test_outlier_factor_of_few_or_equal_numbers_is_one():
    assert outlier_factor(torch.tensor([3.0]), 20).tolist() == [1.0]
    assert outlier_factor(torch.ones(9), 3).tolist() == [1.0] * 9
    with pytest.raises(ShapeError, match="at least one neighbour"):
        outlier_factor(torch.ones(3), 0)


def scene(
    bright: list[int], asked: list[int], side: int = 8, frames: int = 1
) -> tuple[PromptContext, Tensor]:
    """Frames in which the class token looks at some places and the question is about others.

    Returns:
        The context, and the class token's attention [N].
    """
    num = side * side
    rows = 0.01 + 1e-4 * torch.linspace(0, 1, num).repeat(frames, 1)
    rows[:, bright] = 0.1 + 0.05 * torch.arange(len(bright))
    tokens = noise(frames, side).reshape(frames, num, 16)
    # All are equally unlike the question but for small steps.
    tokens[..., 0] = 0
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    cosine = 1e-3 * torch.linspace(0, 1, num).repeat(frames, 1)
    cosine[:, asked] = 0.7 + 0.1 * torch.arange(len(asked))
    tokens = unit * (1 - cosine.square()).sqrt()[..., None] + cosine[..., None] * QUESTION[0]
    keys = noise(frames, side, seed=3).reshape(1, frames * num, 16)
    attention = rows.flatten()
    ctx = prompt_context(
        tokens.reshape(frames, side, side, 16),
        question=QUESTION,
        vision={("class", -2): attention[None], ("keys", -2): keys},
    )
    return ctx, attention


def test_RecoverableCompression_recovers_what_the_question_asks_for():
    ctx, _ = scene(bright=[5, 40], asked=[17, 60])
    plan = reduced(RecoverableCompression(members=0).plan(ctx))
    alone = plan.anchor[0][plan.size[0] == 1].tolist()
    assert set(alone) >= {5, 40, 17, 60}
    out = plan.reduce(ctx.hidden)[0]
    for place in (5, 40, 17, 60):
        assert torch.equal(out[plan.anchor[0].tolist().index(place)], ctx.hidden[0, place])
    # Without anything asked for, those are not kept apart.
    ctx, _ = scene(bright=[5, 40], asked=[])
    plan = reduced(RecoverableCompression(members=0).plan(ctx))
    assert not {17, 60} & set(plan.anchor[0][plan.size[0] == 1].tolist())


def test_RecoverableCompression_keeps_more_of_a_frame_in_which_more_stands_out():
    few = reduced(RecoverableCompression().plan(scene(bright=[5], asked=[])[0]))
    many = reduced(RecoverableCompression().plan(scene(bright=[5, 9, 20, 33, 50], asked=[])[0]))
    assert many.num_out == few.num_out + 4


def test_RecoverableCompression_ends_every_frame_with_the_weighted_mean_of_what_is_left():
    ctx, attention = scene(bright=[5], asked=[], frames=3)
    plan = reduced(RecoverableCompression(members=0).plan(ctx))
    for frame in range(3):
        inside = plan.anchor[0] // 64 == frame
        (last,) = (inside & (plan.size[0] > 1)).nonzero()[:, 0].tolist()
        left = (plan.index[0] == last).nonzero()[:, 0]
        share = attention[left] / attention[left].sum()
        wanted = share @ ctx.hidden[0, left]
        assert torch.allclose(plan.reduce(ctx.hidden)[0, last], wanted, atol=1e-6)
        assert set((left // 64).tolist()) == {frame}
    assert bool((plan.index >= 0).all())


def two_sided() -> tuple[PromptContext, Tensor]:
    """As `scene`, with two dark places too: outliers that are counted, but never the highest.

    They are still there when what is left is searched for outliers, which gives two centres.
    """
    ctx, attention = scene(bright=[5, 20, 40], asked=[])
    attention[[11, 52]] = torch.tensor([1e-4, 2e-4])
    return ctx, attention


def test_RecoverableCompression_adds_to_centres_the_tokens_nearest_by_key():
    ctx, attention = two_sided()
    recipe = RecoverableCompression(members=4, text_weight=0.0)
    factor = outlier_factor(attention, 20)
    count = int((factor > 1.5).sum())
    first = attention.topk(count).indices.tolist()
    plan = reduced(recipe.plan(ctx))
    keys = torch.nn.functional.normalize(ctx.vision["keys", -2][0], dim=-1)
    out, anchors = plan.reduce(ctx.hidden)[0], plan.anchor[0].tolist()
    centres = [
        place
        for i, place in enumerate(anchors)
        if place not in first and float(plan.weight[0, place]) == 1 and plan.size[0, i] > 1
    ]
    assert len(centres) == 2
    for centre in centres:
        slot = anchors.index(centre)
        members = [m for m in (plan.index[0] == slot).nonzero()[:, 0].tolist() if m != centre]
        assert 1 <= len(members) <= 4
        wanted = ctx.hidden[0, centre] + attention[members] @ ctx.hidden[0, members]
        assert torch.allclose(out[slot], wanted, atol=1e-6)
        # Each member's nearest centre is this one, and no other such token is nearer.
        similar = keys @ keys[centres].T
        mine = [
            p
            for p in range(64)
            if p not in first
            and p not in centres
            and int(similar[p].argmax()) == centres.index(centre)
        ]
        near = sorted(mine, key=lambda p: -float(similar[p, centres.index(centre)]))[:4]
        assert sorted(members) == sorted(near)


def test_RecoverableCompression_lets_centres_prefer_what_is_like_the_question():
    ctx, _ = two_sided()
    plan = reduced(RecoverableCompression(members=3, text_weight=1e4).plan(ctx))
    # Likeness grows with the place here, and the two centres share the tokens between them.
    joined = ((plan.index[0] >= 0) & (plan.weight[0] < 0.02)).nonzero()[:, 0].tolist()
    slots = plan.index[0, joined].tolist()
    groups = [[p for p, s in zip(joined, slots, strict=True) if s == slot] for slot in set(slots)]
    by_likeness = reduced(RecoverableCompression(members=3, text_weight=0.0).plan(ctx))
    assert not torch.equal(plan.index, by_likeness.index)
    members = sorted(p for group in groups if len(group) == 3 for p in group)
    assert len(members) == 6
    assert min(members) > 40


def test_RecoverableCompression_decides_each_frame_alone():
    ctx, attention = scene(bright=[5, 20, 40], asked=[17], frames=2)
    # Two centres in each frame, which share more tokens than they take.
    attention.reshape(2, 64)[:, [11, 52]] = torch.tensor([1e-4, 2e-4])
    both = reduced(RecoverableCompression(members=4).plan(ctx))
    for frame in range(2):
        part = slice(64 * frame, 64 * frame + 64)
        one = prompt_context(
            ctx.hidden[0, part].reshape(1, 8, 8, 16),
            question=QUESTION,
            vision={key: value[:, part] for key, value in ctx.vision.items()},
        )
        plan = reduced(RecoverableCompression(members=4).plan(one))
        mine = both.anchor[0][both.anchor[0] // 64 == frame] - 64 * frame
        assert mine.tolist() == plan.anchor[0].tolist()
        assert torch.equal(both.weight[:, part], plan.weight)
        assert torch.equal(
            both.anchor[0][both.index[0, part]] - 64 * frame, plan.anchor[0][plan.index[0]]
        )


def test_RecoverableCompression_joins_nothing_where_no_centre_stands_out():
    ctx, _ = scene(bright=[5, 40], asked=[17], frames=2)
    plans = [reduced(RecoverableCompression(members=m).plan(ctx)) for m in (0, 32)]
    assert torch.equal(plans[0].index, plans[1].index)
    assert torch.equal(plans[0].weight, plans[1].weight)
