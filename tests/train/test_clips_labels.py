"""Every label is found again from what is on the frames."""

import math

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import ClipError
from tubelet.train.clips import TASKS, make_clips, needle_floor
from tubelet.train.clips.dice import Dice
from tubelet.train.clips.scenes import ego_velocities, heading
from tubelet.train.clips.shells import shuffled_floor
from tubelet.train.clips.sprites import GLYPHS, glyph_distance


def centroids(mask: Tensor) -> Tensor:
    """(x, y) `[..., 2]` of the true pixels of `[..., h, w]`."""
    mask = mask.float()
    total = mask.sum((-1, -2))
    column = (mask.sum(-2) * torch.arange(mask.shape[-1])).sum(-1)
    row = (mask.sum(-1) * torch.arange(mask.shape[-2])).sum(-1)
    return torch.stack([column, row], dim=-1) / total[..., None]


def nearest_heading(motion: Tensor) -> Tensor:
    return (motion @ heading(torch.arange(8)).T).argmax(-1)


@pytest.mark.parametrize("background", ["black", "pan"])
def test_direction_is_that_of_the_relevant_sprite(background):
    batch = make_clips("direction", 64, 1, background=background)
    middle = centroids(batch.relevant)
    assert torch.equal(nearest_heading(middle[:, -1] - middle[:, 0]), batch.labels)
    speed = (middle[:, -1] - middle[:, 0]).norm(dim=-1) / 15
    assert speed.min() > 0.95
    assert speed.max() < 2.05


def test_direction_cue_is_the_only_red_sprite():
    batch = make_clips("direction", 64, 1, background="black")
    red, green, blue = batch.pixels.unbind(2)
    reddish = (red > 0.25) & (red > 2 * green) & (red > 2 * blue)
    assert (reddish & ~batch.relevant).float().mean() < 0.002
    cue = (reddish & batch.relevant).flatten(1).sum(1) / batch.relevant.flatten(1).sum(1)
    assert cue.min() > 0.6


def glyph_frames(batch) -> tuple[Tensor, Tensor]:
    """The first frame `[b, 3, h, w]` that shows the glyph, and the mask of its plate there."""
    first = batch.relevant.flatten(2).any(2).float().argmax(1)
    everyone = torch.arange(len(batch))
    return batch.pixels[everyone, first], batch.relevant[everyone, first]


def yellow(pixels: Tensor) -> Tensor:
    """`[..., h, w]` where `[..., 3, h, w]` is as yellow as the plate of a glyph."""
    red, green, blue = pixels.unbind(-3)
    return (red > 0.5) & (red > 0.95 * green) & (green > 0.6 * red) & (blue < 0.4 * red)


def test_needle_is_there_for_two_frames_and_drawn_in_full():
    batch = make_clips("needle", 80, 1, background="black")
    seen = batch.relevant.flatten(2).any(2)
    assert (seen.sum(1) == 2).all()
    first = seen.float().argmax(1)
    everyone = torch.arange(80)
    assert seen[everyone, first + 1].all()
    assert torch.equal(batch.relevant[everyone, first], batch.relevant[everyone, first + 1])
    assert first.min() <= 2
    assert first.max() >= 28
    frames, plates = glyph_frames(batch)
    for frame, plate in zip(frames, plates, strict=True):
        rows, columns = plate.nonzero().unbind(1)
        # A filled square that nothing covers and no border cuts.
        tall, wide = (int(x.max() - x.min()) + 1 for x in (rows, columns))
        assert 10 <= min(tall, wide) <= max(tall, wide) <= 13
        assert plate.sum() > 0.95 * tall * wide
        dark = plate & (frame.amax(0) < 0.5)
        assert (plate & yellow(frame)).sum() > 25
        assert dark.sum() > 15


def test_needle_glyph_is_read_by_matching_its_strokes():
    batch = make_clips("needle", 60, 2, background="black")
    distance = glyph_distance(1.0, torch.device("cpu"))
    strokes = (distance < 0.18).float()[:, 2:-2, 2:-2]
    hits = 0
    for frame, plate, label in zip(*glyph_frames(batch), batch.labels, strict=True):
        rows, columns = plate.nonzero().unbind(1)
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        ink = 1 - frame[0][box]
        fitted = torch.nn.functional.interpolate(strokes[None], size=ink.shape, mode="area")[0]
        errors = (fitted - ink).abs().flatten(1).mean(1)
        hits += int(errors.argmin() == label)
    assert hits >= 57


def test_no_distractor_of_the_needle_is_yellow():
    batch = make_clips("needle", 60, 3, background="black", size=32)
    shown = batch.relevant.flatten(2).any(2)
    assert yellow(batch.pixels)[shown].flatten(1).any(1).all()
    others = batch.pixels[~shown]
    assert (others.amax((1, 2, 3)) > 0.5).float().mean() > 0.9
    assert not yellow(others).any()


def exposures(batch) -> Tensor:
    """Frames `[b]` that show the glyph, without a gap."""
    seen = batch.relevant.flatten(2).any(2)
    changes = (seen[:, 1:] != seen[:, :-1]).sum(1) + seen[:, 0] + seen[:, -1]
    assert (changes == 2).all()
    return seen.sum(1)


def test_exposure_sets_for_how_long_the_glyph_is_shown():
    assert (exposures(make_clips("needle", 20, 4, size=32, exposure=(5, 5))) == 5).all()
    assert (exposures(make_clips("needle", 4, 4, size=32, exposure=(32, 32))) == 32).all()
    many = exposures(make_clips("needle", 300, 5, size=32, exposure=(2, 16), frames=20)).float()
    assert (many.min(), many.max()) == (2, 16)
    # Log-uniform: the geometric mean is 2 ** 2.5; drawn uniformly it would be 2 ** 2.95.
    assert many.log2().mean().item() == pytest.approx(2.5, abs=0.2)


def test_exposure_is_two_frames_by_default_and_nothing_to_other_tasks():
    told = make_clips("needle", 6, 5, size=32, exposure=(2, 2))
    assert torch.equal(make_clips("needle", 6, 5, size=32).pixels, told.pixels)
    one, other = (make_clips("shells", 2, 5, size=32, exposure=e) for e in ((2, 2), (1, 16)))
    assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("exposure", [(0, 2), (3, 2), (2, 17), (-1, -1)], ids=str)
def test_an_exposure_that_does_not_fit_the_clip_is_refused(exposure):
    with pytest.raises(ClipError, match="exposure must rise within 1 to 16 frames, got") as caught:
        make_clips("needle", 1, 0, frames=16, exposure=exposure)
    assert "\n" not in str(caught.value)


def test_glyphs_differ_wherever_they_are_shifted_to():
    ink = (glyph_distance(1.0, torch.device("cpu")) < 0.16).float()
    padded = torch.nn.functional.pad(ink, (4, 4, 4, 4))
    area = ink.flatten(1).sum(1)
    for dy in range(0, 9, 2):
        for dx in range(0, 9, 2):
            moved = padded[:, dy : dy + 32, dx : dx + 32].flatten(1)
            both = ink.flatten(1) @ moved.T
            overlap = both / (area[:, None] + area - both)
            assert overlap.fill_diagonal_(0).max() < 0.45


def test_needle_floor_counts_the_frames_that_show_the_glyph():
    assert needle_floor(32) == pytest.approx(1)
    assert needle_floor(16) == pytest.approx(1)
    # One frame meets the glyph for 2 of 31 starts.
    assert needle_floor(1) == pytest.approx(0.1 + 0.9 * 2 / 31)
    assert needle_floor([0]) == pytest.approx(0.1 + 0.9 / 31)
    assert needle_floor([3, 4]) == pytest.approx(0.1 + 0.9 * 3 / 31)
    batch = make_clips("needle", 400, 3, size=32)
    seen = batch.relevant[:, [2, 10, 18, 26]].flatten(1).any(1).float().mean().item()
    assert needle_floor([2, 10, 18, 26]) == pytest.approx(0.1 + 0.9 * seen, abs=0.06)
    assert TASKS["needle"].classes == GLYPHS


def follow(objects: Tensor, place: Tensor) -> Tensor:
    """Track one of several like objects through `[t, h, w]` from where it starts."""
    for mask in objects:
        points = mask.nonzero().flip(1).float()
        for _ in range(4):
            near = (points - place).norm(dim=-1)
            near = points[near < max(7.0, float(near.min()) + 2)]
            place = near.mean(0)
    return place


def test_shells_label_is_where_the_marked_one_is_tracked_to():
    batch = make_clips("shells", 45, 1, background="black")
    white = batch.pixels.amin(2) > 0.8
    assert white[:, :2].flatten(2).any(2).all()
    assert not white[:, 2:].any()
    start = centroids(white[:, 0])
    slots = torch.tensor([-20.0, 0.0, 20.0]) + 31.5
    ends = torch.stack([follow(o, p) for o, p in zip(batch.objects, start, strict=True)])
    assert torch.equal((ends[:, :1] - slots).abs().argmin(1), batch.labels)


def test_shells_start_tells_nothing_about_the_end():
    batch = make_clips("shells", 900, 1, background="black", size=32)
    start = centroids(batch.pixels[:, 0].amin(1) > 0.8)[:, 0]
    slot = (start / 31 * 3).floor().long().clamp(0, 2)
    table = torch.zeros(3, 3).index_put_((slot, batch.labels), torch.tensor(1.0), accumulate=True)
    # Two random swaps: back at the start in one third of the cases.
    assert (table / 100 - 1).abs().max() < 0.35
    assert shuffled_floor() == pytest.approx(2 / 3)


def test_ego_motion_is_relative_to_the_ground():
    batch = make_clips("ego-motion", 12, 1, background="mixed")
    middle = centroids(batch.relevant)
    on_screen = (middle[:, -1] - middle[:, 0]) / 15
    found = nearest_heading(on_screen - ground_motion(batch.pixels, batch.objects, 4))
    assert (found == batch.labels).float().mean() > 0.9
    # The screen alone must not do.
    assert (nearest_heading(on_screen) == batch.labels).float().mean() < 0.7


def ground_motion(pixels: Tensor, objects: Tensor, lag: int) -> Tensor:
    """(x, y) pixels per frame of the background on the screen, by trying all shifts."""
    reach = 2 * lag - 1
    here = pixels[:, 0]
    there, hidden = pixels[:, lag], objects[:, 0] | objects[:, lag]
    core = slice(reach, -reach)
    best = torch.full((len(pixels),), math.inf)
    motion = torch.zeros(len(pixels), 2)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            moved = there.roll((-dy, -dx), (-2, -1))
            clear = ~(hidden | hidden.roll((-dy, -dx), (-2, -1)))[:, None, core, core]
            error = ((moved - here)[..., core, core].square() * clear).sum((1, 2, 3)) / clear.sum(
                (1, 2, 3)
            )
            motion[error < best] = torch.tensor([dx, dy]) / lag
            best = torch.minimum(best, error)
    return motion


def test_the_screen_alone_gives_the_floor_of_ego_motion():
    dice = Dice("ego-motion", 1, torch.device("cpu"))
    labels = dice.balanced(8, 600_000)
    own, view = ego_velocities(dice, labels, torch.zeros_like(labels).bool(), 5.0, 16)
    cell = ((own - view + 4) / 0.1).long()
    table = torch.zeros(81 * 81 * 8).index_add_(
        0, (cell[:, 0] * 81 + cell[:, 1]) * 8 + labels, torch.ones(len(labels))
    )
    best = table.view(-1, 8).amax(1).sum().item() / len(labels)
    assert best == pytest.approx(TASKS["ego-motion"].floors["background hidden"], abs=0.02)


@pytest.mark.parametrize("task", ["direction", "ego-motion"])
def test_where_the_sprite_is_tells_nothing_about_the_label(task):
    batch = make_clips(task, 800, 1, frames=8, size=32)
    middle = centroids(batch.relevant).mean(1)
    errors = middle.std(0) / math.sqrt(100)
    for label in range(8):
        mean = middle[batch.labels == label].mean(0) - middle.mean(0)
        assert (mean.abs() < 4 * errors).all()
