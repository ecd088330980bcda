"""Softmax statistics of some rows of causal attention, a part of the rows at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

PART = 2**24
"""Logits that exist at once."""


def row_totals(
    q: Float[Tensor, "h r d"], k: Float[Tensor, "g m d"], places: Int[Tensor, "r"], scale: float
) -> Float[Tensor, "h r"]:
    """Log-sum-exp of each row over the keys up to its place.

    Args:
        q: Queries of the rows; g divides h.
        k: Keys, one for each place.
        places: In [0, m), ascending.
        scale: Factor on the logits.

    Returns:
        float32, finite.
    """
    found = torch.empty(q.shape[:2], device=q.device)
    for rows, logits in _parts(q, k, places, scale):
        found[:, rows] = logits.logsumexp(-1)
    return found


def received(
    q: Float[Tensor, "h r d"],
    k: Float[Tensor, "g m d"],
    places: Int[Tensor, "r"],
    scale: float,
    totals: Float[Tensor, "h r"],
    weight: Float[Tensor, "h r"] | None = None,
) -> Float[Tensor, "h m"]:
    """Attention that each key receives: sum over rows i of w_i A_ij, without a map.

    Args:
        q, k, places, scale: As for `row_totals`.
        totals: What it gave.
        weight: Of each row, default 1.

    Returns:
        float32.
    """
    found = torch.zeros(q.shape[0], k.shape[1], device=q.device)
    for rows, logits in _parts(q, k, places, scale):
        shares = (logits - totals[:, rows, None]).exp_()
        own = shares.new_ones(q.shape[0], shares.shape[1]) if weight is None else weight[:, rows]
        found[:, : shares.shape[2]] += (own.float()[:, None] @ shares)[:, 0]
    return found


def _parts(q: Tensor, k: Tensor, places: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Some rows and their [H, rows, m'] float32 logits up to their last key, -inf behind each."""
    groups = q.shape[0] // k.shape[0]
    step = max(1, PART // (q.shape[0] * k.shape[1]))
    ends = (places + 1).tolist()
    for start in range(0, q.shape[1], step):
        rows = slice(start, min(start + step, q.shape[1]))
        end = ends[rows.stop - 1]
        own = q[:, rows].float().unflatten(0, (-1, groups))
        logits = (own @ k[:, None, :end].float().mT).flatten(0, 1).mul_(scale)
        behind = torch.arange(end, device=q.device) > places[rows, None]
        yield rows, logits.masked_fill_(behind, -torch.inf)
