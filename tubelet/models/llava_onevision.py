"""LLaVA-OneVision: pooled tokens, frame behind frame, and one line break at the end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.prompt import VideoPlace, VideoRows
from tubelet.models.video_llm import VideoLLMAdapter, call_encoder, in_turn
from tubelet.models.vision_statistics import VisionTower, resized


def _places(base: Any, inputs: Mapping[str, Any], found: Tensor) -> list[VideoPlace]:
    vision = base.config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    grid = TokenGrid(frames=frames, height=side, width=side)
    rows = torch.arange(grid.num_video, device=found.device)
    return in_turn(found, [grid.num_video + 1] * videos, [grid] * videos, [rows] * videos)


def _encode(base: Any, inputs: Mapping[str, Any], where: Sequence[VideoPlace]) -> list[VideoRows]:
    features = call_encoder(base, "get_video_features", inputs).pooler_output
    if features.shape[1] == where[0].grid.num_video:
        # Up to transformers 5.17 the host adds the line break later.
        newline = base.image_newline.to(features).expand(len(features), 1, -1)
        features = torch.cat([features, newline], dim=1)
    return [VideoRows(rows=rows) for rows in features]


ADAPTER = VideoLLMAdapter(
    family="LLaVA-OneVision",
    classes=("LlavaOnevisionForConditionalGeneration",),
    consumed=("image_sizes_videos",),
    tower=VisionTower(
        path="vision_tower", layers="encoder.layers", attention="self_attn", pool=resized
    ),
    places=_places,
    encode=_encode,
)
