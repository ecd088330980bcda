"""The generated world: deterministic, whole in view, drawn as its attributes say."""

import itertools
import math

import pytest
import torch

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.train.world import (
    ATTRIBUTES,
    COUNTS,
    RADII,
    complete_attributes,
    describe,
    distances,
    make_world,
    parse_attributes,
)


def column(batch, **named):
    """Attributes of a batch: named values, 0 for the others."""
    row = [named.get(name, 0) for name in ATTRIBUTES]
    return torch.tensor(row).expand(batch, -1).clone()


def every(name, **named):
    """One row for each value of an attribute."""
    rows = column(len(ATTRIBUTES[name]), **named)
    rows[:, list(ATTRIBUTES).index(name)] = torch.arange(len(ATTRIBUTES[name]))
    return rows


def objects(pixels):
    """Where the channels differ strongly, which is the object."""
    return (pixels.amax(2) - pixels.amin(2)) > 0.4


def centres(mask):
    """Mean (x, y) per frame, in pixels."""
    y, x = torch.meshgrid(*[torch.arange(n) + 0.5 for n in mask.shape[2:]], indexing="ij")
    return torch.stack([(mask * axis).sum((2, 3)) / mask.sum((2, 3)) for axis in (x, y)], -1)


def test_a_seed_repeats_and_seeds_differ():
    first, again, other = (make_world(3, seed, size=32) for seed in (7, 7, 8))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.attributes, again.attributes)
    assert not torch.equal(first.attributes, other.attributes)
    assert first.pixels.shape == (3, 16, 3, 32, 32)
    assert first.pixels.dtype == torch.float32
    assert first.attributes.dtype == torch.int64


def test_all_values_occur_about_equally_often():
    found = torch.cat([make_world(400, s, frames=2, size=32).attributes for s in range(3)])
    for kind, count in enumerate(COUNTS):
        share = found[:, kind].bincount(minlength=count) / len(found)
        assert len(share) == count
        assert (share - 1 / count).abs().max() < 0.06


@pytest.mark.parametrize(("frames", "size"), [(2, 32), (16, 64), (40, 48)])
def test_the_object_stays_whole_in_view(frames, size):
    pixels = make_world(30, 3, frames=frames, size=size).pixels
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    mask = objects(pixels)
    border = mask.clone()
    border[..., 1:-1, 1:-1] = False
    assert not border.any()
    area = mask.sum((2, 3)).float()
    assert (area.std(1) / area.mean(1) < 0.2).all()
    assert area.min() > 0


def test_area_is_that_of_the_size_whatever_the_shape():
    for scale, radius in enumerate(RADII):
        area = objects(make_world(5, 0, attributes=every("shape", size=scale)).pixels).sum((2, 3))
        torch.testing.assert_close(
            area.float().mean(1), torch.full((5,), math.pi * radius**2), rtol=0.06, atol=0
        )


def test_shapes_have_unit_disc_area_and_their_centre_of_mass_at_the_origin():
    axis = torch.linspace(-2, 2, 801)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = distances(x, y) < 0
    cell = (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(
        inside.sum((1, 2)) * cell, torch.full((5,), math.pi), rtol=0.01, atol=0
    )
    for offset in (x, y):
        assert ((inside * offset).sum((1, 2)) / inside.sum((1, 2))).abs().max() < 0.01


def test_shapes_look_like_their_names():
    def inside(x, y):
        return (distances(torch.tensor(x), torch.tensor(y)) < 0).tolist()

    # In the order disc, square, triangle, cross, ring; y points down.
    assert inside(0.0, 0.0) == [True, True, True, True, False]
    assert inside(0.8, -0.8) == [False, True, False, False, True]
    assert inside(0.0, -1.3) == [False, False, True, False, False]
    assert inside(0.0, 1.1) == [False, False, False, True, True]


def test_each_direction_moves_that_way_at_constant_speed():
    path = centres(objects(make_world(8, 1, attributes=every("direction", size=1)).pixels))
    steps = path.diff(dim=1)
    signs = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
    for name, step in zip(ATTRIBUTES["direction"], steps, strict=True):
        way = torch.tensor([signs[part] for part in name.split("-")]).sum(0)
        unit = way / way.float().norm()
        mean = step.mean(0)
        assert 1.9 < mean.norm() < 3.1
        assert mean @ unit / mean.norm() > 0.999
        assert (step - mean).abs().max() < 0.35


def test_colours_are_their_names():
    pixels = make_world(6, 2, attributes=every("colour", size=1)).pixels
    mask = objects(pixels)[:, :, None]
    mean = (pixels * mask).sum((1, 3, 4)) / mask.sum((1, 3, 4))
    primaries = {
        "red": (1, 0, 0),
        "yellow": (1, 1, 0),
        "green": (0, 1, 0),
        "cyan": (0, 1, 1),
        "blue": (0, 0, 1),
        "magenta": (1, 0, 1),
    }
    wanted = torch.tensor([primaries[name] for name in ATTRIBUTES["colour"]])
    assert torch.equal((mean > 0.5).long(), wanted)


def test_backgrounds_are_still_muted_and_differ():
    pixels = make_world(4, 5, attributes=every("background")).pixels
    mask = objects(pixels)
    grown = torch.nn.functional.max_pool2d(mask.float(), 5, 1, 2).bool()
    free = ~grown.any(1)[:, None, None]
    assert ((pixels.amax(1) - pixels.amin(1)) * free[:, 0]).max() == 0
    chroma = (pixels.amax(2) - pixels.amin(2))[:, 0] * free[:, 0, 0]
    assert chroma.max() < 0.07
    grey = [pixels[i, 0].mean(0)[free[i, 0, 0]] for i in range(4)]
    assert grey[0].std() < 0.01
    assert grey[0].mean() < 0.25
    assert grey[1].mean() > 0.55
    assert min(grey[i].std() for i in (1, 2, 3)) > 0.04


def test_edges_are_soft_by_one_pixel():
    pixels = make_world(1, 0, attributes=column(1, size=1)).pixels
    between = (pixels[0, :, 0] > 0.3) & (pixels[0, :, 0] < 0.7)
    around = 2 * math.pi * RADII[1]
    assert 0 < between.sum((1, 2)).float().mean() < 1.5 * around


def test_words_and_attributes_are_inverse():
    for row in itertools.islice(itertools.product(*(range(n) for n in COUNTS)), 0, None, 97):
        assert parse_attributes(describe(torch.tensor(row))).tolist() == list(row)


def test_free_text_is_read():
    found = parse_attributes("A red disc moving up-left, on Stripes; large")
    assert describe(found) == "large red disc moving up-left on stripes"
    assert parse_attributes("blue").tolist() == [-1, 4, -1, -1, -1]
    assert describe(parse_attributes("blue")) == "blue shape"
    assert describe(parse_attributes("")) == "shape"


def test_words_that_are_not_known_or_contradict_are_named():
    with pytest.raises(UnsupportedError, match="'rde'; did you mean 'red'"):
        parse_attributes("rde disc")
    with pytest.raises(UnsupportedError, match="colour: red, yellow"):
        parse_attributes("xyzzy")
    with pytest.raises(UnsupportedError, match="two values of colour: red and blue"):
        parse_attributes("red blue disc")
    assert parse_attributes("red red disc")[1] == 0


def test_unsaid_attributes_are_filled_in_by_seed():
    partial = parse_attributes("red disc").repeat(50, 1)
    full = complete_attributes(partial, 3)
    assert (full[:, :2] == partial[:, :2]).all()
    assert (full >= 0).all()
    assert (full < torch.tensor(COUNTS)).all()
    assert len(full[:, 2].unique()) > 3
    assert torch.equal(full, complete_attributes(partial, 3))


def test_numbers_out_of_range_are_refused():
    for wrong in ((0, 0, 16, 128), (1, -1, 16, 128), (1, 0, 1, 128), (1, 0, 16, 16)):
        batch, seed, frames, size = wrong
        with pytest.raises(UnsupportedError, match="a world needs"):
            make_world(batch, seed, frames=frames, size=size)
    with pytest.raises(ShapeError, match="shape must be 0 to 4, got 5"):
        make_world(1, 0, attributes=column(1, shape=5))
    with pytest.raises(ShapeError, match="got -1"):
        make_world(1, 0, attributes=column(1, colour=-1))
    for wrong in (column(2), column(1).float(), column(1)[:, :4]):
        with pytest.raises(ShapeError, match="whole numbers"):
            make_world(1, 0, attributes=wrong)
    with pytest.raises(ShapeError, match="one row"):
        describe(column(2))
