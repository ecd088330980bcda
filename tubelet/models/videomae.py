"""VideoMAE: joint attention over tubelets, no class token, mean pooling."""

from typing import Any

from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.encoder import EncoderAdapter


def _grid(base: Any, pixels: Tensor) -> TokenGrid:
    config = base.config
    _, frames, _, height, width = pixels.shape
    return TokenGrid(
        frames=frames // config.tubelet_size,
        height=height // config.patch_size,
        width=width // config.patch_size,
    )


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
)
