"""Latte in diffusers: divided attention, which takes no recipe for whole videos."""

from tubelet.models.diffusion import DiffusionAdapter, Stack

ADAPTER = DiffusionAdapter(
    family="Latte",
    classes=("LatteTransformer3DModel",),
    stacks=(
        Stack(blocks="transformer_blocks", attention="attn1", kind="spatial"),
        Stack(blocks="temporal_transformer_blocks", attention="attn1", kind="temporal"),
    ),
    processor="AttnProcessor2_0",
    missing={
        "attention": "Latte attends within a frame and along time in turn, over short sequences; "
        "no call sees the whole video"
    },
)
