"""How much of a causal call a plan computes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.block_mask import BlockMask

AT_ONCE = 2**28
"""Token pairs that are compared at once."""


def causal_density(mask: BlockMask, order: Tensor | None = None) -> float:
    """Share of the pairs of a query and a token up to it that lie in listed blocks, in [0, 1].

    Exact: in blocks that a query sees in part, single tokens count.

    Args:
        mask: Block pairs, in the order; a list for each head or one for all.
        order: [G or 1, N] places in order, as in `AttentionPlan`; None for the order of the prompt.
    """
    num, device = mask.num_queries, mask.counts.device
    places = torch.arange(num, device=device)[None] if order is None else order
    heads = max(mask.counts.shape[1], len(places))
    seen, before, last = 0, None, 0
    for head in range(heads):
        own = head if mask.counts.shape[1] > 1 else 0
        table = _table(mask, own)
        which = head * len(places) // heads
        # Heads of a key head mostly share their lists.
        if before is None or before[0] != which or not torch.equal(before[1], table):
            last = _pairs(table, places[which], mask)
            before = which, table
        seen += last
    return seen / (heads * num * (num + 1) // 2)


def _table(mask: BlockMask, head: int) -> Tensor:
    lists, columns = mask.indices[0, head], mask.grid[1]
    live = torch.arange(lists.shape[1], device=lists.device) < mask.counts[0, head][:, None]
    table = torch.zeros(len(lists), columns + 1, dtype=torch.bool, device=lists.device)
    return table.scatter(1, torch.where(live, lists, columns).long(), True)[:, :columns]


def _pairs(table: Tensor, places: Tensor, mask: BlockMask) -> int:
    """Pairs of one head, from its table of blocks [Mq, Mk] and the places in order [N]."""
    num, (bq, bk) = len(places), mask.block
    # Missing queries come before everything, missing keys behind it: neither makes a pair.
    queries = F.pad(places, (0, -num % bq), value=-1).unflatten(0, (-1, bq))
    keys = places[: mask.num_keys]
    keys = F.pad(keys, (0, -mask.num_keys % bk), value=num).unflatten(0, (-1, bk))
    whole = keys.amax(1) <= queries.amin(1)[:, None]
    part = table & ~whole & (keys.amin(1) <= queries.amax(1)[:, None])
    total = int((table & whole).sum()) * bq * bk
    for some in part.nonzero().split(AT_ONCE // (bq * bk)):
        rows, columns = some.unbind(1)
        total += int((keys[columns][:, None] <= queries[rows][:, :, None]).sum())
    return total
