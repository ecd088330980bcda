"""Qwen3-VL: frames stand apart behind timestamps, and planes of features join the first layers."""

from typing import Any

from tubelet.models import qwen_vl
from tubelet.models.video_llm import VideoLLMAdapter
from tubelet.models.vision_statistics import VisionTower, runs


def _deepstack(config: Any) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


ADAPTER = VideoLLMAdapter(
    family="Qwen3-VL",
    classes=("Qwen3VLForConditionalGeneration",),
    consumed=qwen_vl.CONSUMED,
    tower=VisionTower(path="visual", layers="blocks", attention="attn", pool=runs),
    places=qwen_vl.places,
    encode=qwen_vl.encode,
    positions=qwen_vl.positions,
    deepstack=_deepstack,
)
