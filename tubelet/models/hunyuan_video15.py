"""HunyuanVideo-1.5 in diffusers: joint attention over video, then image, glyph and text tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.attend_op import attend
from tubelet.models.diffusion import DiffusionAdapter, Stack, patched, real_tokens
from tubelet.models.hunyuan_video import patch_of


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, list[int] | None]:
    masks = [arguments["encoder_attention_mask"], arguments["encoder_attention_mask_2"]]
    image = arguments["image_embeds"]
    extra = sum(mask.shape[1] for mask in masks) + image.shape[1]
    grid = patched(arguments["hidden_states"].shape[2:], patch_of(config), after=extra)
    # The host moves real tokens to the front, and takes an image of zeros for none.
    real = sum(mask.bool().sum(1) for mask in masks) + image.shape[1] * (image != 0).any()
    return grid, real_tokens(grid, real)


class _Processor:
    """The host's processor without its N x N mask, which takes 12.5 GB at 720p and 121 frames.

    Padded tokens get attention here and none there; nobody attends to them either way.
    """

    def __init__(self, before: Any, number: Tensor) -> None:
        from diffusers.models.embeddings import apply_rotary_emb

        self._number = number
        self._rotate: Any = apply_rotary_emb

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        video, text = hidden_states, encoder_hidden_states
        q, k, v = (
            project(video).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (self._rotate(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        text_q, text_k, text_v = (
            project(text).unflatten(2, (attn.heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            text_q = attn.norm_added_q(text_q)
        if attn.norm_added_k is not None:
            text_k = attn.norm_added_k(text_k)
        pairs = ((q, text_q), (k, text_k), (v, text_v))
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        out = attend(q, k, v, self._number).transpose(1, 2).flatten(2)
        video, text = out.split([video.shape[1], text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)


ADAPTER = DiffusionAdapter(
    family="HunyuanVideo-1.5",
    classes=("HunyuanVideo15Transformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn"),),
    processor="HunyuanVideo15AttnProcessor2_0",
    layout=_layout,
    route=_Processor,
)
