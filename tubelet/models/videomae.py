"""VideoMAE: joint attention over tubelets, no class token, mean pooling."""

from typing import Any

from tubelet.models.encoder import ClipSpec, EncoderAdapter


def _clip(config: Any) -> ClipSpec:
    patch = config.patch_size
    return ClipSpec(
        frames=config.num_frames,
        size=(config.image_size, config.image_size),
        tubelet=(config.tubelet_size, patch, patch),
    )


class VideoMAEAdapter(EncoderAdapter):
    """VideoMAE's head may read the first token instead of the mean."""

    def lacks(self, model: Any) -> dict[str, str]:
        missing = super().lacks(model)
        if getattr(model, "fc_norm", True) is not None:
            return missing
        reason = "with use_mean_pooling=False the head reads the first video token"
        return {**missing, **dict.fromkeys(("any subset", "grid"), reason)}


ADAPTER = VideoMAEAdapter(
    family="VideoMAE",
    classes=("VideoMAEForVideoClassification", "VideoMAEModel"),
    base="videomae",
    embeddings="embeddings",
    layers="encoder.layer",
    attention="attention.attention",
    norm_after="layernorm_after",
    mlp_out="output.dropout",
    missing={
        "class token": "VideoMAE has no class token; it pools by the mean",
        "divided": "VideoMAE attends jointly over space and time",
    },
    config_class="VideoMAEConfig",
    presets={
        "videomae-small": {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
        },
        "videomae-base": {},
        "videomae-large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    },
    clip=_clip,
)
