"""The slow, obvious attention that every other implementation is compared with."""

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    mask: BlockMask | None,
) -> tuple[Tensor, Tensor]:
    """Materialise the logits in float32 (float64 inputs stay float64).

    A query without any key gets zero output and a log-sum-exp of -inf.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :].to(dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask.token_mask(), -torch.inf)
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    lse = logits.logsumexp(-1)
    # exp(-inf - -inf) would be NaN for a query without keys.
    weights = (logits - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp()
    return (weights @ v.to(dtype)).to(q.dtype), lse
