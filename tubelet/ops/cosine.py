"""Cosines of many tokens, a part at a time: neither a table of all pairs nor a float32 copy."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PART = 2**23
"""Numbers that exist at once, so that they stay in the cache of a large GPU."""


def cosine(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*#batch d"]) -> Float[Tensor, "*batch"]:
    """float32 cosine of each vector with its partner; a zero vector has 0 with everything."""
    b = b.expand_as(a).reshape(-1, a.shape[-1])
    flat, rows = a.reshape(-1, a.shape[-1]), max(1, PART // a.shape[-1])
    parts = [
        F.cosine_similarity(x.float(), y.float(), dim=-1)
        for x, y in zip(flat.split(rows), b.split(rows), strict=True)
    ]
    return torch.cat(parts).reshape(a.shape[:-1])


def products(a: Float[Tensor, "b n d"], b: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """Inner products of all pairs, added up in float32.

    Half precision is multiplied as it is on a GPU, ten times faster than converted tokens and
    exact but for the order of the sums; elsewhere it is converted first.
    """
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return a.float() @ b.float().mT


def inverse_length(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """1 / |x| in float32, finite for zero vectors, without a copy of `x`."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12).reciprocal()


def cosines(
    a: Float[Tensor, "b n d"], b: Float[Tensor, "b m d"], rows: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """First row and [B, rows, M] float32 cosines of some tokens of `a` with all of `b`.

    A zero vector has a cosine of 0 with everything. None chooses as many rows as `PART` holds.
    """
    left, right = inverse_length(a), inverse_length(b)
    rows = max(1, PART // max(1, b.shape[0] * b.shape[1])) if rows is None else rows
    for start in range(0, a.shape[1], rows):
        part = slice(start, start + rows)
        yield start, products(a[:, part], b) * left[:, part, None] * right[:, None]
