"""A per-key bias carried by extra head channels, for fused kernels that take no bias.

Appending 1 to every query and bias / scale to every key adds the bias to each logit. One bf16
channel rounds it too coarsely (up to 1.6 % of a softmax weight for sizes up to 512), so it is
split into a high and a low part over two channels, which leaves about 3e-5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 8
"""Fused kernels want head widths that are multiples of this."""

EXCLUDED = -3.0e4
"""Stands for -inf, whose low part would be NaN; its softmax weight underflows to zero."""


def aligned(width: int) -> int:
    """`width` rounded up to what fused kernels take."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def padded_to(x: Tensor, width: int) -> Tensor:
    """`x` with zero channels up to `width`; itself, not a copy, when it has them."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def with_bias_channels(
    q: Tensor, k: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Widen q and k so that q' k' * scale equals q k * scale + key_bias.

    Args:
        q: [B, H, N, D] queries.
        k: [B, Hkv, M, D] keys.
        key_bias: [B, M] float32; -inf excludes a key.
        scale: Factor on the logits, > 0.

    Returns:
        q' and k' of width D + 2 rounded up to a multiple of 8.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    wanted = key_bias.to(wide).clamp(min=EXCLUDED) / scale
    limit = torch.finfo(k.dtype).max
    high = wanted.clamp(min=-limit).to(k.dtype)
    low = (wanted - high.to(wide)).clamp(min=-limit).to(k.dtype)
    pair = torch.stack([high, low], dim=-1)[:, None].expand(-1, k.shape[1], -1, -1)
    return _widened(q, q.new_ones(2)), _widened(k, pair)


def _widened(x: Tensor, extra: Tensor) -> Tensor:
    """`x` with two more channels and zeros up to the alignment, in the memory order of `x`."""
    width = aligned(x.shape[-1] + 2)
    extra = padded_to(extra.expand(*x.shape[:-1], 2), width - x.shape[-1])
    # Hosts hand over [B, N, H, D] seen as [B, H, N, D]; a plain cat would transpose it.
    if x.transpose(1, 2).is_contiguous():
        return torch.cat([x.transpose(1, 2), extra.transpose(1, 2)], dim=-1).transpose(1, 2)
    return torch.cat([x, extra], dim=-1)
