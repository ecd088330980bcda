"""Selections: from scores and a budget to the tokens that stay."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.ops.cosine import cosines
from tubelet.ops.score import rank_of


def kept_positions(mask: Bool[Tensor, "b n"], num: int) -> Int[Tensor, "b k"]:
    """Ascending positions of the True entries, of which every row has exactly `num`."""
    order = torch.argsort(~mask, dim=-1, stable=True)
    return order[:, :num]


def budget(num: int, keep_ratio: float, least: int = 1) -> int:
    """Tokens kept out of `num` at a keep ratio in (0, 1]: rounded up, at least `least`."""
    # Subtracting a hair forgives products such as 0.7 * 10 = 7.000000000000001.
    wanted = math.ceil(num * keep_ratio - 1e-9)
    return min(num, max(wanted, least))


def top_k(score: Float[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
    """True for the `k` highest entries of each row; equal scores keep the lower index.

    Args:
        score: Any finite scale.
        k: How many, in [1, n].

    Raises:
        ShapeError: `k` is outside [1, n].
    """
    if not 1 <= k <= score.shape[-1]:
        raise ShapeError(f"top_k keeps between 1 and {score.shape[-1]} entries, got {k}")
    return rank_of(score) < k


def top_p(score: Float[Tensor, "*batch n"], mass: float) -> Bool[Tensor, "*batch n"]:
    """Keep the smallest set of entries whose share of each row's total reaches `mass`.

    Args:
        score: Non-negative weights. Any scale; each row is normalised by its own sum.
        mass: Share to reach, unitless, in (0, 1]. 1.0 keeps every entry, zeros included.

    Returns:
        True where kept. Each row keeps at least one entry. Equal scores keep the lower index.

    Raises:
        ShapeError: `mass` is outside (0, 1].

    Notes:
        A row that sums to zero has no ranking; such a row keeps everything rather than nothing.

    Source:
        Nucleus selection (Holtzman et al., 2020, arXiv:1904.09751).
    """
    if not 0 < mass <= 1:
        raise ShapeError(f"mass must lie in (0, 1], got {mass}")
    if mass == 1:
        return torch.ones_like(score, dtype=torch.bool)
    total = score.double().sum(-1, keepdim=True)
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    share = score.double().gather(-1, order) / total
    before = share.cumsum(-1) - share
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, before < mass)
    kept = kept | (rank_of(score) == 0)
    return torch.where(total > 0, kept, torch.ones_like(kept))


def at_least(score: Float[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
    """True for entries no lower than the `k`-th highest of their row: equal scores stay together.

    Args:
        score: Any scale, without NaN.
        k: In [1, n].

    Raises:
        ShapeError: `k` is outside [1, n].
    """
    num = score.shape[-1]
    if not 1 <= k <= num:
        raise ShapeError(f"at_least ranks between 1 and {num} entries, got {k}")
    return score >= score.kthvalue(num - k + 1, dim=-1, keepdim=True).values


def above_mass(score: Float[Tensor, "*batch n"], mass: float) -> Bool[Tensor, "*batch n"]:
    """As `top_p` with one sort and float32 sums: equal scores stay or go together.

    Args:
        score: Non-negative weights of any scale. Each row is normalised by its own sum.
        mass: Share to reach, in (0, 1]. 1.0 keeps every entry.

    Returns:
        True where kept, at least one entry per row. The share kept reaches `mass` to float32
        rounding. A row that sums to zero keeps everything.

    Raises:
        ShapeError: `mass` is outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ShapeError(f"mass must lie in (0, 1], got {mass}")
    if mass == 1:
        return torch.ones_like(score, dtype=torch.bool)
    falling = score.float().sort(dim=-1, descending=True).values
    sums = falling.cumsum(-1)
    needed = (sums < mass * sums[..., -1:]).sum(-1, keepdim=True)
    return score.float() >= falling.gather(-1, needed.clamp(max=score.shape[-1] - 1))


def cdf_sample(
    score: Float[Tensor, "*batch n"], samples: int, valid: Bool[Tensor, "*batch n"] | None = None
) -> Bool[Tensor, "*batch n"]:
    """Inverse-transform sampling at evenly spaced levels of the cumulative score.

    Scores are sorted in ascending order; their cumulative sum, min-max scaled, is the CDF. Each
    level picks the token nearest to it, and picking a token twice keeps it once.

    Args:
        score: Non-negative significance. Any scale.
        samples: Levels, >= 1, from the smallest non-zero CDF value up to 1.
        valid: Entries that take part, at least one per row; None for all.

    Returns:
        True where kept: between 1 and min(samples, n) valid entries per row.

    Raises:
        ShapeError: `samples` is below 1.

    Notes:
        A row of equal scores has a straight CDF and is sampled evenly. A row that sums to zero
        has no CDF; it is treated like a row of equal scores.

    Source:
        Adaptive token sampling (Fayyaz et al., 2022, arXiv:2111.15667).
    """
    if samples < 1:
        raise ShapeError(f"cdf_sample needs at least one sample, got {samples}")
    gone = torch.zeros_like(score, dtype=torch.bool) if valid is None else ~valid
    wide = score.double().masked_fill(gone, 0)
    wide = torch.where(wide.sum(-1, keepdim=True) > 0, wide, torch.ones_like(wide))
    # What is gone comes last and adds nothing, so that no level reaches it.
    order = torch.argsort(wide.masked_fill(gone, torch.inf), dim=-1, stable=True)
    cdf = wide.masked_fill(gone, 0).gather(-1, order).cumsum(-1)
    low, high = cdf[..., :1], cdf[..., -1:]
    flat = high <= low
    cdf = torch.where(flat, torch.ones_like(cdf), (cdf - low) / torch.where(flat, 1.0, high - low))
    start = torch.where(cdf > 0, cdf, torch.inf).amin(-1, keepdim=True)
    steps = torch.linspace(0, 1, samples, dtype=wide.dtype, device=wide.device)
    levels = start + (1 - start) * (steps if samples > 1 else torch.ones_like(steps))
    above = torch.searchsorted(cdf.contiguous(), levels.contiguous()).clamp(max=cdf.shape[-1] - 1)
    below = (above - 1).clamp(min=0)
    closer_below = levels - cdf.gather(-1, below) <= cdf.gather(-1, above) - levels
    picked = order.gather(-1, torch.where(closer_below, below, above))
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, picked, True)


def stratified_top_k(
    score: Float[Tensor, "b n"], group: Int[Tensor, "n"], num_groups: int, keep_ratio: float
) -> Bool[Tensor, "b n"]:
    """Keep the same share of every group, the highest scores of each.

    Args:
        score: Any finite scale.
        group: Group of each entry, in [0, num_groups); groups have equal sizes.
        num_groups: Number of groups, a divisor of n.
        keep_ratio: Share kept of each group, in (0, 1], rounded up.

    Returns:
        True where kept; exactly `budget(n / num_groups, keep_ratio)` entries per group.

    Raises:
        ShapeError: n is not a multiple of `num_groups`.
    """
    num = score.shape[-1]
    if num % num_groups:
        raise ShapeError(f"{num} entries do not split into {num_groups} equal groups")
    size = num // num_groups
    by_group = torch.argsort(group, stable=True).reshape(num_groups, size)
    kept = top_k(score[:, by_group], budget(size, keep_ratio))
    flat = by_group.flatten().expand_as(score)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, flat, kept.flatten(1))


def guarded_top_k(
    score: Float[Tensor, "b n"], k: int, guarded: Bool[Tensor, "b n"], who: str = "top_k"
) -> Bool[Tensor, "b n"]:
    """True for the guarded entries and the highest of the others, `k` per row.

    Args:
        score: Any finite scale.
        k: How many, in [1, n].
        guarded: Entries that always stay.
        who: Name for the error.

    Raises:
        ShapeError: A row guards more than `k` entries, or `k` is outside [1, n].
    """
    most = int(guarded.sum(1).max())
    if most > k:
        raise ShapeError(
            f"{who} always keeps {most} of {score.shape[1]} tokens, but was asked for {k}; raise "
            f"keep_ratio to {most / score.shape[1]:.3g} or more"
        )
    return top_k(score.masked_fill(guarded, torch.inf), k)


def apportion(
    quota: Float[Tensor, "t"], total: int, *, least: int, most: int | Int[Tensor, "t"]
) -> Int[Tensor, "t"]:
    """Whole numbers near `quota` that add up to exactly `total`, by largest remainders.

    Args:
        quota: Shares wanted by each group, any finite numbers.
        total: What the result adds up to, in [t * least, t * most].
        least: Lower bound of every group.
        most: Upper bound of every group, or of each; not below `least`.

    Returns:
        Where the quotas do not add up to `total`, all are raised or lowered alike. Equal
        remainders prefer the lower index.

    Raises:
        ShapeError: `total` cannot be reached within the bounds.
    """
    groups = len(quota)
    caps = torch.as_tensor(most, device=quota.device).expand(groups)
    room = int(caps.sum()) if isinstance(most, Tensor) else groups * most
    if not groups * least <= total <= room:
        upper = f"{least} to {most}" if isinstance(most, int) else f"at least {least}"
        raise ShapeError(
            f"{groups} groups of {upper} entries, {room} in all, cannot add up to {total}"
        )
    widest = int(caps.max()) if isinstance(most, Tensor) else most
    if widest == least:
        return torch.full_like(quota, least, dtype=torch.int64)
    # Unit j of a group is worth what is left of its quota behind j units: the best units win.
    unit = torch.arange(least, widest, device=quota.device)
    worth = (quota[:, None] - unit).masked_fill(unit >= caps[:, None], -torch.inf)
    units = rank_of(worth.flatten()) < total - groups * least
    return least + units.reshape(groups, -1).sum(1)


def max_min(
    x: Float[Tensor, "b n d"],
    k: int,
    weight: Float[Tensor, "b n"] | None = None,
    chunk: int | None = None,
) -> Bool[Tensor, "b n"]:
    """Greedy choice of `k` vectors that lie far apart, by cosine distance.

    The first is the one whose nearest neighbour is farthest, each further one the farthest from
    those chosen. Equal distances prefer the lower index.

    Args:
        x: Vectors of any length.
        k: How many, in [1, n].
        weight: Factor >= 0 on the distances of each vector that is not chosen yet; None for 1.
        chunk: Rows of the distances that exist at once, while the first is sought; None for a
            number that bounds their memory.

    Returns:
        True where chosen, `k` per row.

    Raises:
        ShapeError: `k` is outside [1, n].

    Notes:
        O(k n d) time and O(n) memory; no n x n matrix. About six launches for each vector
        chosen: where k is large, ask the tools of the context, which may have a kernel.
    """
    batch, num = x.shape[:2]
    if not 1 <= k <= num:
        raise ShapeError(f"max_min keeps between 1 and {num} vectors, got {k}")
    nearest = torch.cat([part.amin(2) for _, part in other_distances(x, chunk)], 1)
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    chosen = torch.zeros(batch, num, dtype=torch.bool, device=x.device)
    gap = torch.full((batch, num), torch.inf, device=x.device)
    factor = 1.0 if weight is None else weight
    pick = (nearest * factor).argmax(1)
    for _ in range(k):
        chosen = chosen.scatter(1, pick[:, None], True)
        vector = unit.gather(1, pick[:, None, None].expand(-1, 1, unit.shape[2]))
        gap = torch.minimum(gap, 1 - (unit @ vector.transpose(1, 2))[..., 0])
        pick = (gap * factor).masked_fill(chosen, -torch.inf).argmax(1)
    return chosen


def other_distances(
    x: Float[Tensor, "b n d"], chunk: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """First row and [B, rows, N] cosine distances of some vectors; infinite to themselves."""
    for start, cosine in cosines(x, x, chunk):
        distance = 1 - cosine
        rows = torch.arange(distance.shape[1], device=x.device)
        distance[:, rows, start + rows] = torch.inf
        yield start, distance
