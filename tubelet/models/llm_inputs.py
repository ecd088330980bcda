"""From frames and words to what a video language model takes, without its processor.

No tokenizer and no image processor of a hub is needed: frames are cut into patches here, and a
prompt is some ids, the placeholders of a video with what the family puts around them, and more
ids. The families are those of `GEOMETRIES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

Stamp = Callable[[int], Sequence[int]]
"""Ids of the words in front of a frame of tokens, from its number."""


@dataclass(frozen=True, kw_only=True)
class LLMGeometry:
    """How a family turns a clip into tokens and into a prompt.

    Args:
        step: Pixels per token along (frames, height, width), from the config.
        frame: (height, width) of every frame in pixels where the family fixes it.
        side: Tokens (height, width) of a fixed frame.
        ids: Placeholders of a video with what stands around them, from config, grid and stamps.
        pixels: Arguments that hold the videos, from config and clips [T, 3, H, W].
        mean, std: Pixel normalisation per channel, on pixels in [0, 1].
    """

    step: Callable[[Any], tuple[int, int, int]]
    frame: Callable[[Any], tuple[int, int] | None] = lambda config: None
    side: Callable[[Any], tuple[int, int] | None] = lambda config: None
    ids: Callable[[Any, TokenGrid, Stamp], list[int]]
    pixels: Callable[[Any, Sequence[Tensor]], dict[str, Tensor]]
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


def geometry_of(config: Any) -> LLMGeometry:
    """The geometry of a model's family, from its config.

    Raises:
        UnsupportedError: Inputs of this family cannot be made here.
    """
    if config.model_type not in GEOMETRIES:
        known = ", ".join(GEOMETRIES)
        raise UnsupportedError(f"inputs are made for {known}; this model is {config.model_type!r}")
    return GEOMETRIES[config.model_type]


def clip_shape(config: Any, grid: TokenGrid) -> tuple[int, int, int]:
    """(frames, height, width) in pixels of the clip that makes these tokens.

    Raises:
        ShapeError: The family's frames have another size.
        UnsupportedError: See `geometry_of`.
    """
    geometry = geometry_of(config)
    frames, height, width = geometry.step(config)
    size, side = geometry.frame(config), geometry.side(config)
    if size is None or side is None:
        return grid.frames * frames, grid.height * height, grid.width * width
    if (grid.height, grid.width) != side:
        raise ShapeError(f"frames of this model are {side[0]}x{side[1]} tokens, not {grid}")
    return grid.frames * frames, *size


def prompt_of(
    config: Any,
    grid: TokenGrid,
    before: Sequence[int],
    behind: Sequence[int],
    stamp: Stamp = lambda frame: (),
) -> list[int]:
    """Ids of a prompt: `before`, one video of these tokens, `behind`."""
    return [*before, *geometry_of(config).ids(config, grid, stamp), *behind]


def inputs_of(
    config: Any, prompts: Sequence[Sequence[int]], clips: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Arguments of `generate` for prompts of equal length with one video each.

    Args:
        config: Of the model.
        prompts: Ids, from `prompt_of`.
        clips: [T, 3, H, W] each, normalised, on the model's device and in its dtype.

    Raises:
        ShapeError: The prompts differ in length, or their number is not that of the clips.
    """
    if len({len(prompt) for prompt in prompts}) != 1 or len(prompts) != len(clips):
        raise ShapeError("prompts must be of equal length, one per clip")
    device = clips[0].device
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == config.video_token_id).int() * 2
    return inputs | geometry_of(config).pixels(config, clips)


def _patches(clip: Tensor, vision: Any) -> Tensor:
    """[T, 3, H, W] as rows [patches, 3 * time * side * side], merged patches one behind another."""
    time, side, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    cut = clip.unflatten(0, (-1, time)).unflatten(-2, (-1, merge, side))
    cut = cut.unflatten(-1, (-1, merge, side))
    # (t, time, colour, h, merge, side, w, merge, side): tokens, then patches in them, then pixels.
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(0, 4).flatten(1)


def _qwen_pixels(config: Any, clips: Sequence[Tensor]) -> dict[str, Tensor]:
    vision = config.vision_config
    side = vision.patch_size
    sizes = [
        [len(clip) // vision.temporal_patch_size, clip.shape[2] // side, clip.shape[3] // side]
        for clip in clips
    ]
    return {
        "pixel_values_videos": torch.cat([_patches(clip, vision) for clip in clips]),
        "video_grid_thw": torch.tensor(sizes, device=clips[0].device),
    }


def _timed_pixels(config: Any, clips: Sequence[Tensor]) -> dict[str, Tensor]:
    seconds = torch.ones(len(clips), device=clips[0].device)
    return {**_qwen_pixels(config, clips), "second_per_grid_ts": seconds}


def _qwen_step(config: Any) -> tuple[int, int, int]:
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    return vision.temporal_patch_size, side, side


def _one_run(config: Any, grid: TokenGrid, stamp: Stamp) -> list[int]:
    start, end = config.vision_start_token_id, config.vision_end_token_id
    return [start, *[config.video_token_id] * grid.num_video, end]


def _run_per_frame(config: Any, grid: TokenGrid, stamp: Stamp) -> list[int]:
    start, end = config.vision_start_token_id, config.vision_end_token_id
    run = [start, *[config.video_token_id] * grid.per_frame, end]
    return [word for frame in range(grid.frames) for word in (*stamp(frame), *run)]


def _square(config: Any) -> tuple[int, int]:
    return config.vision_config.image_size, config.vision_config.image_size


def _pooled(config: Any) -> tuple[int, int]:
    vision = config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    return side, side


GEOMETRIES = {
    "qwen2_5_vl": LLMGeometry(
        step=_qwen_step, ids=_one_run, pixels=_timed_pixels, mean=CLIP_MEAN, std=CLIP_STD
    ),
    "qwen3_vl": LLMGeometry(step=_qwen_step, ids=_run_per_frame, pixels=_qwen_pixels),
    "llava_onevision": LLMGeometry(
        step=lambda config: (1, 1, 1),
        frame=_square,
        side=_pooled,
        # The last placeholder takes the host's line break.
        ids=lambda config, grid, stamp: [config.video_token_id] * (grid.num_video + 1),
        pixels=lambda config, clips: {"pixel_values_videos": torch.stack(list(clips))},
    ),
}
"""By model type of the config."""
