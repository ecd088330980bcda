"""What STTM and LLaVA-Scissor claim of groups of any shape."""

import pytest
import torch
import torch.nn.functional as F
from prompt_contexts import layer_context, noise, prompt_context
from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.accelerate import accelerate
from tubelet.ops import cosine as cosine_parts
from tubelet.recipes import STTM, FastV, LLaVAScissor, RandomPrompt, prompt_trees
from tubelet.testing import tiny_llm


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def inside(*videos: Tensor):
    """All tokens of videos [T, H, W, C] in front of a layer."""
    grids = [TokenGrid(frames=v.shape[0], height=v.shape[1], width=v.shape[2]) for v in videos]
    hidden = torch.cat([v.flatten(0, 2) for v in videos])
    return layer_context(hidden, grids=grids)


# STTM


def halves(start: int, end: int) -> list[tuple[int, int]]:
    """The two parts of a side that is a power of two."""
    middle = (start + end) // 2
    return [(start, middle), (middle, end)]


def squares_by_hand(frame: Tensor, threshold: float, box: tuple[int, int, int, int]):
    """Squares (top, bottom, left, right) of a frame [H, W, C] of a power of two, from one box."""
    top, bottom, left, right = box
    if bottom - top == 1:
        return [box]
    parts = [(*rows, *columns) for rows in halves(top, bottom) for columns in halves(left, right)]

    def mean(b):
        return frame[b[0] : b[1], b[2] : b[3]].flatten(0, 1).mean(0)

    if all(cosine(mean(box), mean(part)) >= threshold for part in parts):
        return [box]
    return [square for part in parts for square in squares_by_hand(frame, threshold, part)]


def sttm_by_hand(video: Tensor, spatial: float, temporal: float) -> dict[int, Tensor]:
    """First place of each group to its token, for [T, S, S, C] with S a power of two > 1."""
    side = video.shape[1]
    nodes = []
    for t, frame in enumerate(video):
        for rows in halves(0, side):
            for columns in halves(0, side):
                for box in squares_by_hand(frame, spatial, (*rows, *columns)):
                    feature = frame[box[0] : box[1], box[2] : box[3]].flatten(0, 1).mean(0)
                    nodes.append((t * side * side + box[0] * side + box[2], t, box, feature))
    group = list(range(len(nodes)))

    def holds(a, b):
        return a[0] <= b[0] and b[1] <= a[1] and a[2] <= b[2] and b[3] <= a[3]

    for i, (_, t, a, x) in enumerate(nodes):
        for j, (_, u, b, y) in enumerate(nodes):
            nested = u == t + 1 and (holds(a, b) or holds(b, a))
            if nested and cosine(x, y) >= temporal:
                old, new = group[j], group[i]
                group = [new if g == old else g for g in group]
    found = {}
    for g in set(group):
        members = [node for node, own in zip(nodes, group, strict=True) if own == g]
        found[min(m[0] for m in members)] = torch.stack([m[3] for m in members]).mean(0)
    return dict(sorted(found.items()))


def patchwork(seed: int, frames: int = 3, side: int = 8) -> Tensor:
    """Frames of uniform squares of several sizes that change a little, [T, side, side, 8]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(8, 2, 2, generator=generator)
    video = []
    for _ in range(frames):
        coarse = coarse + 0.4 * torch.randn(8, 2, 2, generator=generator)
        middle = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
        middle = middle + 0.6 * torch.randn(8, 4, 4, generator=generator) * (
            torch.rand(4, 4, generator=generator) < 0.4
        )
        fine = middle.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
        fine = fine + 0.8 * torch.randn(8, side, side, generator=generator) * (
            torch.rand(side, side, generator=generator) < 0.2
        )
        video.append(fine.permute(1, 2, 0))
    return torch.stack(video)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("spatial", "temporal"), [(0.8, 0.9), (0.9, 0.8), (0.5, 1.0), (1.0, 0.8)])
def test_STTM_merges_squares_of_a_quadtree_and_chains_of_nested_squares(seed, spatial, temporal):
    video = patchwork(seed)
    context = inside(video)
    plan = STTM(spatial=spatial, temporal=temporal).plan(context)
    assert plan is not None
    plan.check()
    # A threshold of 1 turns a step off.
    off = {1.0: 2.0}
    wanted = sttm_by_hand(video, off.get(spatial, spatial), off.get(temporal, temporal))
    assert 4 < len(wanted) < 192
    assert plan.anchor[0].tolist() == list(wanted)
    found = plan.reduce(context.hidden)[0]
    torch.testing.assert_close(found, torch.stack(list(wanted.values())), atol=1e-5, rtol=0)


def test_STTM_weighs_squares_of_a_chain_alike_whatever_their_sizes():
    # A uniform frame of one square, then one in which a quarter is a little different.
    video = torch.zeros(2, 2, 2, 4)
    video[..., 0] = 1
    video[1, 0, 0, 1] = 0.8
    plan = STTM(spatial=0.99, temporal=0.7, root=0).plan(inside(video))
    assert plan is not None
    assert plan.num_out == 1
    assert plan.weight[0].tolist() == pytest.approx([1 / 20] * 4 + [1 / 5] * 4)


def test_STTM_leaves_the_first_row_and_column_of_odd_sides_without_partners():
    video = noise(1, side=1).repeat(1, 5, 3, 1)
    plan = STTM(root=1, temporal=1.0).plan(inside(video))
    assert plan is not None
    # Sides 5 x 3, 3 x 2, 2 x 1 and 1 x 1: the largest squares are rows 0 and 1 to 4.
    assert plan.index[0].tolist() == [0] * 3 + [1] * 12


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (1, 6), (7, 1), (6, 9)])
def test_STTM_averages_the_tokens_of_each_box_of_its_quadtree(height, width):
    video = torch.randn(2, height, width, 3, generator=torch.Generator().manual_seed(height))
    boxes = prompt_trees._quadtree(
        TokenGrid(frames=2, height=height, width=width), torch.device("cpu")
    )
    nodes, rows = prompt_trees._pyramid(video, len(boxes))
    assert boxes[-1].unique().tolist() == [0]
    for box, row in zip(boxes, rows, strict=True):
        for number in box.unique().tolist():
            wanted = video.flatten(1, 2)[:, box == number].mean(1)
            torch.testing.assert_close(nodes[row[:, number]], wanted)


def test_STTM_keeps_videos_of_one_prompt_apart():
    one, other = patchwork(0), patchwork(0, frames=2)
    plan = STTM().plan(inside(one, other))
    assert plan is not None
    parts = [STTM().plan(inside(video)) for video in (one, other)]
    assert plan.anchor[0].tolist() == [
        *parts[0].anchor[0].tolist(),
        *(parts[1].anchor[0] + 192).tolist(),
    ]
    assert torch.equal(plan.weight, torch.cat([part.weight for part in parts], 1))


@pytest.mark.parametrize(("root", "tokens"), [(0, 1), (1, 4), (2, 16), (3, 64), (9, 64)])
def test_STTM_counts_levels_from_the_whole_frame(root, tokens):
    uniform = noise(1, side=1).repeat(1, 8, 8, 1)
    plan = STTM(root=root).plan(inside(uniform))
    assert (64 if plan is None else plan.num_out) == tokens


@pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
def test_STTM_refuses_what_another_recipe_has_shortened():
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    with (
        accelerate(model, RandomPrompt(), STTM(layer=3)),
        pytest.raises(UnsupportedError, match="needs all 64 video tokens"),
        torch.no_grad(),
    ):
        model(**inputs)


def test_STTM_composes_with_a_later_reduction():
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    recipes = STTM(layer=2, spatial=0.3), FastV(layer=3)
    with accelerate(model, *recipes) as handle, torch.no_grad():
        model(**inputs)
    tokens = handle.report().tokens_per_layer
    text = tokens[0] - 64
    assert text < tokens[2] < tokens[0]
    assert tokens[3] - text == -(-(tokens[2] - text) // 2)


# LLaVA-Scissor


def components(x: list[Tensor], threshold: float) -> list[list[int]]:
    """Members of each connected component."""
    left, found = list(range(len(x))), []
    while left:
        group, frontier = [], [left.pop(0)]
        while frontier:
            here = frontier.pop()
            group.append(here)
            near = [n for n in left if cosine(x[here], x[n]) > threshold]
            left = [n for n in left if n not in near]
            frontier += near
        found.append(sorted(group))
    return found


def scissor_by_hand(frames: Tensor, threshold: float) -> tuple[Tensor, list[list[int]]]:
    """[R, C] new tokens of [T, P, C], and the tokens that were added to each."""
    means = [
        frame[group].mean(0) for frame in frames for group in components(list(frame), threshold)
    ]
    tokens = [
        torch.stack([means[n] for n in group]).mean(0) for group in components(means, threshold)
    ]
    flat = frames.flatten(0, 1)
    nearest = [max(range(len(tokens)), key=lambda r: cosine(tokens[r], x)) for x in flat]
    members = [[n for n, r in enumerate(nearest) if r == own] for own in range(len(tokens))]
    new = [
        (token + flat[group].sum(0)) / (len(group) + 1)
        for token, group in zip(tokens, members, strict=True)
    ]
    return torch.stack(new), members


@pytest.mark.parametrize("seed", range(4))
def test_LLaVAScissor_keeps_a_token_of_each_component_of_the_clip(seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(5, (3, 4, 4), generator=generator)
    tokens = 4 * torch.eye(16)[kinds] + 0.3 * noise(3, seed=seed)
    plan = LLaVAScissor(threshold=0.8).plan(prompt_context(tokens))
    assert plan is not None
    plan.check()
    wanted, members = scissor_by_hand(tokens.flatten(1, 2), 0.8)
    order = sorted(range(len(members)), key=lambda r: members[r][0])
    assert plan.anchor[0].tolist() == [members[r][0] for r in order]
    # The formula is met wherever tokens are most like their own component, as here.
    found = plan.reduce(tokens.reshape(1, 48, 16))[0]
    torch.testing.assert_close(found, wanted[order], atol=1e-5, rtol=0)


def test_LLaVAScissor_links_through_others():
    # Ten directions, each near the next only; and one apart.
    angles = torch.arange(10) * 0.3
    chain = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)
    tokens = torch.cat([chain, torch.tensor([[0.0, 0, 1]])]).reshape(1, 1, 11, 3)
    plan = LLaVAScissor(threshold=0.9).plan(prompt_context(tokens))
    assert plan is not None
    assert plan.anchor.tolist() == [[0, 10]]
    assert plan.size.tolist() == [[10, 1]]


def test_LLaVAScissor_moves_a_token_to_the_component_it_is_most_like():
    # A chain bends round until its end is more like another component than like its own mean.
    angles = torch.tensor([0.0, 0.4, 0.8, 1.2, 1.6, 2.0])
    chain = torch.stack([angles.cos(), angles.sin()], 1)
    other = torch.tensor([[-0.8, 0.6]])
    tokens = torch.cat([chain, other]).reshape(1, 1, 7, 2)
    plan = LLaVAScissor(threshold=0.91).plan(prompt_context(tokens))
    assert plan is not None
    assert plan.index.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert torch.allclose(plan.matrix().sum(2), torch.ones(1, 2))


def test_LLaVAScissor_joins_components_over_frames():
    tokens = torch.eye(16).reshape(1, 4, 4, 16).repeat(3, 1, 1, 1)
    tokens[1] = tokens[1].flatten(0, 1).roll(5, 0).reshape(4, 4, 16)
    plan = LLaVAScissor().plan(prompt_context(tokens))
    assert plan is not None
    assert plan.anchor[0].tolist() == list(range(16))
    assert plan.size[0].tolist() == [3] * 16


def test_LLaVAScissor_is_the_same_each_time():
    tokens = noise(6, side=6, channels=4)
    plans = [LLaVAScissor().plan(prompt_context(tokens)) for _ in range(3)]
    assert plans[0] is not None
    assert all(torch.equal(plans[0].index, plan.index) for plan in plans[1:])


def test_LLaVAScissor_links_the_components_of_neighbouring_frames():
    tokens = torch.eye(4)[[0, 0, 1, 1, 2]].reshape(5, 1, 1, 4)
    plan = LLaVAScissor().plan(prompt_context(tokens))
    assert plan is not None
    assert plan.index.tolist() == [[0, 0, 1, 1, 2]]


@pytest.mark.parametrize("seed", range(3))
def test_LLaVAScissor_does_not_depend_on_how_the_similarities_are_parted(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(9, (4, 3, 4), generator=generator)
    tokens = prompt_context(4 * torch.eye(16)[kinds] + 0.4 * noise(4, 4, seed=seed)[:, :3])
    whole = LLaVAScissor(threshold=0.8).plan(tokens)
    monkeypatch.setattr(prompt_trees, "ROWS", 3)
    monkeypatch.setattr(cosine_parts, "PART", 4 * 12 * 5)
    parted = LLaVAScissor(threshold=0.8).plan(tokens)
    assert whole is not None
    assert 4 < whole.num_out < 30
    assert parted is not None
    assert torch.equal(whole.index, parted.index)
