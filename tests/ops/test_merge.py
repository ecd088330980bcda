"""Merging, against plain loops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.ops.merge import (
    alternate_similarity,
    bipartite_match,
    blend,
    drop,
    grid_pool,
    nearest_anchor,
    pooled_shape,
)

SETTINGS = settings(deadline=None, max_examples=50, derandomize=True)
SEEDS = st.integers(0, 2**16)


@SETTINGS
@given(st.integers(2, 9), st.integers(0, 2), SEEDS)
def test_alternate_similarity_is_the_cosine_of_even_to_odd(num, protected, seed):
    torch.manual_seed(seed)
    metric = torch.randn(2, protected + num, 3)
    out = alternate_similarity(metric, protected)
    even, odd = range(protected, protected + num, 2), range(protected + 1, protected + num, 2)
    assert out.shape == (2, len(even), len(odd))
    for s, i in enumerate(even):
        for t, j in enumerate(odd):
            cosine = F.cosine_similarity(metric[:, i].double(), metric[:, j].double())
            torch.testing.assert_close(out[:, s, t].double(), cosine, atol=1e-6, rtol=0)


def test_alternate_similarity_of_zero_tokens_is_zero():
    metric = torch.zeros(1, 4, 3)
    metric[0, 1] = 1
    assert alternate_similarity(metric).tolist() == [[[0, 0], [0, 0]]]


def slow_match(
    similarity: list[list[float]], r: int, num: int, protected: int
) -> tuple[list[int], list[int]]:
    edges = []
    for s, row in enumerate(similarity):
        best = max(range(len(row)), key=lambda t: (row[t], -t))
        edges.append((-row[best], s, best))
    target = list(range(num))
    for _, s, t in sorted(edges)[:r]:
        target[protected + 2 * s] = protected + 2 * t + 1
    return target, [n for n in range(num) if target[n] == n]


@SETTINGS
@given(st.integers(2, 12), st.integers(0, 3), SEEDS, st.booleans(), st.data())
def test_bipartite_match_merges_the_most_similar_sources(tokens, protected, seed, ties, data):
    torch.manual_seed(seed)
    num = tokens + protected
    sources, destinations = -(-tokens // 2), tokens // 2
    shape = (2, sources, destinations)
    similarity = torch.randint(0, 3, shape).float() if ties else torch.rand(shape)
    r = data.draw(st.integers(0, sources))
    target, kept = bipartite_match(similarity, r, num, protected)
    for b in range(2):
        expected, remain = slow_match(similarity[b].tolist(), r, num, protected)
        assert target[b].tolist() == expected
        assert kept[b].tolist() == remain
        # Protected tokens stay, and nothing is merged into them.
        assert target[b, :protected].tolist() == list(range(protected))
        assert not set(target[b, protected:].tolist()) & set(range(protected))
        single = bipartite_match(similarity[b : b + 1], r, num, protected)
        assert torch.equal(single[0][0], target[b])
        assert torch.equal(single[1][0], kept[b])
    TokenAssignment.merge(target, kept, torch.ones(2, num)).check()


@pytest.mark.parametrize("r", [-1, 4])
def test_bipartite_match_refuses_to_remove_more_than_the_sources(r):
    with pytest.raises(ShapeError, match=f"between 0 and 3 of 6 tokens, got r = {r}"):
        bipartite_match(torch.rand(1, 3, 3), r, 6)


@SETTINGS
@given(st.integers(1, 9), SEEDS, st.data())
def test_nearest_anchor_is_the_most_similar_kept_token(num, seed, data):
    torch.manual_seed(seed)
    x = torch.randn(2, num, 3)
    count = data.draw(st.integers(1, num))
    kept = torch.stack([torch.randperm(num)[:count].sort().values for _ in range(2)])
    target = nearest_anchor(x, kept)
    for b in range(2):
        anchors = kept[b].tolist()
        for n in range(num):
            if n in anchors:
                assert target[b, n].item() == n
                continue
            cosine = {a: F.cosine_similarity(x[b, n], x[b, a], dim=0).item() for a in anchors}
            assert target[b, n].item() in anchors
            assert cosine[target[b, n].item()] == pytest.approx(max(cosine.values()), abs=1e-6)
    TokenAssignment.merge(target, kept, torch.ones(2, num)).check()


def test_kept_twins_stay_apart_and_equal_anchors_prefer_the_first():
    x = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [2, 0]]])
    assert nearest_anchor(x, torch.tensor([[1, 2]])).tolist() == [[1, 1, 2, 1]]


def test_nearest_anchor_ignores_length():
    x = torch.tensor([[[1.0, 0.0], [100.0, 100.0], [3.0, 0.1]]])
    assert nearest_anchor(x, torch.tensor([[0, 1]])).tolist() == [[0, 1, 0]]


@SETTINGS
@given(st.integers(1, 9), SEEDS, st.data())
def test_drop_keeps_the_true_entries(num, seed, data):
    torch.manual_seed(seed)
    count = data.draw(st.integers(1, num))
    mask = torch.stack([torch.randperm(num) < count for _ in range(2)])
    x = torch.randn(2, num, 3)
    assignment = drop(mask, count)
    assignment.check()
    assert assignment.copies
    out = assignment.reduce(x)
    for b in range(2):
        assert torch.equal(out[b], x[b][mask[b]])
        assert torch.equal(assignment.index[b] >= 0, mask[b])


SIDES = st.integers(1, 5)


@SETTINGS
@given(st.tuples(SIDES, SIDES, SIDES), st.tuples(*[st.integers(1, 6)] * 3), SEEDS)
def test_grid_pool_equals_average_pooling_with_ragged_edges(shape, factor, seed):
    torch.manual_seed(seed)
    grid = TokenGrid(frames=shape[0], height=shape[1], width=shape[2], before=1, after=2)
    assignment = grid_pool(grid, factor, 2, None)
    assignment.check()
    x = torch.randn(2, grid.num_tokens, 3)
    out = assignment.reduce(x)
    video = x[:, 1:-2].transpose(1, 2).reshape(2, 3, *shape)
    # torch refuses a kernel beyond the input; a box is cut at the far edge either way.
    box = tuple(min(n, f) for n, f in zip(shape, factor, strict=True))
    pooled = F.avg_pool3d(video, box, box, ceil_mode=True, count_include_pad=False)
    assert pooled.shape[2:] == pooled_shape(grid, factor)
    torch.testing.assert_close(out[:, 1:-2], pooled.flatten(2).transpose(1, 2))
    # Tokens around the video pass unchanged.
    assert torch.equal(out[:, :1], x[:, :1])
    assert torch.equal(out[:, -2:], x[:, -2:])
    assert assignment.size.sum().item() == 2 * grid.num_tokens


def test_grid_pool_of_single_tokens_is_the_identity():
    grid = TokenGrid(frames=2, height=3, width=2, before=1)
    x = torch.randn(1, grid.num_tokens, 4)
    assert torch.equal(grid_pool(grid, (1, 1, 1), 1, None).reduce(x), x)


def test_pooled_shape_rounds_up():
    assert pooled_shape(TokenGrid(frames=5, height=4, width=1), (2, 4, 3)) == (3, 1, 1)


@SETTINGS
@given(st.integers(1, 9), st.floats(0, 1), SEEDS)
def test_blend_gives_kept_tokens_at_least_their_share(num, share, seed):
    torch.manual_seed(seed)
    kept = torch.rand(num) < 0.4
    kept[0] = True
    places = kept.nonzero()[:, 0]
    target = places[torch.randint(len(places), (num,))]
    target = torch.where(torch.rand(num) < 0.2, -1, target)
    target[places] = places
    x = torch.randn(1, num, 3)
    plan = blend(target[None], places[None], share)
    plan.check()
    found = plan.reduce(x)[0]
    for out, place in zip(found, places.tolist(), strict=True):
        others = [n for n in range(num) if target[n] == place and n != place]
        wanted = x[0, place]
        if others:
            own = max(share, 1 / (len(others) + 1))
            wanted = own * wanted + (1 - own) * x[0, others].mean(0)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
