"""Clips in and out: decoding, sampling, resizing, writing, and a procedural demo clip."""

from tubelet.video.clip import Clip
from tubelet.video.decode import probe, read_clip, sample_indices
from tubelet.video.encode import write_video
from tubelet.video.sample import render_sample_clip
from tubelet.video.transform import normalise, resize

__all__ = [
    "Clip",
    "normalise",
    "probe",
    "read_clip",
    "render_sample_clip",
    "resize",
    "sample_indices",
    "write_video",
]
