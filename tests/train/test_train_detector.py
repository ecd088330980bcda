"""The detector reads the world back, and says -1 where there is nothing to read."""

import pytest
import torch
from torch.nn.functional import pad

from tubelet.core.errors import ShapeError
from tubelet.train.detector import detect
from tubelet.train.world import ATTRIBUTES, COUNTS, make_world

NAMES = list(ATTRIBUTES)


def blurred(pixels):
    """Each frame under a binomial window of 3 x 3, sigma 0.7."""
    for axis in (3, 4):
        n = pixels.shape[axis]
        before, after = torch.arange(n).sub(1).clamp(min=0), torch.arange(n).add(1).clamp(max=n - 1)
        sides = pixels.index_select(axis, before) + pixels.index_select(axis, after)
        pixels = pixels / 2 + sides / 4
    return pixels


def noisy(pixels):
    return (pixels + 0.03 * torch.randn_like(pixels)).clamp(0, 1)


DAMAGE = {"none": lambda x: x, "noise": noisy, "blur": blurred, "both": lambda x: noisy(blurred(x))}


def test_two_hundred_world_clips_are_read_back():
    right = []
    for seed in range(20):
        world = make_world(10, 1000 + seed)
        damage = list(DAMAGE.values())[seed % len(DAMAGE)]
        right.append(detect(damage(world.pixels)) == world.attributes)
    share = torch.cat(right).float().mean(0)
    assert (share >= 0.99).all(), dict(zip(NAMES, share.tolist(), strict=True))


@pytest.mark.parametrize(("frames", "size"), [(8, 96), (16, 64), (24, 64)])
def test_other_geometry_is_read_too(frames, size):
    world = make_world(30, 11, frames=frames, size=size)
    assert ((detect(world.pixels) == world.attributes).float().mean(0) >= 0.97).all()


def one(seed=0, **named):
    row = [named.get(name, 1) for name in NAMES]
    return make_world(1, seed, attributes=torch.tensor([row])).pixels


@pytest.mark.parametrize("background", range(COUNTS[3]))
def test_a_scene_without_object_has_a_background_only(background):
    pixels = one(background=background)
    grey = pixels.mean(2, keepdim=True).expand_as(pixels)
    chroma = pixels.amax(2) - pixels.amin(2)
    empty = torch.where(chroma[:, :, None] > 0.07, grey.flatten(1).median(), pixels)
    assert detect(empty).tolist() == [[-1, -1, -1, background, -1]]


def test_noise_is_nothing():
    assert (detect(torch.rand(2, 8, 3, 64, 64)) == -1).all()
    assert (detect(torch.full((1, 8, 3, 64, 64), 0.5)) == -1).all()


def test_a_still_object_has_no_direction():
    pixels = one(shape=3)
    still = pixels[:, :1].expand(-1, 16, -1, -1, -1)
    assert detect(still)[0].tolist() == [3, 1, -1, 1, 1]


def test_time_reversed_turns_the_direction():
    direction = NAMES.index("direction")
    for value in range(8):
        pixels = one(direction=value)
        assert detect(pixels)[0, direction] == value
        assert detect(pixels.flip(1))[0, direction] == (value + 4) % 8


def test_mirrored_frames_mirror_the_direction():
    assert detect(one(direction=0).flip(-1))[0, 2] == 4
    assert detect(one(direction=2).flip(-2))[0, 2] == 6


@pytest.mark.parametrize("apart", [30, 45, 64])
def test_two_shapes_at_once_are_none_of_them(apart):
    pixels = one(shape=0, background=0)
    both = torch.maximum(pixels, pixels.roll(apart, -1))
    assert detect(both)[0, 0] == -1
    joined = torch.maximum(pixels, one(seed=4, shape=1, background=0))
    assert detect(joined)[0, 0] == -1


def test_an_object_in_half_of_the_frames_is_enough_but_not_in_fewer():
    pixels = one(shape=4)
    empty = pixels.flatten(3).median(3).values[..., None, None].expand_as(pixels)
    for kept, expected in ((12, 4), (9, 4), (6, -1)):
        mixed = torch.cat([pixels[:, :kept], empty[:, kept:]], dim=1)
        assert detect(mixed)[0, 0] == expected


def test_an_orange_between_red_and_yellow_has_no_colour():
    pixels = one(colour=0, background=0)
    red = pixels[:, :, :1] > 0.5
    pixels = torch.where(red, torch.tensor([0.95, 0.48, 0.0])[:, None, None], pixels)
    found = detect(pixels)[0].tolist()
    assert found[1] == -1
    assert found[0] == 1


def test_specks_far_from_the_object_do_not_matter():
    pixels = one(shape=0, size=0)
    pixels[:, ::2, :, 2:9, 2:9] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert detect(pixels)[0].tolist() == [0, 1, 1, 1, 0]


def test_an_object_smaller_than_small_has_no_size():
    tiny = make_world(1, 0, size=64, attributes=torch.tensor([[0, 1, 2, 0, 0]])).pixels
    around = pad(tiny, (32, 32, 32, 32), value=0.1)
    assert detect(around)[0].tolist() == [0, 1, 2, 0, -1]


def test_a_dark_ramp_is_no_background_of_the_world():
    ramp = torch.linspace(0.1, 0.6, 64).expand(1, 8, 3, 64, 64)
    assert (detect(ramp) == -1).all()
    assert detect(ramp + 0.35)[0].tolist() == [-1, -1, -1, 1, -1]


def test_what_is_no_clip_is_refused():
    for wrong in (
        torch.rand(1, 1, 3, 64, 64),
        torch.rand(1, 4, 1, 64, 64),
        torch.rand(1, 4, 3, 16, 64),
        torch.rand(4, 3, 64, 64),
        torch.rand(0, 4, 3, 64, 64),
    ):
        with pytest.raises(ShapeError, match="clips must be"):
            detect(wrong)
    pixels = torch.rand(1, 4, 3, 64, 64)
    pixels[0, 0, 0, 0, 0] = torch.nan
    for wrong in (pixels, torch.zeros(1, 4, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ShapeError, match="floating point"):
            detect(wrong)
