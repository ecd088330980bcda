"""From a clip on disk to what a model takes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import ClipError, UnsupportedError
from tubelet.models.encoder import ClipSpec
from tubelet.models.load import LoadedModel
from tubelet.train.clips import TASKS, TEST_SEED, make_clips
from tubelet.video import Clip, normalise, read_clip, render_sample_clip, resize, sample_indices

SAMPLE = "sample"
"""Name of the clip that tubelet renders itself."""

TASK = "task:"
"""Prefix of procedural test clips, as in "task:shells"."""


@dataclass(frozen=True)
class Inputs:
    """What a model is run on.

    Attributes:
        clip: The (first) clip, for pictures.
        arguments: Keyword arguments of the forward.
        description: What went in, in words.
        labels: int64 [B], the right answers where they are known and the model was asked.
    """

    clip: Clip
    arguments: dict[str, Any]
    description: str
    labels: Tensor | None = None


def gather_inputs(
    source: str | os.PathLike[str],
    loaded: LoadedModel,
    rate: float | None = None,
    batch: int = 1,
) -> Inputs:
    """Clips for a model: copies of one video, or `batch` different clips of a procedural task.

    Args:
        source: A video file, "sample", or "task:NAME" with a task of `tubelet.train.clips`.
        loaded: The model.
        rate: Frames per second, for videos.
        batch: Clips in one forward.

    Raises:
        ClipError: As for `open_clip`, or a rate was given for a procedural task.
        UnsupportedError: The task is unknown, or the model's clips are not square.
    """
    name = os.fspath(source)
    if name.startswith(TASK) and not os.path.exists(name):
        if rate is not None:
            raise ClipError(f"{name}: clips of a task have no other rate; leave the rate out")
        return _task_inputs(name.removeprefix(TASK), loaded, batch)
    clip = open_clip(source, loaded, rate)
    return Inputs(clip, model_inputs(clip, loaded, batch), describe(clip, batch))


def _task_inputs(name: str, loaded: LoadedModel, batch: int) -> Inputs:
    spec = loaded.clip
    # A model that knows the task takes clips of any length; others get their own.
    known = name in TASKS and name in getattr(loaded.model.config, "task_names", ())
    if len(set(spec.size)) > 1:
        raise UnsupportedError(f"clips of a task are square, {loaded.name} takes {spec.size}")
    frames = TASKS[name].frames if known else spec.frames
    made = make_clips(name, batch, TEST_SEED, frames=frames, size=spec.size[0])
    bytes_ = (made.pixels * 255).round().byte()
    times = torch.arange(made.pixels.shape[1], dtype=torch.float64) / 16
    clip = Clip(bytes_[0], times, f"procedural clip of {name}", 16.0)
    parameter = next(loaded.model.parameters())
    pixels = torch.stack([normalise(one, loaded.mean, loaded.std) for one in bytes_])
    arguments: dict[str, Any] = {spec.argument: pixels.to(parameter.device, parameter.dtype)}
    if known:
        arguments["task"] = name
    answered = known and name in loaded.model.config.tasks
    return Inputs(
        clip,
        arguments,
        f"{batch} test clips of {name}, {frames} frames of {spec.size[0]}x{spec.size[1]}",
        made.labels.to(parameter.device) if answered else None,
    )


def open_clip(
    source: str | os.PathLike[str], loaded: LoadedModel, rate: float | None = None
) -> Clip:
    """The frames that the model wants, at its size.

    Args:
        source: A video file, or "sample" for the rendered clip (a file of that name wins).
        loaded: The model; sets the number of frames and their size.
        rate: Frames per second from the start; None spreads them over the whole clip.

    Raises:
        ClipError: The file is missing, corrupt, has no video, or too few frames, or `rate` is
            above the clip's own, so that frames would repeat.
    """
    clip = _read(source, loaded.clip, rate)
    if rate is not None and len(clip.times.unique()) < len(clip.times):
        raise ClipError(
            f"{clip.source}: {rate:g} frames per second would repeat frames; use the clip's own "
            "rate or less"
        )
    return clip


def _read(source: str | os.PathLike[str], spec: ClipSpec, rate: float | None) -> Clip:
    if str(source) != SAMPLE or Path(source).exists():
        return read_clip(os.fspath(source), num_frames=spec.frames, rate=rate, size=spec.size)
    clip = render_sample_clip()
    chosen = sample_indices(clip.times, spec.frames, rate=rate)
    frames = resize(clip.frames[chosen], spec.size)
    return Clip(frames, clip.times[chosen], "rendered sample clip", clip.fps)


def model_inputs(clip: Clip, loaded: LoadedModel, batch: int = 1) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward, [batch, T, 3, H, W] copies of one clip."""
    parameter = next(loaded.model.parameters())
    pixels = normalise(clip.frames, loaded.mean, loaded.std)[None]
    pixels = pixels.to(parameter.device, parameter.dtype).repeat(batch, 1, 1, 1, 1)
    return {loaded.clip.argument: pixels}


def describe(clip: Clip, batch: int = 1) -> str:
    """Name and shape, in words."""
    frames, _, height, width = clip.frames.shape
    name = Path(clip.source).name if Path(clip.source).exists() else clip.source
    copies = f", batch {batch}" if batch > 1 else ""
    return f"{name}, {frames} frames of {height}x{width}{copies}"
