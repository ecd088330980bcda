"""Causal block lists: which listed blocks a query sees whole, in part, or not at all.

Causality goes by the place that a token had before the plan's order, so blocks of reordered
tokens are compared by the first and the last place that they hold.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.kernels.attention.call import Call


@dataclass(frozen=True, kw_only=True)
class CausalLists:
    """The lists of a mask without the blocks that are later than all queries of their row.

    Args:
        mask: In each list first the blocks that every query of the row sees whole, then those
            that need a look at single tokens: diagonals, and a ragged last block.
        whole: [B, H, Mq] int32, how many of a list are of the first kind.
        places: [H or 1, N] int32, place of each query before the order, and of each key, of
            which there may be fewer.
    """

    mask: BlockMask
    whole: Int[Tensor, "b h mq"]
    places: Int[Tensor, "g n"]


def places_of(call: Call) -> Tensor:
    """[H or 1, N] int32 place of each token before the order of the plan."""
    if call.places is not None:
        return call.places
    return torch.arange(call.q.shape[2], dtype=torch.int32, device=call.q.device)[None]


def causal_lists(call: Call) -> CausalLists:
    """The lists of a causal call, sorted; nothing is read back from the device."""
    mask, places = call.mask, places_of(call)
    assert mask is not None
    (first_query, last_query), (first_key, last_key) = spans(mask, places)
    slots = torch.arange(mask.indices.shape[3], device=places.device)
    live = slots < mask.counts[..., None]
    entries = mask.indices.masked_fill(~live, 0)
    seen = live & (_picked(first_key, entries) <= last_query[:, :, None])
    whole = seen & (_picked(last_key, entries) <= first_query[:, :, None])
    partial = seen & ~whole
    num_whole = whole.sum(-1, dtype=torch.int32)
    behind = num_whole[..., None] + partial.cumsum(-1)
    target = torch.where(whole, whole.cumsum(-1), behind) - 1
    # What is not seen goes to a spare place behind the end.
    target = target.masked_fill(~seen, len(slots))
    lists = entries.new_zeros(*target.shape[:3], len(slots) + 1)
    lists.scatter_(3, target, entries.expand(target.shape))
    counts = num_whole + partial.sum(-1, dtype=torch.int32)
    kept = replace(mask, counts=counts, indices=lists[..., :-1].contiguous())
    return CausalLists(mask=kept, whole=num_whole.contiguous(), places=places.contiguous())


def spans(mask: BlockMask, places: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """First and last place in each query block, [G, Mq] each, and in each key block, [G, Mk]."""
    never = places.shape[1]
    # A ragged block counts as if it went on, so that it is never taken for a whole one.
    keys = _spans(places[:, : mask.num_keys], mask.block[1], never, never)
    return _spans(places, mask.block[0], never, -1), keys


def _spans(places: Tensor, block: int, early: int, late: int) -> tuple[Tensor, Tensor]:
    """First and last place in each block, [G, M]; missing tokens count as `early` and `late`."""
    missing = -places.shape[1] % block
    first, last = (
        F.pad(places, (0, missing), value=value).unflatten(1, (-1, block))
        for value in (early, late)
    )
    return first.amin(2), last.amax(2)


def _picked(values: Tensor, entries: Tensor) -> Tensor:
    """values [G, M] at entries [B, H, Mq, K], H or G being 1 where they are shared."""
    heads = max(values.shape[0], entries.shape[1])
    entries = entries.expand(-1, heads, -1, -1).long()
    values = values.expand(heads, -1)[None, :, None]
    return values.expand(*entries.shape[:3], -1).gather(3, entries)
