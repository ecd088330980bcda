"""VideoMAE: joint attention over tubelets, no class token, mean pooling."""

from typing import Any

from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.encoder import ClipSpec, EncoderAdapter


def _grid(base: Any, pixels: Tensor) -> TokenGrid:
    config = base.config
    _, frames, _, height, width = pixels.shape
    return TokenGrid(
        frames=frames // config.tubelet_size,
        height=height // config.patch_size,
        width=width // config.patch_size,
    )


def _clip(config: Any) -> ClipSpec:
    return ClipSpec(frames=config.num_frames, size=(config.image_size, config.image_size))


ADAPTER = EncoderAdapter(
    family="VideoMAE",
    classes=("VideoMAEForVideoClassification", "VideoMAEModel"),
    base="videomae",
    embeddings="embeddings",
    layers="encoder.layer",
    attention="attention.attention",
    norm_after="layernorm_after",
    mlp_out="output.dropout",
    grid=_grid,
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
