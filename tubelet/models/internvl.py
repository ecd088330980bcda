"""InternVL: a video is a row of images; all frames of a prompt count as one video."""

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
    vision, ratio = base.config.vision_config, base.config.downsample_ratio
    height, width = (
        int(side // patch * ratio)
        for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return frames_of_prompts(found, height, width)


def _encode(base: Any, inputs: Mapping[str, Any], where: Sequence[VideoPlace]) -> list[VideoRows]:
    features = call_encoder(base, "get_image_features", inputs).pooler_output
    return [VideoRows(rows=rows) for rows in split_rows(features, where)]


ADAPTER = VideoLLMAdapter(
    family="InternVL",
    classes=("InternVLForConditionalGeneration",),
    pixels="pixel_values",
    placeholder="image_token_id",
    image_pixels=None,
    tower=VisionTower(
        path="vision_tower",
        layers="encoder.layer",
        attention="attention",
        class_tokens=1,
        pool=squares,
    ),
    places=_places,
    encode=_encode,
)
