"""Mochi in diffusers: joint attention over video, then text without its padding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.attend_op import attend_jointly, in_heads
from tubelet.models.diffusion import (
    DiffusionAdapter,
    Stack,
    needs_valid_first,
    patched,
    real_tokens,
)


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, list[int] | None]:
    mask = arguments["encoder_attention_mask"]
    needs_valid_first(mask, "the encoder_attention_mask of Mochi")
    patch = (1, config.patch_size, config.patch_size)
    grid = patched(arguments["hidden_states"].shape[2:], patch, after=mask.shape[1])
    return grid, real_tokens(grid, mask.bool().sum(1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels (2i, 2i + 1) of [B, N, H, D] turned by angles [N, H, D / 2]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


class _Processor:
    """The host's processor for the whole batch at once; the host goes sample by sample.

    Padded tokens get attention here and zeros there; nobody attends to them either way.
    """

    def __init__(self, before: Any, number: Tensor) -> None:
        self._number = number

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = in_heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = in_heads(attn, encoder_hidden_states, added)
        q, k = attn.norm_q(q), attn.norm_k(k)
        text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        if image_rotary_emb is not None:
            q, k = _rotated(q, *image_rotary_emb), _rotated(k, *image_rotary_emb)
        return attend_jointly(attn, (q, k, v), (text_q, text_k, text_v), self._number)


ADAPTER = DiffusionAdapter(
    family="Mochi",
    classes=("MochiTransformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn1"),),
    processor="MochiAttnProcessor2_0",
    layout=_layout,
    route=_Processor,
    ascending=True,
)
