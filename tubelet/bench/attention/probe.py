"""Is the result right, and what does the plan leave out? A few rows recomputed in float32."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tubelet.bench.attention.inputs import Inputs
from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan

ROWS = 48
"""Queries that are recomputed, in each probed head."""

HEADS = 3
"""Heads that are probed: the first, a middle one, the last."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a few recomputed rows say about a call.

    Args:
        kernel_error: Largest absolute difference to the same plan in float32, of the output.
        lse_error: The same of the log-sum-exp. Both None where the plan adds terms of its own.
        error: Relative error against dense attention, ||O - dense|| / ||dense||.
        recall: Share of the dense softmax mass that the plan computes, in [0, 1].
    """

    kernel_error: float | None
    lse_error: float | None
    error: float
    recall: float


def probe(
    inputs: Inputs,
    plan: AttentionPlan,
    out: Tensor,
    lse: Tensor,
    seed: int = 0,
    *,
    causal: bool = False,
) -> Probe:
    """Compare a result with rows that are computed in float32 by the definition.

    Args:
        inputs: Queries [1, H, N, D], keys and values [1, G, N, D].
        plan: What was carried out, at the default scale.
        out: [1, H, N, D] result.
        lse: [1, H, N] log-sum-exp.
        seed: Of the choice of rows; the first and the last row are always among them.
        causal: No query sees a later token, whatever the plan lists.
    """
    q, k, v = inputs
    heads, tokens, groups = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:ROWS].sort()[0]
    rows[0], rows[-1] = 0, tokens - 1
    rows = rows.to(q.device)
    places = torch.arange(tokens, device=q.device)
    later = places > rows[:, None] if causal else None
    parts = []
    for h in sorted({0, heads // 2, heads - 1} if heads >= HEADS else set(range(heads))):
        kept = kept_keys(plan, h, rows, tokens, groups)
        own = q[0, h, rows], k[0, h // groups], v[0, h // groups]
        parts.append(_one_head(*own, kept, later, plan, out[0, h, rows], lse[0, h, rows]))
    off, lse_off, difference, norm, recall = (
        torch.stack(part) for part in zip(*parts, strict=True)
    )
    adds = plan.approximate or any(
        x is not None for x in (plan.delta_rows, plan.gain, plan.residual)
    )
    return Probe(
        kernel_error=None if adds else float(off.max()),
        lse_error=None if adds else float(lse_off.max()),
        error=float((difference.sum() / norm.sum()).sqrt()),
        recall=float(recall.mean()),
    )


def kept_keys(plan: AttentionPlan, head: int, rows: Tensor, tokens: int, groups: int = 1) -> Tensor:
    """Bool [R, N], True where the plan computes the pair of a query row and a key.

    Args:
        plan: Of one sample.
        head: Which one.
        rows: [R] query positions before any reordering.
        tokens: N.
        groups: Query heads per key head.
    """
    kept = torch.ones(len(rows), tokens, dtype=torch.bool, device=rows.device)
    mask = plan.mask
    if mask is None:
        return kept
    own = head if mask.counts.shape[1] > 1 else 0
    part: BlockMask = replace(
        mask, counts=mask.counts[:1, own : own + 1], indices=mask.indices[:1, own : own + 1]
    )
    order = torch.arange(tokens, device=rows.device)
    if plan.order is not None:
        order = plan.order[head // groups if plan.order.shape[0] > 1 else 0]
    place = torch.empty_like(order)
    place[order] = torch.arange(tokens, device=rows.device)
    columns = torch.arange(mask.num_keys, device=rows.device) // mask.block[1]
    blocks = part.to_dense()[0, 0, place[rows] // mask.block[0]]
    kept[:] = False
    kept[:, order[: mask.num_keys]] = blocks[:, columns]
    return kept


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    later: Tensor | None,
    plan: AttentionPlan,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """Largest errors, squared difference and norm against dense, and recall."""
    logits = q.float() @ k.float().T * q.shape[-1] ** -0.5
    if later is not None:
        logits = logits.masked_fill(later, -torch.inf)
    weights = logits.softmax(-1)
    dense = weights @ v.float()
    changed = logits / plan.temperature
    if plan.bias is not None:
        changed = changed + plan.bias[0].float()
    changed = changed.masked_fill(~kept, -torch.inf)
    wanted_lse = changed.logsumexp(-1)
    # A row without any key is zero by definition, not NaN.
    wanted = changed.softmax(-1).nan_to_num(0.0) @ v.float()
    off = (out.float() - wanted).abs().max()
    same = wanted_lse.isneginf() & lse.isneginf()
    lse_off = torch.where(same, 0.0, lse.float() - wanted_lse).abs().max()
    recall = (weights * kept).sum(-1).mean()
    return off, lse_off, (out.float() - dense).square().sum(), dense.square().sum(), recall
