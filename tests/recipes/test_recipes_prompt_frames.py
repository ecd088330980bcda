"""What the papers claim of prompt reductions that treat frames unlike each other."""

from dataclasses import dataclass

import pytest
import torch
from prompt_contexts import kept, noise, prompt_context
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.core.prompt import PromptContext
from tubelet.recipes import F2C, FTFV, LFTR, KFFocus, TSLLaVA
from tubelet.recipes.prompt_frames import FrameSelection


def frame_of(places: Tensor | list[int], per_frame: int = 16) -> list[int]:
    return [int(place) // per_frame for place in places]


def test_TSLLaVA_is_a_thumbnail_of_spread_frames_and_an_even_sample_of_the_others():
    tokens = noise(10)
    plan = TSLLaVA(keep_ratio=26 / 160, thumbnail=2).plan(prompt_context(tokens))
    assert plan is not None
    plan.check()
    out, anchors = plan.reduce(tokens.reshape(1, 160, -1))[0], plan.anchor[0].tolist()
    # Two frames side by side: 4 x 2 tokens each, neighbours in a row averaged.
    for frame in (2, 7):
        rows = [i for i, place in enumerate(anchors) if place // 16 == frame]
        assert torch.allclose(out[rows], tokens[frame].unflatten(1, (2, 2)).mean(2).flatten(0, 1))
    sampled = [place for place in anchors if place // 16 not in (2, 7)]
    assert len(sampled) == 10
    # One of every 12.8 tokens of the other frames, untouched.
    others = [place for place in range(160) if place // 16 not in (2, 7)]
    assert [others.index(place) for place in sampled] == [6, 19, 32, 44, 57, 70, 83, 96, 108, 121]
    assert all(torch.equal(out[anchors.index(p)], tokens.flatten(0, 2)[p]) for p in sampled)


@pytest.mark.parametrize(
    ("thumbnail", "shape"), [(1, (4, 4)), (4, (2, 2)), (6, (2, 1)), (8, (2, 1))]
)
def test_TSLLaVA_tiles_frames_into_about_one_frame(thumbnail, shape):
    size = thumbnail * shape[0] * shape[1]
    plan = TSLLaVA(keep_ratio=size / 192, thumbnail=thumbnail).plan(prompt_context(noise(12)))
    assert plan is not None
    assert plan.num_out == size
    assert len(set(frame_of(plan.anchor[0]))) == thumbnail


def test_TSLLaVA_refuses_what_its_thumbnail_and_sample_cannot_make():
    for keep_ratio in (0.05, 0.95):
        with pytest.raises(ShapeError, match=r"choose a keep_ratio from 0.1 to 0.9, or 1"):
            TSLLaVA(keep_ratio=keep_ratio, thumbnail=2).plan(prompt_context(noise(10)))


def still(frames: int) -> Tensor:
    return noise(1).repeat(frames, 1, 1, 1)


def test_LFTR_keeps_the_frame_that_differs_from_its_neighbours():
    tokens = still(8)
    tokens[5] = noise(1, seed=9)[0]
    plan = LFTR(keep_ratio=0.0625, frame_ratio=1 / 8).plan(prompt_context(tokens))
    assert frame_of(kept(plan)) == [5] * 8


def test_LFTR_counts_both_neighbours():
    # Frame 3 changes for good, frame 6 for a moment; the next frame shares half of a change.
    tokens = still(10)
    tokens[3:] = noise(1, seed=1)[0]
    tokens[6] = noise(1, seed=2)[0]
    plan = LFTR(keep_ratio=1 / 16, frame_ratio=1 / 10).plan(prompt_context(tokens))
    assert set(frame_of(kept(plan))) == {6}


def test_LFTR_keeps_the_places_that_differ_from_those_around_them():
    tokens = torch.ones(1, 4, 4, 8) + 1e-3 * noise(1, channels=8)
    tokens[0, 1, 2] = -1
    plan = LFTR(keep_ratio=1 / 16).plan(prompt_context(tokens))
    assert kept(plan) == [1 * 4 + 2]


def test_LFTR_looks_to_the_sides_too():
    tokens = torch.ones(1, 4, 4, 8)
    tokens[..., 0, :] = -1
    plan = LFTR(keep_ratio=4 / 16).plan(prompt_context(tokens))
    # A token at the edge has one neighbour, which differs; the next column shares a half.
    assert kept(plan) == [0, 4, 8, 12]


@pytest.mark.parametrize("keep_ratio", [0.01, 0.0625, 0.3, 0.99])
def test_LFTR_keeps_exactly_its_budget_evenly(keep_ratio):
    plan = LFTR(keep_ratio=keep_ratio).plan(prompt_context(noise(5)))
    assert plan is not None
    num = int(-(-80 * keep_ratio // 1))
    assert plan.num_out == num
    counts = torch.tensor(frame_of(kept(plan))).bincount()
    counts = counts[counts > 0]
    assert int(counts.max() - counts.min()) <= 1
    assert len(counts) == min(max(2, -(-num // 16)), num)


def test_KFFocus_keeps_key_frames_whole_and_condenses_the_others():
    tokens = still(8)
    tokens[5:] = noise(1, seed=4)[0]
    plan = KFFocus(key_ratio=2 / 8, box=2).plan(prompt_context(tokens))
    assert plan is not None
    plan.check()
    counts = torch.tensor(frame_of(plan.anchor[0])).bincount(minlength=8)
    assert counts.tolist() == [16, 4, 4, 4, 4, 16, 4, 4]
    out = plan.reduce(tokens.reshape(1, 128, -1))[0]
    boxes = tokens[1].unflatten(1, (2, 2)).unflatten(0, (2, 2)).mean((1, 3)).flatten(0, 1)
    assert torch.allclose(out[16:20], boxes, atol=1e-6)
    assert torch.allclose(out[32:48], tokens[5].flatten(0, 1), atol=1e-6)


def test_KFFocus_takes_a_score_that_the_user_gives():
    @dataclass(frozen=True, kw_only=True)
    class Mine(KFFocus):
        def frame_score(self, ctx: PromptContext) -> Tensor:
            return torch.tensor([0.0, 5.0, 1.0, 2.0])

    plan = Mine(key_ratio=0.25).plan(prompt_context(noise(4)))
    assert plan is not None
    assert torch.tensor(frame_of(plan.anchor[0])).bincount().tolist() == [1, 16, 1, 1]


QUESTION = torch.eye(16)[:1]


def about_the_question(likeness: list[float]) -> PromptContext:
    """Frames whose tokens all have a given cosine with the question."""
    cosine = torch.tensor(likeness)[:, None, None, None]
    other = (1 - cosine.square()).sqrt()
    tokens = cosine * torch.eye(16)[0] + other * torch.eye(16)[1]
    return prompt_context(tokens.expand(-1, 4, 4, -1).clone(), question=QUESTION)


def test_F2C_grows_the_frame_that_fits_the_question_into_a_clip():
    ctx = about_the_question([0.1, 0.2, 0.3, 0.9, 0.0, 0.2, 0.2, 0.8])
    plan = F2C(keep_ratio=12 / 128, clip=3, box=2).plan(ctx)
    assert plan is not None
    plan.check()
    # Frames 2 and 4 fit worse than frame 7, but belong to the clip about frame 3.
    assert sorted(set(frame_of(plan.anchor[0]))) == [2, 3, 4]
    assert plan.num_out == 12
    whole = ctx.frames[2].mean(0)
    assert torch.allclose(plan.reduce(ctx.hidden)[0, 0], whole, atol=1e-6)


def test_F2C_begins_a_clip_that_is_cut_short_with_its_anchor():
    ctx = about_the_question([0.1, 0.2, 0.3, 0.9, 0.0, 0.2, 0.2, 0.8])
    plan = F2C(keep_ratio=32 / 128, clip=5, box=1).plan(ctx)
    assert plan is not None
    assert sorted(set(frame_of(plan.anchor[0]))) == [2, 3]


def test_F2C_takes_the_next_clip_outside_the_first():
    ctx = about_the_question([0.1, 0.2, 0.85, 0.9, 0.0, 0.2, 0.2, 0.8])
    plan = F2C(keep_ratio=24 / 128, clip=3, box=2).plan(ctx)
    assert plan is not None
    # The clip at the end is shifted inwards.
    assert sorted(set(frame_of(plan.anchor[0]))) == [2, 3, 4, 5, 6, 7]


def test_F2C_trades_resolution_for_frames_at_a_constant_number_of_tokens():
    ctx = about_the_question([0.1, 0.2, 0.3, 0.9, 0.0, 0.2, 0.2, 0.8])
    found = {}
    for box in (1, 2, 4):
        plan = F2C(keep_ratio=0.25, clip=4, box=box).plan(ctx)
        assert plan is not None
        found[box] = (plan.num_out, len(set(frame_of(plan.anchor[0]))))
    assert found == {1: (32, 2), 2: (32, 8), 4: (8, 8)}


def test_F2C_drops_what_is_not_in_a_clip_and_refuses_less_than_a_frame():
    ctx = about_the_question([0.5, 0.9, 0.1, 0.2])
    plan = F2C(keep_ratio=0.25, clip=1, box=1).plan(ctx)
    assert plan is not None
    assert frame_of((plan.index[0] >= 0).nonzero()[:, 0]) == [1] * 16
    with pytest.raises(
        ShapeError, match=r"fewer than the 16 of one frame; raise keep_ratio to 0.25"
    ):
        F2C(keep_ratio=0.2, box=1).plan(ctx)


@dataclass(frozen=True, kw_only=True)
class Given(F2C):
    """F2C by frames as a user would score them."""

    def frame_score(self, ctx: PromptContext) -> Tensor:
        return torch.arange(float(len(ctx.frames) - 1)).flip(0)


def test_F2C_takes_a_score_that_the_user_gives_and_checks_it():
    @dataclass(frozen=True, kw_only=True)
    class Last(F2C):
        def frame_score(self, ctx: PromptContext) -> Tensor:
            return torch.arange(float(ctx.grid.frames))

    ctx = about_the_question([0.9, 0.1, 0.1, 0.1])
    plan = Last(keep_ratio=0.25, clip=1, box=1).plan(ctx)
    assert plan is not None
    assert set(frame_of(plan.anchor[0])) == {3}
    assert issubclass(Last, FrameSelection)
    with pytest.raises(ShapeError, match=r"must give 4 finite numbers, one per frame, got \(3,\)"):
        Given(keep_ratio=0.25).plan(ctx)


def test_F2C_needs_a_question():
    with pytest.raises(ShapeError, match="no text to compare"):
        F2C().plan(prompt_context(noise(4)))


# FTFV


def test_FTFV_keeps_as_many_tokens_of_every_frame_those_unlike_its_mean():
    tokens = torch.ones(3, 2, 4, 8) + 0.01 * noise(3, 4, 8)[:, :2]
    odd = [(0, 1, 2), (1, 0, 0), (2, 1, 3)]
    for frame, row, column in odd:
        tokens[frame, row, column, :4] = -1
    plan = FTFV(keep_ratio=1 / 8).plan(prompt_context(tokens))
    assert kept(plan) == [frame * 8 + row * 4 + column for frame, row, column in odd]


@dataclass(frozen=True, kw_only=True)
class Trained(FTFV):
    def token_weight(self, ctx: PromptContext) -> Tensor:
        return ctx.frames[..., 0]


def test_FTFV_takes_a_sampler_that_the_user_trained_and_checks_it():
    tokens = noise(4, 4)
    plan = Trained(keep_ratio=0.25).plan(prompt_context(tokens))
    best = tokens[..., 0].flatten(1).topk(4).indices.sort(1).values
    assert kept(plan) == (best + 16 * torch.arange(4)[:, None]).flatten().tolist()
    tokens[0, 0, 0, 0] = torch.nan
    with pytest.raises(ShapeError, match="token_weight must give"):
        Trained(keep_ratio=0.25).plan(prompt_context(tokens))
