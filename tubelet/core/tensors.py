"""Small helpers on tensors that several core types share."""

from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import ShapeError


def encode_tensor(x: Tensor) -> dict[str, Any]:
    """A tensor as JSON-ready data: dtype name, shape and flat values."""
    dtype = str(x.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(x.shape), "data": x.flatten().tolist()}


def decode_tensor(data: dict[str, Any]) -> Tensor:
    """Inverse of `encode_tensor`; the tensor is on the CPU."""
    dtype = getattr(torch, data["dtype"])
    return torch.tensor(data["data"], dtype=dtype).reshape(data["shape"])


def check_ascending(positions: Tensor, limit: int, what: str) -> None:
    """Raise ShapeError unless the last axis is strictly ascending within [0, limit)."""
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= limit):
        raise ShapeError(f"{what} leaves [0, {limit})")
    if not bool((positions.diff(dim=-1) > 0).all()):
        raise ShapeError(f"{what} must be strictly ascending")


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` [K] of x [B, H, N, D], in the memory order of x.

    Hosts keep the heads of a token together, and moving whole tokens is three times as fast as
    moving the pieces of each head.
    """
    rows = x.transpose(1, 2)
    if x.is_contiguous() or not rows.is_contiguous():
        return x.index_select(2, index)
    flat = rows.flatten(2)
    taken = flat[0].index_select(0, index)[None] if len(flat) == 1 else flat.index_select(1, index)
    return taken.unflatten(2, rows.shape[2:]).transpose(1, 2)
