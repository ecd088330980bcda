"""Tiny models with towers that can be fused, and what these give."""

from dataclasses import replace

import torch

from tubelet.models.llm_presets import llm_preset

QWEN = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")
LLAVA = "tiny-llava-onevision"
PIXELS = {"tiny-qwen2.5-vl": 3 * 2 * 14 * 14, "tiny-qwen3-vl": 3 * 2 * 16 * 16}
# Windows of 4 x 4 patches: whole ones, and ragged ones of three kinds.
SIZES = torch.tensor([[2, 6, 10], [1, 8, 8], [3, 4, 6]])


def build(name, **vision):
    """A tiny model whose MLP has an uneven width; no bias is zero, no scale of a norm is one."""
    preset = llm_preset(name)
    if name in QWEN:
        vision = {"intermediate_size": 52, **vision}
    model = replace(preset, vision={**preset.vision, **vision}).build(dtype=torch.float32)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn_like(weight)
    return model


def patches(name, sizes=SIZES):
    return torch.randn(int(sizes.prod(1).sum()), PIXELS[name])


def tower_outputs(model, pixels, sizes=SIZES):
    """Everything that a Qwen tower gives."""
    out = model.model.visual(pixels, sizes, return_dict=True)
    return [out.last_hidden_state, out.pooler_output, *getattr(out, "deepstack_features", ())]


def close(found, wanted, tolerance=1e-5):
    """Equal within a share of the largest value."""
    assert len(found) == len(wanted) > 0
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want, rtol=0, atol=tolerance * float(want.abs().max()))
