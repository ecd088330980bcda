"""Clips: shapes, seeds, balance, token masks, refusals."""

import pytest
import torch

from tubelet.core.errors import ClipError, ShapeError, UnsupportedError
from tubelet.train.clips import BACKGROUNDS, CORE_TASKS, TASKS, TEST_SEED, ClipBatch, make_clips
from tubelet.train.clips.make import SCENES

EACH = pytest.mark.parametrize("task", TASKS)


def test_the_core_tasks_exist_and_every_task_has_a_scene():
    assert set(CORE_TASKS) <= set(TASKS)
    assert set(SCENES) == set(TASKS)


@EACH
def test_shapes_ranges_and_masks(task):
    batch = make_clips(task, 5, 3, background="mixed", size=32)
    frames = TASKS[task].frames
    assert batch.pixels.shape == (5, frames, 3, 32, 32)
    assert batch.pixels.dtype == torch.float32
    assert batch.pixels.min() >= 0
    assert batch.pixels.max() <= 1
    assert batch.labels.dtype == torch.int64
    assert batch.labels.max() < TASKS[task].classes
    assert batch.objects.shape == batch.relevant.shape == (5, frames, 32, 32)
    assert batch.relevant.flatten(1).any(1).all()
    assert not (batch.relevant & ~batch.objects).any()
    assert batch.backgrounds.max() < len(BACKGROUNDS)
    assert len(batch) == 5


@EACH
def test_the_same_arguments_give_the_same_clips(task):
    first, again, other = (make_clips(task, 3, seed, size=32) for seed in (7, 7, 8))
    for name in ("pixels", "labels", "objects", "relevant", "backgrounds"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.pixels, other.pixels)


def test_the_global_generator_and_autocast_have_no_say():
    first = make_clips("collisions", 3, 7, size=32)
    torch.manual_seed(99)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = make_clips("collisions", 3, 7, size=32)
    assert torch.equal(first.pixels, again.pixels)


@pytest.mark.parametrize("seed", [0, 5, 2**31 - 1])
def test_test_seeds_never_meet_training_seeds(seed):
    # The CPU generator of torch drops the high half of a seed.
    training = make_clips("mask", 2, seed, size=32)
    testing = make_clips("mask", 2, TEST_SEED + seed, size=32)
    assert not torch.equal(training.pixels, testing.pixels)


def test_tasks_draw_different_clips_from_one_seed():
    colours = [make_clips(task, 4, 0, size=32).pixels[:, 0, :, 0, 0] for task in ("mask", "needle")]
    assert not torch.allclose(*colours)


@pytest.mark.parametrize("task", [name for name in TASKS if name != "mask"])
@pytest.mark.parametrize("batch", [7, 20])
def test_answers_are_equally_frequent_in_any_batch(task, batch):
    labels = make_clips(task, batch, batch, size=32, frames=16).labels
    counts = labels.bincount(minlength=TASKS[task].classes)
    slack = 2 if task in ("collision-count", "counterfactual") else 1
    assert counts.max() - counts.min() <= slack


def test_mixed_backgrounds_leave_out_what_the_task_refuses():
    assert make_clips("mask", 64, 0, background="mixed", size=32).backgrounds.unique().numel() == 4
    kinds = make_clips("ego-motion", 64, 0, background="mixed", size=32).backgrounds
    assert kinds.unique().tolist() == [1, 2, 3]


def _by_hand(objects: torch.Tensor) -> ClipBatch:
    pixels = torch.zeros(*objects.shape[:2], 3, *objects.shape[2:])
    zero = torch.zeros(len(objects), dtype=torch.long)
    return ClipBatch("mask", pixels, zero, objects, torch.zeros_like(objects), zero)


def test_token_masks_follow_raster_order_and_any_frame_counts():
    objects = torch.zeros(1, 4, 16, 24, dtype=torch.bool)
    objects[0, 3, 9, 17] = True
    batch = _by_hand(objects)
    mask = batch.token_mask("objects", (2, 8, 8))
    # Second slice, second row, third column of 2 x 2 x 3 tokens.
    assert mask.shape == (1, 12)
    assert mask.nonzero().tolist() == [[0, 11]]
    assert not batch.token_mask("relevant", (2, 8, 8)).any()
    assert not batch.dense_labels((2, 8, 8)).any()


def test_dense_labels_need_a_quarter_of_the_token():
    objects = torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    objects[0, :, :4, :4] = True
    objects[1, :, :4, :4] = True
    objects[1, 0, 0, 0] = False
    assert _by_hand(objects).dense_labels((2, 8, 8)).tolist() == [[True], [False]]


def test_token_masks_refuse_what_does_not_fit():
    batch = make_clips("mask", 1, 0, size=32)
    with pytest.raises(ShapeError, match="must divide"):
        batch.token_mask("objects", (3, 8, 8))
    with pytest.raises(ShapeError, match="choose objects or relevant"):
        batch.token_mask("background", (2, 8, 8))


def test_to_moves_every_tensor():
    moved = make_clips("mask", 1, 0, size=32).to("meta")
    assert moved.task == "mask"
    tensors = (moved.pixels, moved.labels, moved.objects, moved.relevant, moved.backgrounds)
    assert all(x.is_meta for x in tensors)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("shels", 1, 0), {}, UnsupportedError, "did you mean shells"),
        (("shells", 1, 0), {"background": "blak"}, UnsupportedError, "did you mean black"),
        (("ego-motion", 1, 0), {"background": "black"}, UnsupportedError, "choose static"),
        (("shells", 0, 0), {}, ClipError, "batch .* got 0"),
        (("shells", 1, -1), {}, ClipError, "seed .* got -1"),
        (("shells", 1, 0), {"frames": 4}, ClipError, "frames .* from 8 to"),
        (("shells", 1, 0), {"size": 16}, ClipError, "size .* from 32 to"),
        (("shells", 1, 0), {"size": 48.0}, ClipError, "whole number"),
    ],
)
def test_refusals_say_what_is_allowed(arguments, options, error, words):
    with pytest.raises(error, match=words) as caught:
        make_clips(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("frames", "size"), [(8, 32), (40, 48)])
def test_other_lengths_and_sizes_keep_objects_in_view(task, frames, size):
    batch = make_clips(task, 4, 1, frames=frames, size=size)
    assert batch.pixels.shape == (4, frames, 3, size, size)
    seen = batch.objects.flatten(2).any(2)
    assert seen.all()


@pytest.mark.gpu
@EACH
def test_gpu_clips_are_made_there_and_repeat(task):
    first, again = (make_clips(task, 8, 3, background="noise", device="cuda") for _ in range(2))
    assert first.pixels.is_cuda
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.labels, again.labels)
