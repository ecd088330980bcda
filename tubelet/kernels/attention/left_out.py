"""Blocks that a mask leaves out, counted by their means."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.kernels.attention import triton_blocks
from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.merge import merge
from tubelet.kernels.selection import TOOLS

LOGITS = 2**24
"""Logits of means that are held at once."""


def approximated(call: Call, out: Tensor, lse: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """A sparse result with the blocks left out added to zeroth order.

    Key block j of n_j tokens that is left out for a query adds exp(scale q . mean_j(k)) n_j to
    the denominator and the same times mean_j(v) to the numerator.

    Args:
        call: Without a key bias.
        out, lse: What an implementation returned for it.
        impl: That implementation; after "fa4" and "triton" a Triton kernel goes on where it can.

    Source:
        Sol-Attn (arXiv:2607.24027).
    """
    mask = call.mask
    assert mask is not None
    k_mean, v_mean = (TOOLS.means(x, mask.block[1], None, mask.num_keys) for x in (call.k, call.v))
    if impl in ("fa4", "triton") and triton_blocks.adds_left_out(call):
        k_mean, v_mean = k_mean.to(call.q.dtype), v_mean.to(call.q.dtype)
        return triton_blocks.add_left_out(out, lse, call.q, k_mean, v_mean, mask, call.scale)
    part, part_lse = _left_out(call, mask, k_mean, v_mean)
    out, lse = merge(out, lse, part, part_lse)
    return out.to(call.q.dtype), lse


def _left_out(call: Call, mask: BlockMask, k_mean: Tensor, v_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the means of the blocks left out, a few query blocks at a time."""
    batch, heads, num, _ = call.q.shape
    (bq, bk), (rows, columns) = mask.block, mask.grid
    wide = torch.promote_types(call.q.dtype, torch.float32)
    k_mean, v_mean = (x.to(wide).repeat_interleave(call.groups, dim=1) for x in (k_mean, v_mean))
    sizes = torch.full((columns,), math.log(bk), dtype=wide, device=call.q.device)
    sizes[-1] = math.log(mask.num_keys - (columns - 1) * bk)
    kept = mask.to_dense()
    queries = F.pad(call.q, (0, 0, 0, rows * bq - num)).unflatten(2, (rows, bq))
    results = []
    step = max(1, LOGITS // (batch * heads * bq * columns))
    for first in range(0, rows, step):
        some = queries[:, :, first : first + step].to(wide)
        logits = some @ k_mean[:, :, None].mT * call.scale + sizes
        logits = logits.masked_fill(kept[:, :, first : first + step, None], -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
        results.append((weights @ v_mean[:, :, None], lse))
    out, lse = (
        torch.cat(parts, dim=2).flatten(2, 3)[:, :, :num] for parts in zip(*results, strict=True)
    )
    return out, lse
