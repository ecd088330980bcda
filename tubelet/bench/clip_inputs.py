"""From a clip on disk to what a model takes."""

import os
from pathlib import Path

from torch import Tensor

from tubelet.core.errors import ClipError
from tubelet.models.encoder import ClipSpec
from tubelet.models.load import LoadedModel
from tubelet.video import Clip, normalise, read_clip, render_sample_clip, resize, sample_indices

SAMPLE = "sample"
"""Name of the clip that tubelet renders itself."""


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
