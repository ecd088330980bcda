"""SANA-Video in diffusers: linear attention, which has no softmax to make sparse."""

from tubelet.models.diffusion import DiffusionAdapter, Stack

ADAPTER = DiffusionAdapter(
    family="SANA-Video",
    classes=("SanaVideoTransformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn1"),),
    processor="SanaLinearAttnProcessor3_0",
    missing={
        "attention": "SANA-Video has linear attention: its cost grows with the tokens, not with "
        "their pairs, so there is no pair to leave out"
    },
)
