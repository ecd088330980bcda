"""What HoliTom and PruneVid claim: what stands still is folded over windows of frames."""

import itertools
import math

import pytest
import torch
from prompt_contexts import GivenStatistics, kept, layer_context, noise, prompt_context
from torch import Tensor

from tubelet.core.prompt import PromptContext
from tubelet.models.accelerate import accelerate
from tubelet.recipes import HoliTom, HoliTomInner, PruneVid, PruneVidInner
from tubelet.testing import tiny_llm


def watched(tokens: Tensor, received: Tensor | None = None) -> PromptContext:
    """A video of tokens [T, H, W, C] that receive given or random attention [T, H, W]."""
    if received is None:
        received = torch.rand(tokens.shape[:3], generator=torch.Generator().manual_seed(9))
    return prompt_context(tokens, vision={("received", -1): received.reshape(1, -1)})


def cut_twice() -> Tensor:
    """Nine frames: all places change after frame 2; a half of the places after frame 5 too."""
    tokens = torch.cat([noise(1, seed=s).repeat(3, 1, 1, 1) for s in range(3)])
    tokens[6:, :2] = tokens[3, :2]
    return tokens


# HoliTom


def test_HoliTom_folds_what_stands_still_over_the_windows_that_save_most():
    plan = HoliTom(keep_ratio=0.9).plan(watched(cut_twice()))
    assert plan is not None
    # One window from frame 3 on would save 8 * 5 tokens; two windows save 16 * 4.
    assert plan.anchor[0].tolist() == [*range(16), *range(48, 64), *range(96, 112)]
    assert plan.size[0].tolist() == [3] * 48


def savings(alike: Tensor, starts: tuple[int, ...]) -> int:
    """Tokens that windows save, from [T - 1, P] alike places."""
    ends = [*starts[1:], len(alike) + 1]
    return sum(
        int(alike[s : e - 1].all(0).sum()) * (e - 1 - s)
        for s, e in zip(starts, ends, strict=True)
        if e - 1 > s
    )


@pytest.mark.parametrize("seed", range(6))
def test_HoliTom_finds_the_best_of_all_ways_to_cut(seed):
    frames = 6
    generator = torch.Generator().manual_seed(seed)
    turn = torch.rand(frames, 4, 4, generator=generator) < 0.3
    tokens = noise(1, seed=seed).repeat(frames, 1, 1, 1)
    sign = (1 - 2 * turn.float()).cumprod(0)
    plan = HoliTom(keep_ratio=0.999).plan(watched(tokens * sign[..., None]))
    alike = ~turn[1:].flatten(1)
    ways = itertools.chain.from_iterable(
        itertools.combinations(range(1, frames), n) for n in range(frames)
    )
    best = max(savings(alike, (0, *way)) for way in ways)
    assert plan is not None
    assert plan.num_out == frames * 16 - best


def test_HoliTom_windows_may_be_limited():
    still = noise(1).repeat(6, 1, 1, 1)
    plan = HoliTom(keep_ratio=0.9, window=2).plan(watched(still))
    assert plan is not None
    assert plan.size[0].tolist() == [2] * 48


def test_HoliTom_keeps_attended_tokens_of_what_moves():
    tokens = noise(3)
    context = watched(tokens)
    plan = HoliTom(keep_ratio=4 / 16).plan(context)
    received = context.statistic("received", -1).reshape(3, 16)
    wanted = [t * 16 + p for t in range(3) for p in sorted(received[t].topk(4).indices.tolist())]
    assert plan is not None
    assert plan.anchor[0].tolist() == wanted
    assert torch.equal(plan.index[0] >= 0, torch.isin(torch.arange(48), torch.tensor(wanted)))


def test_HoliTom_shares_the_budget_between_what_stands_still_and_what_moves():
    tokens = noise(4)
    tokens[:, :3] = tokens[0, :3]
    # Twelve static places and four times four others are left: 28 tokens, of which 14 stay.
    plan = HoliTom(keep_ratio=14 / 64).plan(watched(tokens))
    assert plan is not None
    static = plan.anchor[0] < 12
    assert int(static.sum()) == 6
    assert [int((plan.anchor[0] // 16 == t).sum()) for t in range(4)] == [6 + 2, 2, 2, 2]
    # Static places are not dropped but merged, each with all its frames.
    assert float(plan.size[0, static].sum()) == 12 * 4


def test_HoliTom_merges_static_places_around_density_peaks():
    near = 0.05 * noise(1, 2, seed=1).reshape(4, -1)
    groups = 4 * torch.eye(16)[:2]
    places = torch.stack([*(groups[0] + near[:3]), groups[1] + near[3]]).reshape(1, 2, 2, 16)
    tokens = places.repeat(3, 1, 1, 1)
    plan = HoliTom(keep_ratio=2 / 12).plan(watched(tokens))
    assert plan is not None
    assert plan.index[0].tolist() == [0, 0, 0, 1] * 3
    centre = int(plan.anchor[0, 0])
    others = [p for p in range(3) if p != centre]
    flat = tokens[0].reshape(4, 16)
    wanted = 0.6 * flat[centre] + 0.4 * flat[others].mean(0)
    torch.testing.assert_close(plan.reduce(tokens.reshape(1, 12, 16))[0, 0], wanted)


def test_HoliTom_may_merge_a_share_of_what_moves():
    tokens = noise(2)
    plan = HoliTom(keep_ratio=0.5, merged=0.5).plan(watched(tokens))
    assert plan is not None
    assert plan.num_out == 16
    assert bool((plan.index >= 0).all())


@pytest.mark.parametrize("keep_ratio", [0.05, 0.1, 0.3, 0.6])
def test_HoliTom_keeps_exactly_its_budget(keep_ratio):
    for seed in range(3):
        tokens = noise(6, seed=seed)
        tokens[1:4, :2] = tokens[0, :2]
        for merged in (0.0, 0.4):
            plan = HoliTom(keep_ratio=keep_ratio, merged=merged).plan(watched(tokens))
            assert plan is not None
            plan.check()
            assert plan.num_out == math.ceil(96 * keep_ratio - 1e-9)
            assert torch.allclose(plan.matrix().sum(2), torch.ones(1, plan.num_out))


def test_HoliTom_takes_a_single_frame():
    assert len(kept(_dropping(HoliTom(keep_ratio=0.5), noise(1)))) == 8


def _dropping(recipe: HoliTom, tokens: Tensor):
    plan = recipe.plan(watched(tokens))
    assert plan is not None
    # Nothing was merged, so the plan is one that only drops.
    assert bool((plan.size == 1).all())
    return type(plan).keep(plan.anchor, plan.num_in)


def test_HoliTomInner_averages_what_is_ignored_into_what_is_most_like_it():
    hidden = torch.eye(6)[[0, 1, 0, 1, 2, 0]] + 0.01 * noise(1, 3, 6)[0].flatten(0, 1)[:6]
    attention = torch.zeros(2, 5, 6)
    # One head looks at token 1 alone; the mean over heads prefers token 4.
    attention[0, -1] = torch.tensor([9.0, 10, 0, 8, 7, 0])
    attention[1, -1] = torch.tensor([9.0, 0, 1, 8, 7, 1])
    plan = HoliTomInner().plan(layer_context(hidden, stats=GivenStatistics(attention)))
    assert plan is not None
    assert plan.anchor.tolist() == [[0, 3, 4]]
    assert plan.index.tolist() == [[0, 1, 0, 1, 2, 0]]
    # Whatever their order, all that go to one token weigh the same.
    assert torch.allclose(plan.weight, torch.tensor([[1 / 3, 1 / 2, 1 / 3, 1 / 2, 1.0, 1 / 3]]))


def test_HoliTom_composes_with_its_second_stage():
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    whole = inputs["input_ids"].shape[1]
    with accelerate(model, HoliTom(), HoliTomInner(layer=2)) as handle, torch.no_grad():
        model(**inputs)
    assert handle.report().tokens_per_layer == [whole - 48] * 2 + [whole - 56] * 2


# PruneVid


def test_PruneVid_folds_places_that_are_alike_in_all_frames_of_a_segment():
    tokens = noise(4)
    tokens[:, 1] = tokens[0, 1]
    plan = PruneVid(keep_ratio=1.0).plan(prompt_context(tokens))
    assert plan is not None
    assert kept_in(plan, 0) == list(range(16))
    for frame in (1, 2, 3):
        assert kept_in(plan, frame) == [0, 1, 2, 3, *range(8, 16)]
    assert plan.size[0, 4:8].tolist() == [4] * 4


def kept_in(plan, frame: int) -> list[int]:
    places = plan.anchor[0][plan.anchor[0] // 16 == frame] % 16
    return places.tolist()


def test_PruneVid_judges_a_place_by_the_mean_cosine_of_all_its_pairs():
    # Each place turns slowly: neighbours stay alike, but the ends differ.
    angles = torch.arange(4)[:, None] * torch.tensor([math.acos(0.9), math.acos(0.98)])
    tokens = torch.zeros(4, 1, 2, 16)
    tokens[..., 0], tokens[..., 1] = angles.cos()[:, None], angles.sin()[:, None]
    pairs = list(itertools.combinations(range(4), 2))
    fast, slow = (
        float(sum((turn[a] - turn[b]).cos() for a, b in pairs)) / len(pairs) for turn in angles.T
    )
    for threshold, size in ((fast - 0.01, 2), (fast + 0.01, 1), (slow - 0.01, 1), (slow + 0.01, 0)):
        plan = PruneVid(threshold=threshold, keep_ratio=1.0).plan(prompt_context(tokens))
        assert (0 if plan is None else int((plan.size[0] == 4).sum())) == size


def test_PruneVid_cuts_the_clip_where_its_frames_differ():
    tokens = torch.cat([noise(1, seed=0).repeat(5, 1, 1, 1), noise(1, seed=1).repeat(3, 1, 1, 1)])
    plan = PruneVid(keep_ratio=1.0).plan(prompt_context(tokens))
    assert plan is not None
    assert plan.anchor[0].tolist() == [*range(16), *range(80, 96)]
    assert plan.size[0].tolist() == [5] * 16 + [3] * 16


def test_PruneVid_gives_a_cluster_of_frames_only_its_longest_run():
    a, b = noise(1, seed=0), noise(1, seed=1)
    tokens = torch.cat([a, a, a, b, b, a, b, b])
    plan = PruneVid(keep_ratio=1.0, threshold=-1.0).plan(prompt_context(tokens))
    assert plan is not None
    # Two clusters: frames 0 to 2, and from 3 on; the frame between belongs to the run before.
    assert plan.anchor[0].tolist() == [*range(16), *range(48, 64)]


def test_PruneVid_merges_half_of_each_frame_into_plain_means():
    groups = 5 * torch.eye(16)[:8]
    tokens = (groups.repeat(2, 1) + 0.02 * noise(1)[0].reshape(16, 16)).reshape(1, 4, 4, 16)
    plan = PruneVid().plan(prompt_context(tokens))
    assert plan is not None
    assert plan.num_out == 8
    pairs = tokens.reshape(2, 8, 16).mean(0)
    found = plan.reduce(tokens.reshape(1, 16, 16))[0]
    for token in found:
        assert float((pairs - token).norm(dim=1).min()) < 1e-5


def test_PruneVid_leaves_small_sets_alone():
    tokens = noise(1, side=3)
    assert PruneVid().plan(prompt_context(tokens)) is None
    plan = PruneVid(small=8).plan(prompt_context(tokens))
    assert plan is not None
    assert plan.num_out == 5


def test_PruneVidInner_keeps_what_any_head_of_any_question_token_looks_at():
    attention = torch.full((2, 8, 10), 0.01)
    attention[0, 5, 3], attention[1, 6, 8], attention[:, 6, 1] = 0.9, 0.8, 0.5
    # Text before the question, and a mean that is higher than any of its parts deserves.
    attention[:, 4, 0], attention[:, 5:, 7] = 1.0, 0.4
    stats = GivenStatistics(attention, question=[5, 6, 7])
    plan = PruneVidInner(keep_ratio=0.3).plan(layer_context(torch.zeros(10, 4), stats=stats))
    assert kept(plan) == [1, 3, 8]


def test_PruneVidInner_asks_the_last_token_where_there_is_no_question():
    attention = torch.zeros(2, 8, 10)
    attention[:, -1, 4], attention[:, 3, 6] = 0.5, 0.9
    stats = GivenStatistics(attention)
    plan = PruneVidInner(keep_ratio=0.1).plan(layer_context(torch.zeros(10, 4), stats=stats))
    assert kept(plan) == [4]
