"""Attention calls whose sequences lie one behind the other, taken apart into batches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def batches(
    lengths: Sequence[int], *tensors: Tensor
) -> Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]:
    """Sequences of equal length as batches: a vision tower's frames are one or a few of them.

    Args:
        lengths: Of the sequences; they add up to S.
        tensors: [1, H, S, D] each.

    Yields:
        The places [B * L] that a batch was taken from, None if it is the whole call in order, and
        the tensors as [B, H, L, D].
    """
    kinds = sorted(set(lengths))
    if len(kinds) == 1:
        yield None, tuple(_split(x, len(lengths)) for x in tensors)
        return
    device = tensors[0].device
    sizes = torch.tensor(lengths, device=device)
    starts = sizes.cumsum(0) - sizes
    for length in kinds:
        chosen = starts[sizes == length]
        rows = (chosen[:, None] + torch.arange(length, device=device)).flatten()
        yield rows, tuple(_split(x[:, :, rows], len(chosen)) for x in tensors)


def _split(x: Tensor, num: int) -> Tensor:
    return x[0].unflatten(1, (num, -1)).transpose(0, 1)
