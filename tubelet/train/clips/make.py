"""`make_clips`: the way in."""

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tubelet.core.errors import ClipError, UnsupportedError
from tubelet.train.clips import collisions, scenes, shells
from tubelet.train.clips.batch import ClipBatch
from tubelet.train.clips.canvas import Canvas
from tubelet.train.clips.dice import Dice
from tubelet.train.clips.scenery import BACKGROUNDS, MIXED, choose_kinds
from tubelet.train.clips.tasks import TASKS

MIN_FRAMES, MAX_FRAMES = 8, 128
MIN_SIZE, MAX_SIZE = 32, 512

SCENES: dict[str, Callable[[scenes.Shot], tuple[Canvas, Tensor]]] = {
    "direction": scenes.direction,
    "needle": scenes.needle,
    "collisions": collisions.collisions,
    "collision-count": collisions.collision_count,
    "counterfactual": collisions.counterfactual,
    "shells": shells.shells,
    "ego-motion": scenes.ego_motion,
    "mask": scenes.mask,
}


@torch.no_grad()
def make_clips(
    task: str,
    batch: int,
    seed: int,
    *,
    background: str = "static",
    device: torch.device | str = "cpu",
    frames: int | None = None,
    size: int = 64,
    exposure: tuple[int, int] = (scenes.GLYPH_FRAMES, scenes.GLYPH_FRAMES),
) -> ClipBatch:
    """Draw a batch of clips of one task.

    Args:
        task: Name in `TASKS`.
        batch: Number of clips, from 1. The answers are equally frequent, to within one; in the
            collision tasks only nearly, and in collision-count only near its own length.
        seed: From 0. The same arguments give the same clips on the same type of device. Seeds from
            `TEST_SEED` on are reserved for testing.
        background: One of `BACKGROUNDS`, or `mixed` for a random one per clip.
        device: Where everything is computed; nothing waits for the device.
        frames: Length, 8 to 128; the task's own if None. Objects move slower in longer clips where
            they would leave the view.
        size: Side in pixels, 32 to 512. Objects, their speeds and the texture scale with it.
        exposure: Fewest and most frames that the glyph of `needle` is shown, drawn log-uniformly
            per clip. Longer ones are easier: a curriculum for training.

    Raises:
        UnsupportedError: An unknown task or background, or one that has no answer together.
        ClipError: A batch, seed, length or size out of range.
    """
    _check_names(task, background)
    frames = TASKS[task].frames if frames is None else frames
    _check_numbers(batch, seed, frames, size)
    if not 1 <= exposure[0] <= exposure[1] <= frames:
        raise ClipError(f"exposure must rise within 1 to {frames} frames, got {exposure}")
    device = torch.device(device)
    dice = Dice(task, seed, device)
    allowed = tuple(name for name in BACKGROUNDS if name not in TASKS[task].refused)
    # Lower precision would send colliding discs elsewhere.
    with torch.autocast(device.type, enabled=False):
        kinds = choose_kinds(dice, batch, background, allowed)
        noisy = background in ("noise", MIXED)
        canvas, labels = SCENES[task](scenes.Shot(dice, kinds, frames, size, noisy, exposure))
    return ClipBatch(task, canvas.pixels, labels, canvas.objects, canvas.relevant, kinds)


def _check_names(task: str, background: str) -> None:
    if task not in TASKS:
        raise UnsupportedError(f"unknown task {task!r}{_hint(task, TASKS)}")
    known = (*BACKGROUNDS, MIXED)
    if background not in known:
        raise UnsupportedError(f"unknown background {background!r}{_hint(background, known)}")
    refused = TASKS[task].refused
    if background in refused:
        rest = ", ".join(name for name in known if name not in refused)
        raise UnsupportedError(
            f"{task} has no answer on a {background} background, which does not show the camera's "
            f"motion; choose {rest}"
        )


def _check_numbers(batch: int, seed: int, frames: int, size: int) -> None:
    limits = {
        "batch": (batch, 1, None),
        "seed": (seed, 0, None),
        "frames": (frames, MIN_FRAMES, MAX_FRAMES),
        "size": (size, MIN_SIZE, MAX_SIZE),
    }
    for name, (value, low, high) in limits.items():
        if not isinstance(value, int) or value < low or (high is not None and value > high):
            span = f"from {low} on" if high is None else f"from {low} to {high}"
            raise ClipError(f"{name} must be a whole number {span}, got {value!r}")


def _hint(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(word).lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"{hint} known: {', '.join(known)}"
