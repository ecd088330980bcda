"""Scores, against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.ops.score import (
    class_attention,
    embedding_difference,
    pixel_difference,
    rank_of,
    saliency,
    tubelet_frames,
    white_noise,
)

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
SEEDS = st.integers(0, 2**16)


@SETTINGS
@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 3)] * 3), SEEDS)
def test_tubelets_are_boxes_of_the_clip_in_raster_order(tubelet, grid, seed):
    torch.manual_seed(seed)
    (depth, tall, wide), (rows, high, across) = tubelet, grid
    clip = torch.randn(2, rows * depth, 3, high * tall, across * wide)
    cut = tubelet_frames(clip, tubelet)
    assert cut.shape == (2, rows, high * across, depth, 3 * tall * wide)
    for t in range(rows):
        for y in range(high):
            for x in range(across):
                for frame in range(depth):
                    box = clip[
                        :,
                        t * depth + frame,
                        :,
                        y * tall : (y + 1) * tall,
                        x * wide : (x + 1) * wide,
                    ]
                    assert torch.equal(cut[:, t, y * across + x, frame], box.flatten(1))


@pytest.mark.parametrize("tubelet", [(3, 2, 2), (2, 3, 2), (2, 2, 3)])
def test_clips_that_do_not_divide_are_refused(tubelet):
    with pytest.raises(ShapeError, match="clip 4x4x4 is not a whole number of"):
        tubelet_frames(torch.zeros(1, 4, 3, 4, 4), tubelet)


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 6), SEEDS)
def test_pixel_difference_is_from_first_to_last_frame(length, width, seed):
    torch.manual_seed(seed)
    earlier, later = torch.randn(2, 3, length, width), torch.randn(2, 3, length, width)
    out = pixel_difference(earlier, later)
    for b in range(2):
        for p in range(3):
            first, last = earlier[b, p, 0].tolist(), later[b, p, length - 1].tolist()
            mean = sum(abs(x - y) for x, y in zip(first, last, strict=True)) / width
            assert out[b, p].item() == pytest.approx(mean, abs=1e-6)


def test_pixel_difference_sees_motion_inside_one_tubelet():
    box = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert pixel_difference(box, box).item() == 2.0
    assert pixel_difference(box[:1], box[:1]).item() == 0.0


@SETTINGS
@given(st.integers(1, 6), SEEDS, st.floats(0.01, 100))
def test_embedding_difference_is_one_minus_the_cosine(width, seed, factor):
    torch.manual_seed(seed)
    x, y = torch.randn(4, width), torch.randn(4, width)
    out = embedding_difference(x, y)
    for row in range(4):
        a, b = x[row].double(), y[row].double()
        cosine = (a @ b / (a.norm() * b.norm())).item()
        assert out[row].item() == pytest.approx(1 - cosine, abs=1e-5)
    torch.testing.assert_close(embedding_difference(factor * x, y), out, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding_difference(y, x), out, atol=1e-6, rtol=0)


def test_embedding_difference_at_the_corners():
    x = torch.tensor([1.0, 0.0])
    assert embedding_difference(x, 3 * x).item() == 0
    assert embedding_difference(x, -x).item() == 2
    assert embedding_difference(x, torch.zeros(2)).item() == 1
    assert embedding_difference(x.half(), x.half()).dtype == torch.float32


@SETTINGS
@given(st.integers(1, 4), st.integers(1, 7), SEEDS)
def test_class_attention_sums_row_times_norm_over_heads(heads, num, seed):
    torch.manual_seed(seed)
    row, norm = torch.rand(2, heads, num), torch.rand(2, heads, num)
    out = class_attention(row, norm)
    for b in range(2):
        for j in range(num):
            total = math.fsum(row[b, h, j].item() * norm[b, h, j].item() for h in range(heads))
            assert out[b, j].item() == pytest.approx(total, rel=1e-5)


def slow_saliency(entropy: list[float]) -> list[float]:
    focus = [-e for e in entropy]
    low, high = min(focus), max(focus)
    if low == high:
        return [1.0] * len(focus)
    unit = [(f - low) / (high - low) for f in focus]
    mean = math.fsum(unit) / len(unit)
    cut = [max(u - mean, 0.0) for u in unit]
    return [c / max(cut) for c in cut]


@SETTINGS
@given(st.integers(1, 9), SEEDS)
def test_saliency_is_the_scaled_negative_entropy_above_its_mean(num, seed):
    torch.manual_seed(seed)
    entropy = torch.randint(0, 5, (3, num)).float()
    out = saliency(entropy)
    for b in range(3):
        assert out[b].tolist() == pytest.approx(slow_saliency(entropy[b].tolist()), abs=1e-5)
        assert torch.equal(saliency(entropy[b : b + 1])[0], out[b])
    order = torch.randperm(num)
    torch.testing.assert_close(saliency(entropy[:, order]), out[:, order], atol=1e-6, rtol=0)


def test_saliency_prefers_focused_tokens_and_cuts_the_background():
    assert saliency(torch.tensor([[0.0, 3.0, 3.0, 2.0]])).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_saliency_without_a_ranking_is_one_everywhere():
    entropy = torch.stack([torch.full((4,), 2.5), torch.arange(4.0)])
    assert saliency(entropy)[0].tolist() == [1.0] * 4
    assert saliency(torch.tensor([[3.0]])).tolist() == [[1.0]]


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


@SETTINGS
@given(st.integers(1, 50), st.integers(-(2**40), 2**40))
def test_white_noise_is_the_integer_finaliser(num, seed):
    out = white_noise(num, seed)
    assert out.dtype == torch.float32
    keys = [(i + seed * 0x9E3779B1) % 2**32 for i in range(num)]
    assert out.tolist() == [(mixed(key) >> 8) / 2**24 for key in keys]


def test_white_noise_is_roughly_uniform_and_uncorrelated():
    noise = white_noise(20000, 3)
    assert 0 <= float(noise.min()) < float(noise.max()) < 1
    share = torch.histc(noise, bins=20, min=0, max=1) / 1000
    # One standard deviation of a bin is 3 %.
    assert float((share - 1).abs().max()) < 0.15
    centred = noise - noise.mean()
    lag = (centred[1:] * centred[:-1]).mean() / centred.var()
    assert abs(float(lag)) < 0.03


def test_white_noise_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = white_noise(2000, 1)
    torch.manual_seed(2)
    assert torch.equal(white_noise(2000, 1), first)
    assert torch.equal(white_noise(500, 1), first[:500])
    other = white_noise(2000, 2)
    both = torch.stack([first, other])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.1


@SETTINGS
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), SEEDS)
def test_rank_counts_the_entries_in_front(values, seed):
    torch.manual_seed(seed)
    ranks = rank_of(torch.tensor([values, values[::-1]]).float())
    for row, scores in enumerate((values, values[::-1])):
        for i, score in enumerate(scores):
            higher = sum(other > score for other in scores)
            earlier = sum(other == score for other in scores[:i])
            assert ranks[row, i].item() == higher + earlier
