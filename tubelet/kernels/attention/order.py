"""Tokens in the order of a plan, and back."""

import torch
from torch import Tensor

from tubelet.core.tensors import take_tokens


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x [B, H, N, D] in an order [G or 1, K], G a divisor of H.

    Result [B, H, K, D]; in the memory order of x where the order is one for all heads, and
    head by head otherwise.
    """
    if order.shape[0] == 1:
        return take_tokens(x, order[0])
    batch, heads, _, width = x.shape
    index = for_heads(order, heads)
    if batch > 1 or not _flat(x):
        index = index[None, :, :, None]
        return x.gather(2, index.expand(batch, -1, -1, width))
    return _taken(x, index, torch.arange(heads, device=x.device)[:, None]).view(1, heads, -1, width)


def restored(x: Tensor, back: Tensor) -> Tensor:
    """x [B, H, N, D] in the order of hosts again, from the `inverse` of an order.

    The result has the heads of a token side by side in memory, as hosts keep them.
    """
    batch, heads, num, width = x.shape
    if back.shape[0] == 1 or batch > 1 or not _flat(x):
        return permuted(x, back)
    taken = _taken(x, for_heads(back, heads).T, torch.arange(heads, device=x.device))
    return taken.view(1, num, heads, width).transpose(1, 2)


def inverse(order: Tensor) -> Tensor:
    """[G, N] the order that undoes `order`, without a sort."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def for_heads(order: Tensor, heads: int) -> Tensor:
    """One order per head from one per key head; one for all stays one."""
    return order if order.shape[0] == 1 else order.repeat_interleave(heads // order.shape[0], 0)


def _flat(x: Tensor) -> bool:
    """Whether rows of x [1, H, N, D] lie one behind another, by heads or by tokens."""
    return x.is_contiguous() or x.transpose(1, 2).is_contiguous()


def _taken(x: Tensor, token: Tensor, head: Tensor) -> Tensor:
    """Rows [K, D] of x [1, H, N, D] from their tokens and heads, which broadcast.

    Whole rows of a flat table are what devices gather fastest, eight bytes at a time.
    """
    _, heads, num, width = x.shape
    if x.is_contiguous():
        flat, index = x.reshape(-1, width), (token + head * num).flatten()
    else:
        flat, index = x.transpose(1, 2).reshape(-1, width), (token * heads + head).flatten()
    ratio = 8 // x.element_size()
    aligned = width % ratio == 0 and x.storage_offset() % ratio == 0
    if ratio <= 1 or not aligned or (torch.is_grad_enabled() and x.requires_grad):
        return flat.index_select(0, index)
    return flat.view(torch.int64).index_select(0, index).view(x.dtype)
