"""The slow, obvious attention that every other implementation is compared with."""

import torch
from torch import Tensor

from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.causal import places_of


def refuses(call: Call) -> str | None:
    """The reference takes everything."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Materialise the logits in float32 (float64 inputs stay float64).

    A query without any key gets zero output and a log-sum-exp of -inf.
    """
    q = call.q
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(call.groups, dim=1).to(dtype) for x in (call.k, call.v))
    logits = q.to(dtype) @ k.transpose(-1, -2) * call.scale
    if call.key_bias is not None:
        logits = logits + call.key_bias[:, None, None, :].to(dtype)
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask.token_mask(), -torch.inf)
    if call.causal:
        places = places_of(call)
        future = places[:, :, None] < places[:, None, : logits.shape[3]]
        logits = logits.masked_fill(future, -torch.inf)
    lse = logits.logsumexp(-1)
    # exp(-inf - -inf) would be NaN for a query without keys.
    weights = (logits - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    if call.mask is None:
        return (weights @ v).to(q.dtype), lse
    # 0 * NaN is NaN, but a value that is skipped must not matter whatever it is.
    finite = v.isfinite()
    out = weights @ torch.where(finite, v, 0.0)
    spoiled = (~logits.isneginf()).to(dtype) @ (~finite).to(dtype) > 0
    return out.masked_fill(spoiled, torch.nan).to(q.dtype), lse
