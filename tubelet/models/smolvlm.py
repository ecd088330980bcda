"""SmolVLM2: a video is a row of images; all frames of a prompt count as one video."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tubelet.models.prompt import VideoPlace, VideoRows
from tubelet.models.video_llm import (
    VideoLLMAdapter,
    call_encoder,
    frames_of_prompts,
    split_rows,
)
from tubelet.models.vision_statistics import VisionTower, squares


def _places(base: Any, inputs: Mapping[str, Any], found: Tensor) -> list[VideoPlace]:
    vision = base.config.vision_config
    side = vision.image_size // vision.patch_size // base.config.scale_factor
    return frames_of_prompts(found, side, side)


def _encode(base: Any, inputs: Mapping[str, Any], where: Sequence[VideoPlace]) -> list[VideoRows]:
    features = call_encoder(base, "get_image_features", inputs).pooler_output
    return [VideoRows(rows=rows) for rows in split_rows(features, where)]


ADAPTER = VideoLLMAdapter(
    family="SmolVLM2",
    classes=("SmolVLMForConditionalGeneration",),
    text="text_model",
    pixels="pixel_values",
    placeholder="image_token_id",
    image_pixels=None,
    consumed=("pixel_attention_mask",),
    tower=VisionTower(
        path="vision_model", layers="encoder.layers", attention="self_attn", pool=squares
    ),
    places=_places,
    encode=_encode,
)
