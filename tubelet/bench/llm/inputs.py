"""Prompts for timing: a rendered or read clip among random words."""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.llm_inputs import clip_shape, geometry_of, inputs_of, prompt_of
from tubelet.models.llm_presets import WORDS_PER_STAMP, LoadedLLM
from tubelet.video import read_clip

SYSTEM = 14
"""Words in front of the video, about as many as a chat template puts there."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every variant answers.

    Args:
        grid: Video tokens of each prompt.
        question: Words behind the video.
        seed: Of clips and words.
        clip: [T, 3, H, W] uint8 frames that every prompt gets; None renders one for each.
    """

    grid: TokenGrid
    question: int
    seed: int
    clip: Tensor | None = None


def read_frames(path: str | os.PathLike[str], config: Any, grid: TokenGrid) -> tuple[Tensor, float]:
    """The frames [T, 3, H, W] uint8 that make these tokens, and the seconds that reading took.

    Raises:
        ClipError: The file is missing, corrupt, or has no video.
    """
    frames, height, width = clip_shape(config, grid)
    start = time.perf_counter()
    clip = read_clip(os.fspath(path), num_frames=frames, size=(height, width))
    return clip.frames, time.perf_counter() - start


def make_prompts(loaded: LoadedLLM, task: Task, batch: int) -> dict[str, Tensor]:
    """Arguments of `generate`: prompts of equal length, each with its own words and clip."""
    config, parameter = loaded.model.config, next(loaded.model.parameters())
    shape = clip_shape(config, task.grid)
    prompts, clips = [], []
    for number in range(batch):
        # Generators take less than 64 bits.
        seed = (task.seed * 10_007 + number) % 2**63
        generator = torch.Generator().manual_seed(seed)

        def words(num: int, generator: torch.Generator = generator) -> list[int]:
            low, high = loaded.words
            return torch.randint(low, high, (num,), generator=generator).tolist()

        def stamp(frame: int) -> list[int]:
            return words(WORDS_PER_STAMP) if loaded.stamps else []

        before, behind = words(SYSTEM), words(task.question)
        prompts.append(prompt_of(config, task.grid, before, behind, stamp))
        if task.clip is None:
            pixels = moving_clip(shape, seed, parameter.device, parameter.dtype)
        else:
            pixels = task.clip.to(parameter.device, parameter.dtype) / 255
        clips.append(_normalised(pixels, loaded))
    return inputs_of(config, prompts, clips)


def moving_clip(
    shape: tuple[int, int, int], seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[T, 3, H, W] in [0, 1]: a square that crosses a still texture, under some noise.

    Methods whose work depends on what stands still and what moves find both.
    """
    frames, height, width = shape
    generator = torch.Generator(device=device).manual_seed(seed)

    def texture(tall: int, wide: int) -> Tensor:
        coarse = (1, 3, max(tall // 8, 1), max(wide // 8, 1))
        noise = torch.rand(coarse, generator=generator, device=device)
        return F.interpolate(noise, size=(tall, wide), mode="bilinear")[0].to(dtype)

    clip = texture(height, width).expand(frames, -1, -1, -1).clone()
    side = max(min(height, width) // 3, 1)
    square, top = texture(side, side), (height - side) // 2
    for frame in range(frames):
        left = frame * (width - side) // max(frames - 1, 1)
        clip[frame, :, top : top + side, left : left + side] = square
    noise = torch.randn(clip.shape, generator=generator, device=device, dtype=dtype)
    return (clip + 0.02 * noise).clamp(0, 1)


def _normalised(pixels: Tensor, loaded: LoadedLLM) -> Tensor:
    geometry = geometry_of(loaded.model.config)
    mean, std = (
        torch.tensor(values, device=pixels.device, dtype=pixels.dtype)[:, None, None]
        for values in (geometry.mean, geometry.std)
    )
    return (pixels - mean) / std
