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
