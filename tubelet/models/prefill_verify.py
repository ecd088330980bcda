"""Verification of sparse prefill: some query blocks of a causal call again, densely."""

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.kernels.attention import attention
from tubelet.models.verify import Checked

BLOCK = 64
"""Tokens per block of the check."""


def check_blocks(
    ctx: PrefillContext, out: Tensor, lse: Tensor, *, blocks: int, seed: int
) -> Checked:
    """Compare a causal call with dense attention on random query blocks.

    Args:
        ctx: The call.
        out: [1, H, N, D] its result.
        lse: [1, H, N] its log-sum-exp.
        blocks: Query blocks, the same for all heads, in the order of the prompt.
        seed: Which ones.

    Returns:
        Two scalars on the device, without waiting for it.
    """
    num, device = ctx.num_tokens, ctx.query.device
    total = -(-num // BLOCK)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:blocks]
    # Lists of all other rows are empty, so that one causal call serves.
    counts = torch.zeros(1, 1, total, dtype=torch.int32)
    counts[..., chosen] = chosen.int() + 1
    every = torch.arange(total, dtype=torch.int32).expand(1, 1, total, -1)
    mask = BlockMask(
        counts=counts, indices=every, block=(BLOCK, BLOCK), num_queries=num, num_keys=num
    ).to(device)
    plan = AttentionPlan(mask=mask)
    dense, whole = attention(ctx.query, ctx.key, ctx.value, plan, scale=ctx.scale, causal=True)
    rows = (chosen[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    rows = rows[rows < num].to(device, non_blocking=True)
    wanted, found = (x.index_select(2, rows).float() for x in (dense, out))
    least = torch.finfo(torch.float32).tiny
    return Checked(
        error=(found - wanted).norm() / wanted.norm().clamp(min=least),
        recall=(lse - whole).index_select(2, rows).exp().clamp(max=1).mean(),
        cost=int(counts.sum()) / (total * (total + 1) // 2),
    )
