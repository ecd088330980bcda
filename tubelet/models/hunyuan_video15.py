"""HunyuanVideo-1.5 in diffusers: joint attention over video, then image, glyph and text tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.models.attend_op import attend_jointly, in_heads
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
        q, k, v = in_heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (self._rotate(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = in_heads(attn, encoder_hidden_states, added)
        if attn.norm_added_q is not None:
            text_q = attn.norm_added_q(text_q)
        if attn.norm_added_k is not None:
            text_k = attn.norm_added_k(text_k)
        return attend_jointly(attn, (q, k, v), (text_q, text_k, text_v), self._number)


ADAPTER = DiffusionAdapter(
    family="HunyuanVideo-1.5",
    classes=("HunyuanVideo15Transformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn"),),
    processor="HunyuanVideo15AttnProcessor2_0",
    layout=_layout,
    route=_Processor,
)
