"""Verification: some query blocks of a live attention call again, densely."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.context import AttentionContext
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention

ROWS = 64
"""Queries in a block where a plan has no block mask."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a few dense rows say about a call.

    Args:
        error: Scalar, |O - O_dense| / |O_dense| over the rows of all samples and heads.
        recall: Scalar, mean share of the dense softmax that the plan computes, in [0, 1]; NaN
            where the plan approximates the rest, since its log-sum-exp counts that too.
        cost: Share of the dense call's work that the check took.
    """

    error: Tensor
    recall: Tensor
    cost: float


def check_rows(
    ctx: AttentionContext,
    plan: AttentionPlan,
    out: Tensor,
    lse: Tensor,
    *,
    blocks: int,
    seed: int,
) -> Checked:
    """Compare a call with dense attention on random query blocks.

    Args:
        ctx: The call.
        plan: How it was done.
        out: [B, H, N, D] its result.
        lse: [B, H, N] its log-sum-exp.
        blocks: Query blocks, the same for all heads, in the plan's order.
        seed: Which ones.

    Returns:
        Two scalars on the device, without waiting for it.
    """
    tokens = _tokens(ctx, plan, blocks, seed)
    heads = ctx.query.shape[1]
    index = tokens[None].expand(len(out), heads, -1)
    queries = _rows(ctx.query, index)
    keys = ctx.keys
    dense, whole = attention(queries, ctx.key[:, :, :keys], ctx.value[:, :, :keys], scale=ctx.scale)
    dense, found = dense.float(), _rows(out, index).float()
    error = (found - dense).norm() / dense.norm().clamp(min=torch.finfo(torch.float32).tiny)
    recall = (lse.gather(2, index) - whole).exp().clamp(max=1).mean()
    if plan.approximate:
        recall = torch.full_like(recall, torch.nan)
    return Checked(error=error, recall=recall, cost=tokens.shape[1] / ctx.query.shape[2])


def _tokens(ctx: AttentionContext, plan: AttentionPlan, blocks: int, seed: int) -> Tensor:
    """[H or 1, R] original positions of the queries in randomly chosen blocks."""
    total, device = ctx.query.shape[2], ctx.query.device
    rows = ROWS if plan.mask is None else plan.mask.block[0]
    # Real tokens come first in every order.
    num = -(-ctx.keys // rows)
    chosen = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:blocks]
    places = chosen[:, None] * rows + torch.arange(rows)
    places = places.flatten().clamp(max=min(ctx.keys, total) - 1).to(device, non_blocking=True)
    return places[None] if plan.order is None else plan.order[:, places]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))
