"""Wan 2.1 and 2.2 (text, image and text-image to video) in diffusers."""

from collections.abc import Mapping
from typing import Any

from tubelet.core.grid import TokenGrid
from tubelet.models.diffusion import DiffusionAdapter, Stack, patched


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, None]:
    # Text and images come in by cross-attention.
    return patched(arguments["hidden_states"].shape[2:], config.patch_size), None


ADAPTER = DiffusionAdapter(
    family="Wan",
    classes=("WanTransformer3DModel",),
    stacks=(Stack(blocks="blocks", attention="attn1"),),
    processor="WanAttnProcessor",
    layout=_layout,
)
