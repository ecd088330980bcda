"""Choice, pooling and likeness of frames, against plain loops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.errors import ShapeError
from tubelet.ops.frames import cells, evenly_spaced, likeness_to_text, merge_labelled

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


@SETTINGS
@given(st.integers(1, 40), st.data())
def test_evenly_spaced_takes_one_frame_of_every_stretch(frames, data):
    num = data.draw(st.integers(1, frames))
    found = evenly_spaced(num, frames).tolist()
    assert len(found) == num
    for i, frame in enumerate(found):
        assert i * frames / num <= frame + 0.5
        assert frame < (i + 1) * frames / num


def test_more_frames_than_there_are_are_refused():
    with pytest.raises(ShapeError, match="between 1 and 3 frames of the clip, got 4"):
        evenly_spaced(4, 3)


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_cells_are_boxes_of_nearly_one_size_in_raster_order(height, width, data):
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    found = cells(height, width, rows, columns).reshape(height, width)
    assert sorted(set(found.flatten().tolist())) == list(range(rows * columns))
    firsts = [int((found.flatten() == box).nonzero()[0]) for box in range(rows * columns)]
    assert firsts == sorted(firsts)
    for box in range(rows * columns):
        y, x = (found == box).nonzero().T
        assert len(y) == len(set(y.tolist())) * len(set(x.tolist()))
        assert height // rows <= len(set(y.tolist())) <= -(-height // rows)
        assert width // columns <= len(set(x.tolist())) <= -(-width // columns)


def test_cells_that_divide_a_frame_are_blocks():
    assert cells(4, 4, 2, 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert cells(24, 24, 12, 24).bincount().tolist() == [2] * 288


def test_empty_cells_are_refused():
    with pytest.raises(ShapeError, match="4 x 4 places has no 5 x 1 boxes"):
        cells(4, 4, 5, 1)


@SETTINGS
@given(st.lists(st.integers(-1, 7), min_size=1, max_size=20), st.integers(0, 99))
def test_merge_labelled_is_the_mean_of_each_label(labels, seed):
    label = torch.tensor(labels)
    if max(labels) < 0:
        with pytest.raises(ShapeError, match=f"all {len(labels)} tokens"):
            merge_labelled(label)
        return
    plan = merge_labelled(label)
    plan.check()
    x = torch.randn(1, len(labels), 3, generator=torch.Generator().manual_seed(seed))
    order = list(dict.fromkeys(n for n in labels if n >= 0))
    wanted = torch.stack([x[0, label == n].mean(0) for n in order])
    assert torch.allclose(plan.reduce(x)[0], wanted, atol=1e-6)
    assert plan.size[0].tolist() == [labels.count(n) for n in order]
    assert plan.anchor[0].tolist() == [labels.index(n) for n in order]
    assert ((plan.index[0] < 0) == (label < 0)).all()


def test_likeness_to_text_weighs_every_word_alike():
    text = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[3.0, 3.0], [1.0, 0.0], [-1.0, -1.0]])
    found = likeness_to_text(x, text)
    assert torch.allclose(found, torch.tensor([1.0, 0.5**0.5, -1.0]), atol=1e-6)


@SETTINGS
@given(st.integers(1, 5), st.integers(0, 99))
def test_likeness_to_text_is_a_cosine(words, seed):
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 3, 4, generator=g), torch.randn(words, 4, generator=g)
    mean = sum(F.normalize(word, dim=0) for word in text) / words
    for i in range(2):
        for j in range(3):
            cosine = float(x[i, j] @ mean / (x[i, j].norm() * mean.norm()))
            assert float(likeness_to_text(x, text)[i, j]) == pytest.approx(cosine, abs=1e-5)


def test_no_text_is_refused():
    with pytest.raises(ShapeError, match="no text to compare"):
        likeness_to_text(torch.ones(2, 3), torch.ones(0, 3))
