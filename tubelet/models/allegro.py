"""Allegro in diffusers: attention over video, text by cross-attention."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.attend_op import attend, in_heads
from tubelet.models.diffusion import DiffusionAdapter, Stack, patched
from tubelet.models.hunyuan_video import patch_of


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, None]:
    mask = arguments.get("attention_mask")
    if mask is not None and (mask.ndim != 4 or not bool(mask.all())):
        raise UnsupportedError(
            "recipes on Allegro do not combine with an attention_mask over video tokens; only "
            "None or all ones [batch, frames, height, width] is taken"
        )
    return patched(arguments["hidden_states"].shape[2:], patch_of(config)), None


class _Processor:
    """The host's processor for self-attention, without its mask, which hides nothing."""

    def __init__(self, before: Any, number: Tensor) -> None:
        from diffusers.models.embeddings import apply_rotary_emb_allegro

        self._number = number
        self._rotate: Any = apply_rotary_emb_allegro

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (x.transpose(1, 2) for x in in_heads(attn, hidden_states, projections))
        if image_rotary_emb is not None:
            angles, positions = image_rotary_emb
            q, k = self._rotate(q, angles, positions), self._rotate(k, angles, positions)
        out = attend(q, k, v, self._number).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


ADAPTER = DiffusionAdapter(
    family="Allegro",
    classes=("AllegroTransformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn1"),),
    processor="AllegroAttnProcessor2_0",
    layout=_layout,
    route=_Processor,
)
