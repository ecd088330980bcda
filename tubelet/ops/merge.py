"""Merging: which tokens are joined, as a TokenAssignment."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.ops.cosine import cosines
from tubelet.ops.select import kept_positions


def alternate_similarity(
    metric: Float[Tensor, "b n d"], protected: int = 0
) -> Float[Tensor, "b s t"]:
    """Cosine similarity of every even token to every odd token behind the protected ones.

    Args:
        metric: Features to compare, normalised here in float32.
        protected: Leading tokens left out.

    Returns:
        [B, S, T] in [-1, 1]: S sources (even places), T destinations (odd places).
    """
    unit = F.normalize(metric[:, protected:].float(), dim=-1)
    return unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)


def bipartite_match(
    similarity: Float[Tensor, "b s t"], r: int, num: int, protected: int = 0
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b k"]]:
    """Match the `r` most similar sources, each to its best destination.

    Args:
        similarity: From `alternate_similarity`, or any scores on the same even/odd split.
        r: Tokens to remove, in [0, S].
        num: Tokens in total, protected ones included.
        protected: Leading tokens that are neither source nor destination.

    Returns:
        target [B, N], the position each token merges into (its own unless matched), and
        kept [B, N - r], the ascending positions that remain. Equal similarities prefer the
        lower index.

    Source:
        Token merging (Bolya et al., 2023, arXiv:2210.09461).
    """
    batch, sources, destinations = similarity.shape
    most = sources if destinations else 0
    if not 0 <= r <= most:
        raise ShapeError(f"can merge between 0 and {most} of {num} tokens, got r = {r}")
    if r == 0:
        every = torch.arange(num, device=similarity.device).repeat(batch, 1)
        return every, every
    best, partner = similarity.max(-1)
    chosen = torch.argsort(best, dim=-1, descending=True, stable=True)[:, :r]
    target = torch.arange(num, device=similarity.device).repeat(batch, 1)
    source_position = protected + 2 * chosen
    target = target.scatter(1, source_position, protected + 2 * partner.gather(1, chosen) + 1)
    stays = torch.ones(batch, num, dtype=torch.bool, device=target.device)
    stays = stays.scatter(1, source_position, False)
    return target, kept_positions(stays, num - r)


def nearest_anchor(x: Float[Tensor, "b n d"], kept: Int[Tensor, "b k"]) -> Int[Tensor, "b n"]:
    """Position of the most similar kept token (cosine) for every token; kept ones keep theirs."""
    anchors = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    nearest = torch.cat([part.argmax(-1) for _, part in cosines(x, anchors)], 1)
    target = kept.gather(1, nearest)
    return target.scatter(1, kept, kept)


def drop(mask: Bool[Tensor, "b n"], num: int) -> TokenAssignment:
    """Keep the True entries, of which every row has exactly `num`; drop the others."""
    return TokenAssignment.keep(kept_positions(mask, num), mask.shape[1])


def blend(target: Int[Tensor, "b n"], kept: Int[Tensor, "b k"], share: float) -> TokenAssignment:
    """Merge tokens into kept ones that weigh at least `share` themselves.

    With c tokens merged into it, a kept token weighs w = max(share, 1 / (c + 1)) and each of them
    (1 - w) / c. A share of 0 gives the mean.

    Args:
        target: Position of the kept token that token n merges into (its own for kept tokens), -1
            to drop.
        kept: Kept positions, ascending; every non-negative `target` is one of them.
        share: In [0, 1].
    """
    plan = TokenAssignment.merge(target, kept, torch.ones(target.shape, device=target.device))
    own = plan.size.reciprocal().clamp(min=share)
    own = torch.where(plan.size > 1, own, torch.ones_like(own))
    other = (1 - own) / (plan.size - 1).clamp(min=1)
    weight = other.gather(1, plan.index.clamp(min=0)).scatter(1, kept, own)
    return replace(plan, weight=weight)


def grid_pool(
    grid: TokenGrid, factor: tuple[int, int, int], batch: int, device: torch.device | str | None
) -> TokenAssignment:
    """Average boxes of (time, height, width) tokens; boxes at the far edges may be smaller.

    Args:
        grid: Geometry; tokens before and after the video stay.
        factor: Box size, each >= 1.

    Returns:
        An assignment whose outputs form a smaller grid in raster order.
    """
    coordinates = grid.coordinates(device)
    box = coordinates // torch.tensor(factor, device=device)
    sizes = pooled_shape(grid, factor)
    label = (box[:, 0] * sizes[1] + box[:, 1]) * sizes[2] + box[:, 2]
    corner = (coordinates % torch.tensor(factor, device=device) == 0).all(-1)
    # Raster order of the corners is raster order of the boxes, so ranks are labels.
    num = sizes[0] * sizes[1] * sizes[2]
    first = kept_positions(corner[None], num)[0]
    video = first[label] + grid.before
    before = torch.arange(grid.before, device=device)
    after = torch.arange(grid.before + grid.num_video, grid.num_tokens, device=device)
    target = torch.cat([before, video, after]).expand(batch, -1)
    kept = torch.cat([before, first + grid.before, after]).expand(batch, -1)
    return TokenAssignment.merge(target, kept, torch.ones(target.shape, device=device))


def pooled_shape(grid: TokenGrid, factor: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, height, width) of the grid that `grid_pool` leaves."""
    frames, height, width = (
        -(-n // f) for n, f in zip((grid.frames, grid.height, grid.width), factor, strict=True)
    )
    return frames, height, width
