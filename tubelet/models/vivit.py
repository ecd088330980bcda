"""ViViT (joint space-time model): class token in front of tubelets in raster order."""

from typing import Any

from tubelet.models.encoder import ClipSpec, EncoderAdapter


def _clip(config: Any) -> ClipSpec:
    depth, tall, wide = config.tubelet_size
    return ClipSpec(
        frames=config.num_frames,
        size=(config.image_size, config.image_size),
        tubelet=(depth, tall, wide),
    )


ADAPTER = EncoderAdapter(
    family="ViViT",
    classes=("VivitForVideoClassification", "VivitModel"),
    base="vivit",
    embeddings="embeddings",
    layers="layers",
    attention="attention",
    norm_after="layernorm_after",
    mlp_out="mlp",
    class_tokens=1,
    missing={"divided": "this ViViT attends jointly over space and time"},
    config_class="VivitConfig",
    presets={"vivit-base": {}},
    clip=_clip,
)
