"""Density peaks against loops."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.ops.density import density_clusters, density_peaks

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


def by_loops(x: torch.Tensor, neighbours: int) -> list[float]:
    num, channels = x.shape
    gap = [[float((a - b).norm()) / math.sqrt(channels) for b in x] for a in x]
    density = []
    for i in range(num):
        near = sorted(gap[i][j] for j in range(num) if j != i)[:neighbours]
        density.append(math.exp(-sum(d * d for d in near) / len(near)) if near else 1.0)
    scores = []
    for i in range(num):
        above = [gap[i][j] for j in range(num) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * (min(above) if above else max(map(max, gap))))
    return scores


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_density_peaks_are_those_of_the_loops(num, neighbours, chunk, seed):
    x = torch.randn(2, num, 3, generator=torch.Generator().manual_seed(seed))
    found = density_peaks(x, neighbours, chunk)
    for row, sample in zip(found, x, strict=True):
        assert torch.allclose(row, torch.tensor(by_loops(sample, neighbours)), atol=1e-4)


def test_two_clusters_have_their_two_best_centres_in_different_ones():
    generator = torch.Generator().manual_seed(1)
    cluster = 0.05 * torch.randn(10, 4, generator=generator)
    x = torch.cat([cluster[:6], cluster[6:] + 3])
    best = density_peaks(x[None], 3)[0].topk(2).indices.tolist()
    assert sorted(place // 6 for place in best) == [0, 1]


def test_equal_tokens_prefer_the_first():
    scores = density_peaks(torch.ones(1, 5, 4), 2)
    assert bool(scores.isfinite().all())
    assert scores.argmax() == 0


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_what_is_not_valid_is_as_good_as_absent(num, neighbours, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    x, valid = torch.randn(2, num, 3, generator=generator), torch.rand(2, num, generator=generator)
    valid = valid < 0.6
    found = density_peaks(x, neighbours, chunk, valid)
    assert bool((found[~valid] == -torch.inf).all())
    for row, sample, mask in zip(found, x, valid, strict=True):
        if mask.any():
            alone = torch.tensor(by_loops(sample[mask], neighbours))
            assert torch.allclose(row[mask], alone, atol=1e-4)


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.data())
def test_clusters_gather_round_the_highest_peaks(num, chunk, seed, data):
    generator = torch.Generator().manual_seed(seed)
    x, valid = torch.randn(2, num, 3, generator=generator), torch.rand(2, num, generator=generator)
    valid = valid < 0.7
    counts = [data.draw(st.integers(0, n)) for n in valid.sum(1).tolist()]
    centre, target = density_clusters(x, torch.tensor(counts), 3, chunk, valid)
    score = density_peaks(x, 3, chunk, valid)
    for row, count in enumerate(counts):
        best = score[row].topk(count).indices.sort().values.tolist() if count else []
        assert centre[row].nonzero()[:, 0].tolist() == best
        for token in range(num):
            if not valid[row, token] or not best:
                assert target[row, token] == -1
                continue
            gaps = {place: float((x[row, token] - x[row, place]).norm()) for place in best}
            assert gaps[int(target[row, token])] <= min(gaps.values()) + 1e-6
        for place in best:
            assert target[row, place] == place
