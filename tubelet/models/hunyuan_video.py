"""HunyuanVideo in diffusers: joint attention over video, then text with padding behind it."""

from collections.abc import Mapping
from typing import Any

import torch

from tubelet.core.grid import TokenGrid
from tubelet.models.diffusion import DiffusionAdapter, Stack, patched, real_tokens


def patch_of(config: Any) -> tuple[int, int, int]:
    """(frames, height, width) of a patch in latents, where height and width are one number."""
    return config.patch_size_t, config.patch_size, config.patch_size


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, list[int] | None]:
    mask = arguments["encoder_attention_mask"]
    shape = arguments["hidden_states"].shape[2:]
    grid = patched(shape, patch_of(config), after=arguments["encoder_hidden_states"].shape[1])
    # The host counts real tokens and takes the first ones, whatever the mask's order. Pipelines
    # cast masks to half precision, which cannot hold larger counts.
    return grid, real_tokens(grid, mask.sum(1, dtype=torch.int))


ADAPTER = DiffusionAdapter(
    family="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    stacks=(
        Stack(blocks="transformer_blocks", attention="attn"),
        Stack(blocks="single_transformer_blocks", attention="attn"),
    ),
    processor="HunyuanVideoAttnProcessor2_0",
    layout=_layout,
)
