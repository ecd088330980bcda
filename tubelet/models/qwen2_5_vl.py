"""Qwen2.5-VL: the patches of its vision tower run in the order of windows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tubelet.models import qwen_vl
from tubelet.models.prompt import VideoPlace
from tubelet.models.video_llm import VideoLLMAdapter
from tubelet.models.vision_statistics import VisionTower, runs


def _unwindowed(
    base: Any, inputs: Mapping[str, Any], where: Sequence[VideoPlace], values: Tensor
) -> Tensor:
    """Merged patches in raster order."""
    from transformers.vision_utils import get_vision_window_index

    vision = base.config.vision_config
    order, _ = get_vision_window_index(
        inputs["video_grid_thw"],
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    merged = runs(base, inputs, where, values)
    return merged[torch.argsort(order.to(merged.device))]


ADAPTER = VideoLLMAdapter(
    family="Qwen2.5-VL",
    classes=("Qwen2_5_VLForConditionalGeneration",),
    consumed=qwen_vl.CONSUMED,
    tower=VisionTower(path="visual", layers="blocks", attention="attn", pool=_unwindowed),
    places=qwen_vl.places,
    encode=qwen_vl.encode,
    positions=qwen_vl.positions,
)
