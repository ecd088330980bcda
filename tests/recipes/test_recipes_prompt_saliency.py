"""What the papers claim of prompt reductions that follow the vision tower's own attention."""

import pytest
import torch
import torch.nn.functional as F
from prompt_contexts import kept, noise, prompt_context
from torch import Tensor

from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.core.prompt import PromptContext
from tubelet.models.accelerate import accelerate
from tubelet.recipes import VTCCLS, FoPru, GlobalCom2, HiRED, VisionZip
from tubelet.testing import tiny_llm


def attention(frames: int = 4, side: int = 4, seed: int = 0) -> Tensor:
    """[1, N] positive, each frame's sum is 1."""
    return noise(frames, side, 1, seed).reshape(frames, -1).softmax(1).reshape(1, -1)


def seen(
    *, frames: int = 4, side: int = 4, seed: int = 0, **vision: dict[int, Tensor]
) -> PromptContext:
    """Noise with given statistics by name and layer; underscores stand for spaces."""
    given = {
        (name.replace("_", " "), layer): value
        for name, layers in vision.items()
        for layer, value in layers.items()
    }
    return prompt_context(noise(frames, side, seed=seed), vision=given)


def strongest(score: Tensor, frames: int, count: int) -> list[int]:
    """Places of the `count` highest scores [1, N] of each frame."""
    by_frame = score.reshape(frames, -1)
    places = by_frame.topk(count).indices + torch.arange(frames)[:, None] * by_frame.shape[1]
    return sorted(places.flatten().tolist())


def zipped(tokens: Tensor, score: Tensor, keys: Tensor, counts: tuple[int, int]) -> Tensor:
    """VisionZip of one frame, token by token: dominant ones, then strided ones plus the rest."""
    dominant, contextual = counts
    first = set(score.topk(dominant).indices.tolist())
    rest = [p for p in range(len(tokens)) if p not in first]
    targets = rest[:: len(rest) // contextual][:contextual]
    out = {p: tokens[p] for p in [*first, *targets]}
    joined: dict[int, list[int]] = {p: [] for p in targets}
    for p in rest:
        if p not in targets:
            cosines = [float(F.cosine_similarity(keys[p], keys[t], dim=0)) for t in targets]
            joined[targets[cosines.index(max(cosines))]].append(p)
    for target, members in joined.items():
        if members:
            out[target] = out[target] + tokens[members].mean(0)
    return torch.stack([out[p] for p in sorted(out)])


def test_VisionZip_keeps_dominant_tokens_and_adds_the_rest_to_strided_ones():
    score, keys = attention(2), noise(2, seed=7).reshape(1, 32, -1)
    ctx = seen(frames=2, class_or_received={-2: score}, keys={-2: keys})
    plan = VisionZip(keep_ratio=0.5, contextual=3 / 8).plan(ctx)
    assert plan is not None
    plan.check()
    wanted = [
        zipped(ctx.frames[t], score.reshape(2, 16)[t], keys.reshape(2, 16, -1)[t], (5, 3))
        for t in range(2)
    ]
    assert torch.allclose(plan.reduce(ctx.hidden)[0], torch.cat(wanted), atol=1e-5)


def test_VisionZip_loses_no_token_and_lets_targets_weigh_two():
    ctx = seen(class_or_received={-2: attention()}, keys={-2: noise().reshape(1, 64, -1)})
    plan = VisionZip().plan(ctx)
    assert plan is not None
    assert bool((plan.index >= 0).all())
    sums = plan.matrix().sum(2)[0]
    joined = plan.size[0] > 1
    assert torch.allclose(sums, torch.where(joined, 2.0, 1.0))
    # Tokens only join tokens of their own frame.
    assert torch.equal(plan.anchor[0][plan.index[0]] // 16, torch.arange(64) // 16)


def test_VisionZip_drops_the_rest_of_frames_that_have_no_contextual_token():
    score = attention()
    # The first place of a frame is what a search among no targets would find.
    score.reshape(4, 16)[:, 0] = 0.5
    ctx = seen(class_or_received={-2: score}, keys={-2: noise().reshape(1, 64, -1)})
    plan = VisionZip(keep_ratio=0.25, contextual=0.0).plan(ctx)
    assert plan is not None
    assert plan.anchor[0].tolist() == strongest(score, 4, 4)
    assert int((plan.index >= 0).sum()) == 16


@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.38, 0.77, 0.99])
@pytest.mark.parametrize("contextual", [0.0, 0.136, 0.9])
def test_VisionZip_keeps_exactly_its_budget(keep_ratio, contextual):
    ctx = seen(
        frames=5,
        class_or_received={-2: attention(5)},
        keys={-2: noise(5).reshape(1, 80, -1)},
    )
    plan = VisionZip(keep_ratio=keep_ratio, contextual=contextual).plan(ctx)
    assert plan is not None
    plan.check()
    assert plan.num_out == -(-80 * keep_ratio // 1)


def test_FoPru_keeps_the_tokens_of_each_frame_that_receive_most():
    score = attention()
    plan = FoPru(keep_ratio=0.25).plan(seen(received={-2: score}))
    assert kept(plan) == strongest(score, 4, 4)


def test_FoPru_by_row_keeps_whole_rows_with_the_highest_mean():
    score = attention()
    # The strongest token of all stands in a row that is weak otherwise.
    score[0, :4] = torch.tensor([0.3, 0.0, 0.0, 0.0])
    score[0, 8:12] = 0.2
    plan = FoPru(keep_ratio=0.25, by="row").plan(seen(received={-2: score}))
    rows = score.reshape(4, 4, 4).mean(2).argmax(1).tolist()
    assert rows[0] == 2
    assert kept(plan) == [16 * t + 4 * row + x for t, row in enumerate(rows) for x in range(4)]
    by_rank = FoPru(keep_ratio=0.25).plan(seen(received={-2: score}))
    assert 0 in kept(by_rank)


def test_FoPru_shares_an_exact_budget_over_the_frames():
    plan = FoPru(keep_ratio=0.3).plan(seen(received={-2: attention()}))
    counts = torch.tensor(kept(plan)).div(16, rounding_mode="floor").bincount(minlength=4)
    assert counts.tolist() == [5, 5, 5, 5]
    plan = FoPru(keep_ratio=18 / 64).plan(seen(received={-2: attention()}))
    counts = torch.tensor(kept(plan)).div(16, rounding_mode="floor").bincount(minlength=4)
    assert counts.tolist() == [5, 5, 4, 4]


def test_FoPru_knows_ranks_and_rows_only():
    with pytest.raises(RecipeError, match="rank or row, got 'column'"):
        FoPru(by="column")


def test_VTCCLS_sums_the_class_attention_of_several_layers():
    layers = {layer: attention(seed=-layer) for layer in (-4, -3, -2)}
    plan = VTCCLS(keep_ratio=0.25, num_layers=3).plan(seen(**{"class": layers}))
    total = torch.stack(list(layers.values())).sum(0)
    assert kept(plan) == strongest(total, 4, 4)
    assert kept(plan) != strongest(layers[-2], 4, 4)
    one = VTCCLS(keep_ratio=0.25, num_layers=1).plan(seen(**{"class": layers}))
    assert kept(one) == strongest(layers[-2], 4, 4)


def test_VTCCLS_never_asks_for_the_last_layer():
    assert {layer for _, layer in VTCCLS(num_layers=3).vision} == {-4, -3, -2}


def peaked(strong: list[int]) -> Tensor:
    """[1, N] of frames of 16 places, `strong[t]` of which share most of frame t's attention."""
    rows = torch.full((len(strong), 16), 1e-3)
    for row, count in zip(rows, strong, strict=True):
        row[:count] = 1.0
    return (rows + 1e-4 * attention(len(strong)).reshape(-1, 16)).reshape(1, -1)


def frame_sizes(plan: object, frames: int) -> list[int]:
    return (torch.tensor(kept(plan)) // 16).bincount(minlength=frames).tolist()


def test_HiRED_gives_frames_with_content_more_of_the_budget():
    early, late = peaked([1, 12, 4, 8, 8]), attention(5, seed=3)
    ctx = seen(frames=5, **{"class": {0: early, -2: late}})
    plan = HiRED(keep_ratio=0.2).plan(ctx)
    # 16 tokens: half to the first frame; the others hold 12, 4, 8 and 8 of the strongest 32.
    assert frame_sizes(plan, 5) == [8, 3, 1, 2, 2]
    for t, count in enumerate([8, 3, 1, 2, 2]):
        wanted = late.reshape(5, 16)[t].topk(count).indices + 16 * t
        assert set(wanted.tolist()) == {p for p in kept(plan) if p // 16 == t}


def test_HiRED_chooses_tokens_by_the_late_layer_alone():
    early = peaked([4, 4, 4, 4, 4])
    plans = [
        HiRED(keep_ratio=0.2).plan(
            seen(frames=5, **{"class": {0: early, -2: attention(5, seed=s)}})
        )
        for s in (1, 2)
    ]
    assert frame_sizes(plans[0], 5) == frame_sizes(plans[1], 5) == [8, 2, 2, 2, 2]
    assert kept(plans[0]) != kept(plans[1])


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 11])
@pytest.mark.parametrize("keep_ratio", [0.02, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("key_share", [0.01, 0.5, 0.99])
def test_HiRED_keeps_exactly_its_budget_in_groups_of_any_length(frames, keep_ratio, key_share):
    layers = {0: attention(frames, seed=1), -2: attention(frames, seed=2)}
    plan = HiRED(keep_ratio=keep_ratio, key_share=key_share).plan(
        seen(frames=frames, **{"class": layers})
    )
    assert plan is not None
    assert plan.num_out == max(1, -(-frames * 16 * keep_ratio // 1))


def unlike_the_clip() -> Tensor:
    """Three frames that look at the first half of the places and one that looks at the second."""
    rows = torch.full((4, 16), 0.01)
    rows[:3, :8] = rows[3, 8:] = 0.115
    return (rows + 1e-4 * attention().reshape(4, 16)).reshape(1, -1)


def test_GlobalCom2_gives_more_to_frames_that_look_where_the_clip_looks():
    ctx = seen(**{"class": {-1: unlike_the_clip()}})
    sharp = GlobalCom2(temperature=0.1).plan(ctx)
    sizes = frame_sizes(sharp, 4)
    assert sum(sizes) == 16
    assert min(sizes[:3]) > sizes[3]
    # At the authors' temperature all frames are nearly alike.
    assert frame_sizes(GlobalCom2().plan(ctx), 4) == [4, 4, 4, 4]


def test_GlobalCom2_ranks_tokens_by_their_own_score_and_the_clip_s():
    score = attention()
    rows = score.reshape(4, 16)
    both = (rows + rows.mean(0)).reshape(1, -1)
    plan = GlobalCom2().plan(seen(**{"class": {-1: score}}))
    assert kept(plan) == strongest(both, 4, 4)
    assert kept(plan) != strongest(score, 4, 4)


def test_GlobalCom2_keeps_exactly_its_budget():
    for keep_ratio in (0.03, 0.25, 0.6, 0.98):
        for temperature in (0.01, 10):
            ctx = seen(frames=5, **{"class": {-1: attention(5)}})
            plan = GlobalCom2(keep_ratio=keep_ratio, temperature=temperature).plan(ctx)
            assert plan is not None
            assert plan.num_out == -(-80 * keep_ratio // 1)


@pytest.mark.parametrize("recipe", [VTCCLS(num_layers=1), HiRED(), GlobalCom2()])
def test_methods_that_follow_the_class_token_are_refused_where_there_is_none(recipe):
    with pytest.raises(UnsupportedError, match=r"class token.*its vision tower has none"):
        accelerate(tiny_llm.build("smolvlm"), recipe)
