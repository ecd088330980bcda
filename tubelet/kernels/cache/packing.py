"""Integers of a few bits, several to a byte, and the numbers they stand for."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tubelet.core.errors import ShapeError

WIDTHS = (2, 4, 8)
"""Bits of a code."""


def pack_codes(codes: UInt8[Tensor, "*batch d"], bits: int) -> UInt8[Tensor, "*batch p"]:
    """Codes along the last axis, 8 / bits to a byte, the first in the lowest bits.

    Args:
        codes: In [0, 2 ** bits).
        bits: One of `WIDTHS`.

    Returns:
        p = d * bits / 8, rounded up; missing codes count as 0.

    Raises:
        ShapeError: `bits` is not one of them.
    """
    if bits not in WIDTHS:
        raise ShapeError(f"codes have {', '.join(map(str, WIDTHS))} bits, got {bits}")
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    parts = padded.unflatten(-1, (-1, each)) << _shifts(bits, codes.device)
    return parts.sum(-1, dtype=torch.uint8)


def unpack_codes(packed: UInt8[Tensor, "*batch p"], bits: int, num: int) -> Tensor:
    """Inverse of `pack_codes` for `num` codes along the last axis."""
    parts = (packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)
    return parts.flatten(-2)[..., :num]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Numbers as codes of a few bits: code * scale + low.

    Args:
        packed: [..., p] uint8 from `pack_codes`.
        scale, low: Broadcast against the numbers.
        bits: Of a code.
        num: Codes along the last axis.
    """

    packed: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    num: int

    def restore(self) -> Tensor:
        """The numbers, float32."""
        codes = unpack_codes(self.packed, self.bits, self.num).float()
        return codes * self.scale.float() + self.low.float()

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.packed, self.scale, self.low


def quantize(x: Float[Tensor, "*batch d"], bits: int, dim: int) -> Quantized:
    """Numbers rounded to 2 ** bits evenly spaced levels between the extremes along `dim`.

    Args:
        x: Finite numbers.
        bits: One of `WIDTHS`.
        dim: Axis whose numbers share their levels.

    Returns:
        Codes, with scale and low in the dtype of `x`; the codes are the nearest for these rounded
        values. An error is at most half a level and a little more where they were rounded.

    Raises:
        ShapeError: `bits` is not one of them.
    """
    if bits not in WIDTHS:
        raise ShapeError(f"codes have {', '.join(map(str, WIDTHS))} bits, got {bits}")
    wide, most = x.float(), 2**bits - 1
    low = wide.amin(dim, keepdim=True)
    scale = ((wide.amax(dim, keepdim=True) - low) / most).to(x.dtype)
    low = low.to(x.dtype)
    # Equal numbers, or a spread too small for the dtype: all are code 0.
    divisor = torch.where(scale > 0, scale.float(), torch.inf)
    codes = ((wide - low.float()) / divisor).round().clamp(0, most)
    packed = pack_codes(codes.to(torch.uint8), bits)
    return Quantized(packed=packed, scale=scale, low=low, bits=bits, num=x.shape[-1])


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
