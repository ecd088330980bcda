"""A stretch of a key-value cache: as it came, or each token in as many bits as it deserves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.core.kv import BITS
from tubelet.kernels.cache.packing import Quantized, quantize
from tubelet.kernels.triton_support import on_device, power_of_two, unavailable

TILE = 64
"""Tokens that one program restores."""


@dataclass(frozen=True, kw_only=True)
class RawChunk:
    """Keys and values as they came, [B, Hkv, n, D]."""

    keys: Tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """B, Hkv, n and D, padding included."""
        return tuple(self.keys.shape)

    def restore_into(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, [B, Hkv, n, D] each."""
        keys.copy_(self.keys)
        values.copy_(self.values)

    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Tokens of one prompt that have the same number of bits.

    Args:
        bits: Of each of their numbers.
        columns: [n] int32, ascending.
        keys: Codes, each channel with levels of its own, or the keys as they came.
        values: Codes of the values divided by `norm`, each token with levels of its own, or the
            values as they came.
        norm: [Hkv, 1, D] square root of the largest magnitude of each channel; None where the
            values are as they came.
    """

    bits: int
    columns: Tensor
    keys: Quantized | Tensor
    values: Quantized | Tensor
    norm: Tensor | None = None

    @classmethod
    def of(cls, columns: Tensor, keys: Tensor, values: Tensor, bits: int) -> "_Group":
        if bits == 16:
            return cls(bits=bits, columns=columns, keys=keys, values=values)
        norm = values.float().abs().amax(1, keepdim=True).sqrt().to(values.dtype)
        norm = torch.where(norm > 0, norm, 1)
        even = (values.float() / norm.float()).to(values.dtype)
        return cls(
            bits=bits,
            columns=columns,
            keys=quantize(keys, bits, dim=1),
            values=quantize(even, bits, dim=2),
            norm=norm,
        )

    def restore_into(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens to their columns of [Hkv, m, D] each."""
        if not isinstance(self.keys, Quantized) or not isinstance(self.values, Quantized):
            own_keys, own_values = self.keys, self.values
            assert isinstance(own_keys, Tensor)
            assert isinstance(own_values, Tensor)
        elif unavailable(keys.device) is None:
            self._fused(self.keys, self.values, keys, values)
            return
        else:
            assert self.norm is not None
            own_keys = self.keys.restore()
            own_values = self.values.restore() * self.norm.float()
        columns = self.columns.long()
        keys[:, columns] = own_keys.to(keys.dtype)
        values[:, columns] = own_values.to(values.dtype)

    def _fused(self, codes: Quantized, others: Quantized, keys: Tensor, values: Tensor) -> None:
        """In one launch, without the numbers in float32."""
        from tubelet.kernels.cache import triton_kernels as kernels

        heads, num, width = keys.shape[0], len(self.columns), keys.shape[2]
        with on_device(keys):
            kernels.restore[(heads * -(-num // TILE), 2)](
                *(*codes.tensors(), *others.tensors(), self.norm, self.columns, keys, values),
                *(*keys.stride()[:2], *values.stride()[:2], num),
                BITS=codes.bits,
                TILE=TILE,
                D=width,
                PD=max(16, power_of_two(width)),
            )

    def nbytes(self) -> int:
        parts = [self.columns] if self.norm is None else [self.columns, self.norm]
        for part in (self.keys, self.values):
            parts += part.tensors() if isinstance(part, Quantized) else [part]
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True, kw_only=True)
class PackedChunk:
    """Keys and values of some columns in mixed precision; padding is not held at all.

    Keys are quantised channel by channel, values token by token behind a division of each channel
    by the square root of its largest magnitude.

    Source:
        ZipCache's channel-separable token-wise quantisation (He et al., 2024, arXiv:2405.14256).
    """

    groups: tuple[tuple[_Group, ...], ...]
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "b h n d"],
        values: Float[Tensor, "b h n d"],
        columns: Sequence[Int[Tensor, "_"]],
        bits: Sequence[Int[Tensor, "_"] | None],
    ) -> "PackedChunk":
        """Pack.

        Args:
            keys, values: As they came.
            columns: For each prompt those that hold its tokens; the others are padding.
            bits: For each prompt one of 2, 4, 8 or 16 for each of its tokens, or None for 16
                everywhere.

        Raises:
            ShapeError: Another number of bits, or not one for each token.
        """
        groups = []
        for row, (real, wanted) in enumerate(zip(columns, bits, strict=True)):
            parts = []
            for number, own in _by_bits(real, wanted):
                parts.append(_Group.of(own.int(), keys[row][:, own], values[row][:, own], number))
            groups.append(tuple(parts))
        return cls(groups=tuple(groups), shape=tuple(keys.shape))

    def counts(self) -> dict[int, int]:
        """Tokens by their number of bits, all prompts together."""
        found = Counter[int]()
        for group in chain(*self.groups):
            found[group.bits] += len(group.columns)
        return dict(found)

    def restore_into(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, [B, Hkv, n, D] each with adjacent channels; 0 at padding."""
        for row, parts in enumerate(self.groups):
            if sum(len(group.columns) for group in parts) < self.shape[2]:
                keys[row].zero_()
                values[row].zero_()
            for group in parts:
                group.restore_into(keys[row], values[row])

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(group.nbytes() for parts in self.groups for group in parts)


def _by_bits(columns: Tensor, bits: Tensor | None) -> list[tuple[int, Tensor]]:
    """Columns by the number of bits of their tokens, waiting for the device once."""
    if bits is None:
        return [(BITS[-1], columns)]
    counts = torch.stack([(bits == number).sum() for number in BITS]).tolist()
    if bits.shape != columns.shape or sum(counts) != len(columns):
        raise ShapeError(f"each of {len(columns)} tokens needs one of {BITS} bits")
    parts = columns[bits.argsort(stable=True)].split(counts)
    return [(n, own) for n, own in zip(BITS, parts, strict=True) if len(own)]
