"""V-JEPA 2: rotary positions from token indices, no class token, attentive pooling."""

from typing import Any

from tubelet.models.encoder import ClipSpec, EncoderAdapter


def _clip(config: Any) -> ClipSpec:
    return ClipSpec(
        frames=config.frames_per_clip,
        size=(config.crop_size, config.crop_size),
        tubelet=(config.tubelet_size, config.patch_size, config.patch_size),
        argument="pixel_values_videos",
    )


ADAPTER = EncoderAdapter(
    family="V-JEPA 2",
    classes=("VJEPA2ForVideoClassification", "VJEPA2Model"),
    base="vjepa2",
    embeddings="encoder.embeddings",
    layers="encoder.layer",
    attention="attention",
    norm_after="norm2",
    mlp_out="mlp",
    missing={
        "class token": "V-JEPA 2 has no class token; it pools by attention",
        "divided": "V-JEPA 2 attends jointly over space and time",
    },
    takes_positions=True,
    pooler="pooler",
    config_class="VJEPA2Config",
    presets={"vjepa2-large": {"frames_per_clip": 16}},
    clip=_clip,
)
