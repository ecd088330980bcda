"""ViViT (joint space-time model): class token in front of tubelets in raster order."""

from typing import Any

from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.encoder import ClipSpec, EncoderAdapter


def _grid(base: Any, pixels: Tensor) -> TokenGrid:
    depth, tall, wide = base.config.tubelet_size
    _, frames, _, height, width = pixels.shape
    return TokenGrid(frames=frames // depth, height=height // tall, width=width // wide, before=1)


def _clip(config: Any) -> ClipSpec:
    return ClipSpec(frames=config.num_frames, size=(config.image_size, config.image_size))


ADAPTER = EncoderAdapter(
    family="ViViT",
    classes=("VivitForVideoClassification", "VivitModel"),
    base="vivit",
    embeddings="embeddings",
    layers="layers",
    attention="attention",
    norm_after="layernorm_after",
    mlp_out="mlp",
    grid=_grid,
    missing={"divided": "this ViViT attends jointly over space and time"},
    config_class="VivitConfig",
    presets={"vivit-base": {}},
    clip=_clip,
)
