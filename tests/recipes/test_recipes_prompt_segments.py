"""What the papers claim of prompt reductions within groups and segments of frames."""

import math

import pytest
import torch
import torch.nn.functional as F
from prompt_contexts import kept, noise, prompt_context
from torch import Tensor

from tubelet.core.prompt import PromptContext
from tubelet.recipes import DyCoke, FastVID, FlashVID


def watched(tokens: Tensor, received: Tensor | None = None) -> PromptContext:
    """A video of tokens [T, H, W, C] that receive given or random attention [T, H * W]."""
    if received is None:
        generator = torch.Generator().manual_seed(9)
        received = torch.rand(tokens.shape[:3], generator=generator)
    return prompt_context(tokens, vision={("received", -1): received.reshape(1, -1)})


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


# DyCoke


def dycoke_by_hand(x: Tensor, keep: int) -> list[int]:
    """Groups of four [T, P, C]: b against a, d against c, then c against a."""
    frames, places = x.shape[:2]
    chosen = []
    for start in range(0, frames, 4):
        chosen += [start * places + p for p in range(places)]
        for frame, other in ((start + 1, start), (start + 2, start), (start + 3, start + 2)):
            if frame < frames:
                order = sorted(range(places), key=lambda p: cosine(x[frame, p], x[other, p]))
                chosen += [frame * places + p for p in order[:keep]]
    return sorted(chosen)


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 7, 8, 9])
def test_DyCoke_keeps_the_first_of_each_group_and_what_the_others_do_not_repeat(frames):
    tokens = noise(frames, seed=frames)
    plan = DyCoke(keep_ratio=0.3).plan(prompt_context(tokens))
    assert kept(plan) == dycoke_by_hand(tokens.reshape(frames, 16, -1), 5)


def test_DyCoke_compares_the_fourth_frame_with_the_third():
    tokens = noise(1).repeat(4, 1, 1, 1)
    # One place turns in the third frame for good, another in the fourth, a little.
    tokens[2:, 0, 0] *= -1
    tokens[3, 3, 3] += 0.1 * noise(1, seed=1)[0, 3, 3]
    plan = DyCoke(keep_ratio=1 / 16).plan(prompt_context(tokens))
    assert kept(plan)[-2:] == [2 * 16, 3 * 16 + 15]


def test_DyCoke_leaves_a_single_frame_whole():
    assert DyCoke().plan(prompt_context(noise(1))) is None


# FastVID


def peaks_by_loops(x: Tensor, neighbours: int) -> list[float]:
    """Density times distance to a denser one, for tokens [n, C]."""
    num = len(x)
    gap = (torch.cdist(x[None], x[None])[0] / math.sqrt(x.shape[1])).tolist()
    density = []
    for i in range(num):
        near = sorted(gap[i][j] for j in range(num) if j != i)[:neighbours]
        density.append(math.exp(-sum(d * d for d in near) / len(near)) if near else 1.0)
    largest = max(map(max, gap))
    above = [[gap[i][j] for j in range(num) if density[j] > density[i]] for i in range(num)]
    return [density[i] * (min(above[i]) if above[i] else largest) for i in range(num)]


def fastvid_by_hand(
    x: Tensor, received: Tensor, share: int, stretches: list[tuple[int, int]]
) -> dict[int, Tensor]:
    """Kept place to its new token, for [T, P, C] and `share` tokens of each frame."""
    places, found = x.shape[1], {}
    context = math.floor(share * 0.4)
    for start, end in stretches:
        holders = list(range(end - 1, start - 1, -4))
        salient = {
            t: received[t].argsort(descending=True)[: share - context].tolist()
            for t in range(start, end)
        }
        rest = [(t, p) for t in range(start, end) for p in range(places) if p not in salient[t]]
        total, anchors = context * (end - start), []
        for number, t in enumerate(holders):
            own = [p for p in range(places) if p not in salient[t]]
            score = peaks_by_loops(x[t, own], 4)
            order = sorted(range(len(own)), key=lambda i: -score[i])
            quota = total * (number + 1) // len(holders) - total * number // len(holders)
            anchors += [(t, own[i]) for i in order[:quota]]
        members = {anchor: [] for anchor in anchors}
        for t, p in rest:
            if (t, p) not in members:
                members[max(anchors, key=lambda a: cosine(x[a], x[t, p]))].append(x[t, p])
        for t in range(start, end):
            found |= {t * places + p: x[t, p] for p in salient[t]}
        for (t, p), others in members.items():
            new = x[t, p]
            if others:
                w = max(1 / (len(others) + 1), 0.6)
                new = w * new + (1 - w) * torch.stack(others).mean(0)
            found[t * places + p] = new
    return dict(sorted(found.items()))


def scenes(*lengths: int) -> Tensor:
    """Frames of [4, 4] that share a direction per scene, [T, 4, 4, 16]."""
    base = torch.zeros(sum(lengths), 4, 4, 16)
    start = 0
    for number, length in enumerate(lengths):
        base[start : start + length, ..., number] = 3
        start += length
    return base + 0.4 * noise(sum(lengths))


@pytest.mark.parametrize("lengths", [(6, 2), (1, 9), (5, 4, 3)])
def test_FastVID_merges_each_segment_around_the_density_peaks_of_a_few_frames(lengths):
    tokens, frames = scenes(*lengths), sum(lengths)
    context = watched(tokens)
    recipe = FastVID(keep_ratio=5 / 16, segments=1, threshold=0.7)
    plan = recipe.plan(context)
    assert plan is not None
    plan.check()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    stretches = list(zip([0, *ends[:-1]], ends, strict=True))
    received = context.statistic("received", -1).reshape(frames, 16)
    wanted = fastvid_by_hand(tokens.reshape(frames, 16, -1), received, 5, stretches)
    assert plan.anchor[0].tolist() == list(wanted)
    new = plan.reduce(context.hidden)[0]
    torch.testing.assert_close(new, torch.stack(list(wanted.values())), atol=1e-5, rtol=0)


def test_FastVID_cuts_at_the_least_similar_transitions():
    # No transition is below the threshold; the least similar one is cut because two are asked for.
    tokens = scenes(5, 4)
    cut = FastVID(keep_ratio=5 / 16, segments=2, threshold=-1).plan(watched(tokens))
    whole = FastVID(keep_ratio=5 / 16, segments=1, threshold=-1).plan(watched(tokens))
    assert cut is not None
    assert whole is not None
    into_first = torch.zeros(9 * 16, dtype=torch.bool)
    into_first[: 5 * 16] = True

    def crosses(plan):
        return bool((into_first[plan.anchor[0][plan.index[0]]] != into_first).any())

    assert not crosses(cut)
    assert cut.anchor.tolist() != whole.anchor.tolist()


def test_FastVID_merges_no_token_into_an_anchor_of_another_segment():
    # Nothing keeps the frames of noise apart but the cuts.
    tokens = noise(9)
    plan = FastVID(keep_ratio=5 / 16, segments=3, threshold=-1).plan(watched(tokens))
    mean = tokens.flatten(1, 2).mean(1)
    similar = F.cosine_similarity(mean[1:], mean[:-1], dim=-1)
    starts = (similar.argsort()[:2] + 1).sort().values
    segment = torch.searchsorted(starts, torch.arange(9), right=True).repeat_interleave(16)
    assert plan is not None
    live = plan.index[0] >= 0
    assert torch.equal(segment[plan.anchor[0][plan.index[0, live]]], segment[live])
    assert int((plan.size > 1).sum()) > 0


@pytest.mark.parametrize("frames", [1, 3, 8, 11])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.33, 0.75, 0.97])
@pytest.mark.parametrize("merged", [0.0, 0.4, 1.0])
def test_FastVID_keeps_exactly_its_budget(frames, keep_ratio, merged):
    for segments in (1, 8):
        recipe = FastVID(keep_ratio=keep_ratio, segments=segments, threshold=0.0, merged=merged)
        plan = recipe.plan(watched(noise(frames)))
        assert plan is not None
        plan.check()
        assert plan.num_out == math.ceil(frames * 16 * keep_ratio - 1e-9)
        assert torch.allclose(plan.matrix().sum(2), torch.ones(1, plan.num_out))


# FlashVID


def moving() -> tuple[Tensor, Tensor]:
    """Sixteen objects [16, C], and four frames in which all of them move by one place each."""
    objects = noise(1, channels=64)[0].reshape(16, 64)
    return objects, torch.stack([objects.roll(t, 0).reshape(4, 4, 64) for t in range(4)])


def test_FlashVID_follows_what_moves():
    objects, tokens = moving()
    plan = FlashVID(keep_ratio=0.25, chosen=0.0, segments=1, threshold=-1).plan(watched(tokens))
    assert plan is not None
    assert plan.anchor[0].tolist() == list(range(16))
    assert plan.size[0].tolist() == [4] * 16
    torch.testing.assert_close(plan.reduce(tokens.reshape(1, 64, -1))[0], objects)


def test_FlashVID_grows_no_tree_across_a_cut():
    _, tokens = moving()
    plan = FlashVID(keep_ratio=0.5, chosen=0.0, segments=4, threshold=-1).plan(watched(tokens))
    assert plan is not None
    # Every frame is a segment, so there are 64 trees of one token: the first 32 stay.
    assert plan.anchor[0].tolist() == list(range(32))


def test_FlashVID_takes_no_more_links_than_its_budget_needs_and_the_most_similar():
    objects, tokens = moving()
    tokens = tokens[:2].clone()
    # Objects change a little; those with lower numbers change more.
    change = torch.linspace(0.3, 0.05, 16)[:, None] * noise(1, channels=64, seed=4).reshape(16, 64)
    tokens[1] = (objects + change).roll(1, 0).reshape(4, 4, 64)
    plan = FlashVID(keep_ratio=26 / 32, chosen=0.0, segments=1, threshold=-1).plan(watched(tokens))
    assert plan is not None
    similar = F.cosine_similarity(objects, objects + change)
    joined = (plan.size[0] == 2).nonzero()[:, 0]
    assert plan.num_out == 26
    assert plan.anchor[0, joined].tolist() == similar.topk(6).indices.sort().values.tolist()


def test_FlashVID_chooses_attended_tokens_far_from_those_chosen():
    tokens, places = noise(3, seed=2), 16
    context = watched(tokens)
    plan = FlashVID(keep_ratio=4 / 16, chosen=1.0).plan(context)
    wanted = []
    for t, attention in enumerate(context.statistic("received", -1).reshape(3, places)):
        unit = F.normalize(tokens[t].reshape(places, -1), dim=-1)
        gaps = 1 - unit @ unit.T
        apart = gaps.clone().fill_diagonal_(torch.inf).amin(1)
        picked = [int((apart * attention).argmax())]
        while len(picked) < 4:
            worth = gaps[:, picked].amin(1) * attention
            worth[picked] = -1
            picked.append(int(worth.argmax()))
        wanted += [t * places + p for p in sorted(picked)]
    assert plan is not None
    assert plan.anchor[0].tolist() == wanted


def test_FlashVID_merges_the_smaller_trees_into_the_most_similar_larger_ones():
    base = torch.eye(16)[:4]
    # Two places stay in all frames, one in the first two, one is new in the last.
    tokens = torch.zeros(3, 2, 2, 16)
    tokens[:, 0, 0], tokens[:, 0, 1] = base[0], base[1]
    tokens[:2, 1, 0], tokens[2, 1, 0] = base[2] + 0.2 * base[1], torch.eye(16)[9] + 0.1 * base[0]
    tokens[0, 1, 1], tokens[1, 1, 1], tokens[2, 1, 1] = torch.eye(16)[5:8] + 0.1 * base[1]
    plan = FlashVID(keep_ratio=2 / 12, chosen=0.0, segments=1, threshold=-1).plan(watched(tokens))
    assert plan is not None
    assert plan.anchor.tolist() == [[0, 1]]
    assert plan.index[0].tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("frames", [1, 3, 9])
@pytest.mark.parametrize("keep_ratio", [0.02, 0.1, 0.4, 0.96])
def test_FlashVID_keeps_exactly_its_budget(frames, keep_ratio):
    still = noise(1).repeat(frames, 1, 1, 1)
    for tokens in (still, noise(frames)):
        for chosen in (0.0, 0.7, 1.0):
            plan = FlashVID(keep_ratio=keep_ratio, chosen=chosen).plan(watched(tokens))
            assert plan is not None
            plan.check()
            assert plan.num_out == math.ceil(frames * 16 * keep_ratio - 1e-9)
