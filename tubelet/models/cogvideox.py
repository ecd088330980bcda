"""CogVideoX in diffusers: joint attention over text, then video."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.attend_op import attend, in_heads
from tubelet.models.diffusion import DiffusionAdapter, Stack, patched


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, None]:
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    # Every text token counts, padding too: the host masks none.
    text = arguments["encoder_hidden_states"].shape[1]
    return patched((frames, height, width), patch, before=text), None


class _Processor:
    """The host's processor with the attention call replaced; the host calls torch itself."""

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
        if attention_mask is not None:
            raise UnsupportedError("recipes on CogVideoX do not combine with an attention mask")
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (x.transpose(1, 2) for x in in_heads(attn, tokens, projections))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :, :text], self._rotate(x[:, :, text:], image_rotary_emb)], dim=2)
                for x in (q, k)
            )
        out = attend(q, k, v, self._number).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


ADAPTER = DiffusionAdapter(
    family="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn1"),),
    processor="CogVideoXAttnProcessor2_0",
    layout=_layout,
    route=_Processor,
)
