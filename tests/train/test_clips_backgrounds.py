"""What the four backgrounds do to the frames, and to a reducer that looks at differences."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from tubelet.train.clips import BACKGROUNDS, TASKS, ClipBatch, make_clips


def around(mask: Tensor, reach: int) -> Tensor:
    """True within `reach` pixels of a true pixel of `[b, t, h, w]`."""
    return max_pool2d(mask.float(), 2 * reach + 1, 1, reach).bool()


@pytest.mark.parametrize("task", [name for name in TASKS if name != "ego-motion"])
@pytest.mark.parametrize("background", ["black", "static"])
def test_nothing_changes_outside_the_objects(task, background):
    batch = make_clips(task, 6, 1, background=background)
    change = batch.pixels.diff(dim=1).abs().amax(2) > 1e-6
    either = batch.objects[:, 1:] | batch.objects[:, :-1]
    assert change.any()
    assert not (change & ~around(either, 2)).any()


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("ego-motion", "shells")])
def test_black_is_black_and_objects_are_not(task):
    batch = make_clips(task, 6, 1, background="black")
    lit = batch.pixels.amax(2)
    assert lit[~around(batch.objects, 2)].max() == 0
    # Only the dark rim of a glyph is as dark as the background.
    assert (lit[batch.objects] > 0.1).float().mean() > 0.97


def test_noise_is_on_every_pixel_with_its_sigma():
    batch = make_clips("direction", 8, 1, background="noise")
    middle = ((batch.pixels > 0.1) & (batch.pixels < 0.9)).all(1, keepdim=True)
    still = ~around(batch.objects.any(1, keepdim=True), 2)[:, :, None] & middle
    steps = batch.pixels.diff(dim=1)[still.expand(-1, 15, 3, -1, -1)]
    assert steps.mean().abs() < 1e-3
    assert float(steps.std()) / 2**0.5 == pytest.approx(0.02, rel=0.03)
    assert batch.pixels.diff(dim=1).eq(0).float().mean() < 0.05


def test_pan_moves_the_texture_one_pixel_per_frame():
    batch = make_clips("needle", 8, 1, background="pan")
    lag, reach = 6, 8
    here, there = batch.pixels[:, 0], batch.pixels[:, lag]
    hidden = around(batch.objects[:, [0, lag]], 2).any(1)
    core = slice(reach, -reach)
    errors, shifts = [], []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            clear = ~(hidden | hidden.roll((-dy, -dx), (-2, -1)))[:, None, core, core]
            step = (there.roll((-dy, -dx), (-2, -1)) - here)[..., core, core].square() * clear
            errors.append(step.sum((1, 2, 3)) / clear.sum((1, 2, 3)))
            shifts.append(torch.tensor([dx, dy]).float())
    best = torch.stack(shifts)[torch.stack(errors).argmin(0)]
    assert best.norm(dim=-1) == pytest.approx(torch.full((8,), float(lag)), abs=1.0)
    assert best.std(0).min() > 1, "the same direction in every clip"


def test_backgrounds_differ_between_clips_and_do_not_depend_on_the_label():
    batch = make_clips("direction", 400, 1, background="static", size=32, frames=8)
    corner = batch.pixels[:, 0, :, :3, :3].mean((1, 2, 3))
    assert corner.std() > 0.05
    for label in range(8):
        mean = corner[batch.labels == label].mean() - corner.mean()
        assert mean.abs() < 4 * corner.std() / 50**0.5


def kept(batch: ClipBatch, threshold: float) -> float:
    """Share of 2 x 8 x 8 tokens that differ from the token before by more than the threshold."""
    tokens = batch.pixels.unfold(1, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)
    change = tokens.diff(dim=1).abs().mean((2, 5, 6, 7)) > threshold
    total = tokens.shape[1] * tokens.shape[3] * tokens.shape[4] * len(batch)
    return (int(change.sum()) + len(batch) * 64) / total


def test_a_difference_reducer_saves_less_and_less_on_harder_backgrounds():
    share = {
        name: [kept(make_clips("mask", 16, 5, background=name), t) for t in (0.02, 0.05, 0.1)]
        for name in BACKGROUNDS
    }
    # Two or three sprites on a still scene leave few tokens, at any threshold.
    for still in ("black", "static"):
        assert max(share[still]) < 0.4
    # Noise of sigma .02 defeats a threshold of .02 and no higher one.
    assert share["noise"][0] > 0.85
    assert share["noise"][1] < 0.4
    # A pan defeats the higher one too.
    assert share["pan"][0] > 0.95
    assert share["pan"][1] > share["noise"][1] + 0.25
    assert share["pan"][2] < share["pan"][1]


def test_the_oracle_keeps_a_small_share_of_the_tokens():
    for task in TASKS:
        batch = make_clips(task, 8, 1)
        every = batch.token_mask("objects", (2, 8, 8)).float().mean()
        needed = batch.token_mask("relevant", (2, 8, 8)).float().mean()
        assert 0 < needed <= every < 0.4
