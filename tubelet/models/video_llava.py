"""VideoLLaVA: every frame is a class token and its patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.prompt import VideoPlace, VideoRows
from tubelet.models.video_llm import VideoLLMAdapter, call_encoder, in_turn, split_rows
from tubelet.models.vision_statistics import VisionTower, same


def _places(base: Any, inputs: Mapping[str, Any], found: Tensor) -> list[VideoPlace]:
    vision = base.config.vision_config
    side = vision.image_size // vision.patch_size
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    grid = TokenGrid(frames=frames, height=side, width=side)
    size = frames * (grid.per_frame + 1)
    every = torch.arange(size, device=found.device)
    patches = every[every % (grid.per_frame + 1) != 0]
    return in_turn(found, [size] * videos, [grid] * videos, [patches] * videos)


def _encode(base: Any, inputs: Mapping[str, Any], where: Sequence[VideoPlace]) -> list[VideoRows]:
    features = call_encoder(base, "get_video_features", inputs).pooler_output
    return [VideoRows(rows=rows) for rows in split_rows(features, where)]


ADAPTER = VideoLLMAdapter(
    family="VideoLLaVA",
    classes=("VideoLlavaForConditionalGeneration",),
    tower=VisionTower(
        path="video_tower",
        layers="encoder.layers",
        attention="self_attn",
        class_tokens=1,
        pool=same,
    ),
    places=_places,
    encode=_encode,
)
