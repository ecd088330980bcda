"""Partial attention results over disjoint keys become one."""

import torch
from jaxtyping import Float
from torch import Tensor


def merge(
    out_a: Float[Tensor, "b h n e"],
    lse_a: Float[Tensor, "b h n"],
    out_b: Float[Tensor, "b h n e"],
    lse_b: Float[Tensor, "b h n"],
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """Attention over the union of two disjoint sets of keys.

    Args:
        out_a, out_b: Outputs over the keys of either set.
        lse_a, lse_b: Their log-sum-exps; -inf for a query without keys, whose output is then
            ignored.

    Returns:
        Output and log-sum-exp, both at least float32; 0 and -inf where both sets are empty.

    Source:
        FlashAttention-2's merge of partial softmax results (Dao, 2023, arXiv:2307.08691).
    """
    dtype = torch.promote_types(lse_a.dtype, torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    parts = []
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weighted = (part - lse).exp()[..., None] * out.to(dtype)
        # The output of an empty part may be anything, and 0 * NaN is NaN, as is -inf - -inf.
        parts.append(weighted.masked_fill(part.isneginf()[..., None], 0.0))
    return parts[0] + parts[1], lse
