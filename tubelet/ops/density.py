"""Density peaks: tokens that many others lie close to, and that lie far from denser ones."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.ops.cosine import products
from tubelet.ops.score import rank_of


def density_peaks(
    x: Float[Tensor, "b n d"],
    neighbours: int,
    chunk: int = 1024,
    valid: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n"]:
    """How good a cluster centre each token is: its density times its distance to a denser one.

    Density is exp of minus the mean squared distance to the nearest neighbours, itself not among
    them. The densest token has the largest distance that there is. Distances are Euclidean,
    divided by sqrt(D).

    Args:
        x: Features.
        neighbours: How many count; fewer where a row has no more.
        chunk: Rows of the distances that exist at once.
        valid: Tokens that take part; None for all.

    Returns:
        Scores >= 0, -inf where not valid. Of equally dense tokens the lower index passes for the
        denser one, so no noise is needed.

    Source:
        DPC-kNN (Du et al., 2016), with the exponential of TCFormer (Zeng et al., 2022,
        arXiv:2204.08680).
    """
    batch, num = x.shape[:2]
    own = torch.arange(num, device=x.device)
    # A single table is computed once.
    tables = list(_distances(x, chunk, valid)) if num <= chunk else None
    density = torch.ones(batch, num, device=x.device)
    if num > 1:
        parts = []
        for start, distance in tables or _distances(x, chunk, valid):
            rows = own[: distance.shape[1]]
            distance[:, rows, start + rows] = torch.inf
            nearest = distance.topk(min(neighbours, num - 1), dim=2, largest=False).values
            found = nearest.isfinite()
            squares = nearest.masked_fill(~found, 0).square().sum(2)
            parts.append((-squares / found.sum(2).clamp(min=1)).exp())
        density = torch.cat(parts, 1)
    if valid is not None:
        density = density.masked_fill(~valid, -1)
    largest, gaps = torch.zeros(batch, device=x.device), []
    for start, distance in tables or _distances(x, chunk, valid):
        rows = start + own[: distance.shape[1], None]
        mine = density[:, rows[:, 0], None]
        denser = (density[:, None] > mine) | ((density[:, None] == mine) & (own < rows))
        gaps.append(distance.masked_fill(~denser, torch.inf).amin(2))
        # Not those from or to what is not valid.
        real = distance.masked_fill((mine < 0) | distance.isinf(), 0)
        largest = torch.maximum(largest, real.amax((1, 2)))
    gap = torch.cat(gaps, 1)
    score = density * torch.where(gap.isinf(), largest[:, None], gap)
    return score if valid is None else score.masked_fill(~valid, -torch.inf)


def density_clusters(
    x: Float[Tensor, "b n d"],
    count: Int[Tensor, "b"],
    neighbours: int,
    chunk: int = 1024,
    valid: Bool[Tensor, "b n"] | None = None,
) -> tuple[Bool[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Clusters around the `count` highest density peaks of each row.

    Args:
        x: Features.
        count: Clusters of each row, from 0 to its number of valid tokens.
        neighbours, chunk, valid: As for `density_peaks`.

    Returns:
        True at the centres; and for each token the place of its nearest centre (its own for a
        centre), -1 where not valid or where the row has none.
    """
    centre = rank_of(density_peaks(x, neighbours, chunk, valid)) < count[:, None]
    parts = []
    for _, distance in _distances(x, chunk, centre):
        reach, nearest = distance.min(2)
        parts.append(nearest.masked_fill(reach.isinf(), -1))
    own = torch.arange(x.shape[1], device=x.device)
    target = torch.where(centre, own, torch.cat(parts, 1))
    return centre, target if valid is None else target.masked_fill(~valid, -1)


def _distances(x: Tensor, chunk: int, valid: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """First row and [B, rows, N] distances of some rows after the other, infinite to what is not
    valid."""
    scale = x.shape[-1] ** -0.5
    halved = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    wide = x if halved else x.float() * scale
    square = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() if halved else None
    for start in range(0, x.shape[1], chunk):
        part = wide[:, start : start + chunk]
        if square is None:
            distance = torch.cdist(part, wide)
        else:
            sums = square[:, start : start + chunk, None] + square[:, None]
            distance = (sums - 2 * products(part, wide)).clamp(min=0).sqrt() * scale
        yield start, distance if valid is None else distance.masked_fill(~valid[:, None], torch.inf)
