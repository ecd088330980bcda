"""Clips of named objects show what their state says, measured from the pixels."""

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import ClipError, UnsupportedError
from tubelet.train.clips import TEST_SEED
from tubelet.train.clips.scenes import heading
from tubelet.train.detector import detect
from tubelet.train.questions.scene import (
    COLOURS,
    MOST_OBJECTS,
    SHAPES,
    THIRDS,
    make_objects,
    sample_objects,
)
from tubelet.train.world import ATTRIBUTES


@pytest.fixture(scope="module")
def scenes():
    return make_objects(160, 3, background="black")


def bright(pixels: Tensor) -> Tensor:
    """`[..., h, w]` where something is painted on black."""
    return pixels.amax(-3) > 0.2


def middles(mask: Tensor) -> Tensor:
    """(x, y) `[..., 2]` of the true pixels, from the middle of the frame."""
    line = torch.arange(mask.shape[-1]) - (mask.shape[-1] - 1) / 2
    total = mask.float().sum((-1, -2)).clamp(min=1)
    return torch.stack(
        [(mask.sum(-2) * line).sum(-1) / total, (mask.sum(-1) * line).sum(-1) / total], dim=-1
    )


def alone(scenes) -> Tensor:
    """Clips with one object."""
    return (scenes.present.sum(1) == 1).nonzero()[:, 0]


def test_an_object_is_there_from_its_start_to_the_end(scenes):
    seen = bright(scenes.pixels).flatten(2).any(2)
    first = seen.float().argmax(1)
    start = scenes.start.masked_fill(~scenes.present, 99).amin(1)
    assert torch.equal(first, start)
    assert all(bool(row[begin:].all()) for row, begin in zip(seen, first, strict=True))


def test_an_object_moves_along_its_path_in_its_direction(scenes):
    one = alone(scenes)
    assert len(one) == 40
    found = middles(bright(scenes.pixels[one]))
    for clip, places in zip(one, found, strict=True):
        start = int(scenes.start[clip, 0])
        wanted = scenes.path[clip, 0, start:]
        assert (places[start:] - wanted).norm(dim=-1).max() < 1.5
        motion = places[-1] - places[start]
        assert int((heading(torch.arange(8)) @ motion).argmax()) == scenes.direction[clip, 0]
        speed = float(motion.norm()) / (15 - start)
        assert 1.0 < speed < 2.4


def test_colours_and_shapes_are_what_a_detector_reads(scenes):
    one = alone(scenes)
    one = one[scenes.start[one, 0] < 4]
    assert list(ATTRIBUTES)[:2] == ["shape", "colour"]
    read = detect(scenes.pixels[one])
    assert torch.equal(read[:, 1], scenes.colour[one, 0])
    # A few are cut by the edge of their window or too small for the outline.
    assert (read[:, 0] == scenes.shape[one, 0]).float().mean() > 0.85


def test_names_in_a_clip_are_distinct_and_some_are_absent(scenes):
    for row in range(len(scenes.present)):
        for values, absent in ((scenes.colour, 0), (scenes.shape, 1)):
            every = [*values[row].tolist(), int(scenes.absent[row, absent])]
            assert len(set(every)) == MOST_OBJECTS + 1
    assert scenes.colour.max() < len(COLOURS)
    assert scenes.shape.max() < len(SHAPES)


def test_numbers_of_objects_are_balanced_and_the_rest_is_even():
    many = make_objects(800, 5, size=32, frames=8)
    assert many.present.sum(1).bincount().tolist() == [0, 200, 200, 200, 200]
    for values, count in ((many.direction, 8), (many.third, 3), (many.colour, 6), (many.shape, 5)):
        shares = values.flatten().bincount(minlength=count) / values.numel()
        assert (shares - 1 / count).abs().max() < 0.03
    # Where an object is says nothing about where it goes.
    seen = (torch.arange(8) >= many.start[..., None])[..., None]
    place = ((many.path * seen).sum(2) / seen.sum(2)).flatten(0, 1)
    for way in range(8):
        assert place[many.direction.flatten() == way].mean(0).abs().max() < 2.5


def test_thirds_are_told_apart_by_at_least_two_frames(scenes):
    for third, (low, high) in enumerate(THIRDS):
        starts = scenes.start[scenes.third == third]
        assert starts.min() >= int(16 * low)
        assert starts.max() < 16 * high
        assert (starts * 3 // 16 == third).all()


def test_a_seed_decides_everything():
    first, again, other = (make_objects(4, seed, size=32) for seed in (7, 7, TEST_SEED + 7))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.start, again.start)
    assert not torch.equal(first.pixels, other.pixels)
    assert torch.equal(first.to("cpu").path, first.path)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"batch": 0}, ClipError),
        ({"seed": -1}, ClipError),
        ({"frames": 4}, ClipError),
        ({"size": 16}, ClipError),
        ({"background": "grey"}, UnsupportedError),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(changes, error):
    arguments = {"batch": 1, "seed": 0, **changes}
    with pytest.raises(error) as caught:
        make_objects(arguments.pop("batch"), arguments.pop("seed"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("frames", "size"), [(16, 64), (8, 32)])
def test_the_sample_shows_what_its_text_says(frames, size):
    sample = sample_objects(frames, size)
    assert sample.pixels.shape == (1, frames, 3, size, size)
    texts = sample.texts(0)
    assert len(texts) == int(sample.present.sum()) == 3
    place = next(i for i, text in enumerate(texts) if text.startswith("a red square goes "))
    way = texts[place].split(" goes ")[1].split(" from frame ")
    assert ATTRIBUTES["direction"][int(sample.direction[0, place])] == way[0]
    assert int(sample.start[0, place]) == int(way[1])
