"""Tiny random-weight hosts: real Hugging Face classes that run in milliseconds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tubelet.nn.reducers import build_reducers

FRAMES, SIDE, PATCH = 8, 32, 8
"""Clip length, clip side and patch side of every tiny host, in frames and pixels."""

_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": SIDE,
    "num_labels": 7,
    # The default of 0.02 leaves attention so flat that errors would hide.
    "initializer_range": 0.2,
}


def videomae(**changes: Any) -> Any:
    """VideoMAE on a 4 x 4 x 4 grid."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = {"patch_size": PATCH, "num_frames": FRAMES, "tubelet_size": 2}
    return VideoMAEForVideoClassification(VideoMAEConfig(**{**_SMALL, **config, **changes}))


def vivit(**changes: Any) -> Any:
    """ViViT: class token and a 4 x 4 x 4 grid."""
    from transformers import VivitConfig, VivitForVideoClassification

    config = {"num_frames": FRAMES, "tubelet_size": [2, PATCH, PATCH]}
    return VivitForVideoClassification(VivitConfig(**{**_SMALL, **config, **changes}))


def timesformer(**changes: Any) -> Any:
    """TimeSformer with divided attention: class token and an 8 x 4 x 4 grid."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    config = {"patch_size": PATCH, "num_frames": FRAMES}
    return TimesformerForVideoClassification(TimesformerConfig(**{**_SMALL, **config, **changes}))


def timesformer_joint(**changes: Any) -> Any:
    """TimeSformer with joint attention."""
    return timesformer(attention_type="joint_space_time", **changes)


def vjepa2(**changes: Any) -> Any:
    """V-JEPA 2 with its attentive pooler on a 4 x 4 x 4 grid."""
    from transformers import VJEPA2Config, VJEPA2ForVideoClassification

    config = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "mlp_ratio": 2.0,
        "initializer_range": 0.2,
        "num_labels": 7,
        "patch_size": PATCH,
        "crop_size": SIDE,
        "frames_per_clip": FRAMES,
        "tubelet_size": 2,
        "pred_hidden_size": 48,
        "pred_num_attention_heads": 3,
        "pred_num_hidden_layers": 2,
        "pred_num_mask_tokens": 2,
        "num_pooler_layers": 1,
    }
    return VJEPA2ForVideoClassification(VJEPA2Config(**{**config, **changes}))


HOSTS: dict[str, Callable[..., Any]] = {
    "videomae": videomae,
    "vivit": vivit,
    "vjepa2": vjepa2,
    "timesformer_joint": timesformer_joint,
    "timesformer": timesformer,
}
"""Builders by name; each takes changes to its config."""


def build(name: str, seed: int = 0, reducers: bool = False, **changes: Any) -> Any:
    """A tiny host in eval mode with seeded weights.

    Args:
        name: One of `HOSTS`.
        seed: Any integer.
        reducers: Put the modules of all learned reductions on its encoder, with random weights.
        changes: To its config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HOSTS[name](**changes)
        if reducers:
            base = getattr(model, model.base_model_prefix)
            base.reducers = build_reducers(width=48, heads=3, max_slots=24)
    return model.eval()


def clip(batch: int = 1, seed: int = 0, still: float = 0.5) -> Tensor:
    """[B, 8, 3, 32, 32] float32 clip about N(0, 1); the first sample has standing patches.

    Args:
        batch: Samples, each with its own content.
        seed: Any integer.
        still: Share of places that never change after the first frame.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, FRAMES, 3, SIDE, SIDE, generator=generator)
    places = torch.rand(batch, 1, 1, SIDE // PATCH, SIDE // PATCH, generator=generator) < still
    standing = places.repeat_interleave(PATCH, 3).repeat_interleave(PATCH, 4)
    return torch.where(standing, pixels[:, :1], pixels)
