"""Triton code of the block means; imported only where it runs."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def block_means(
    X, ORDER, MEANS, x_batch, x_head, x_row, x_channel, order_head, heads, num, blocks, block,
    ORDERED: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Mean of the tokens of one block of one head. Grid: batch x heads x blocks."""
    # One axis, because CUDA takes no more than 65,535 along the others.
    this, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = bh // heads, bh % heads
    base = X + b.to(tl.int64) * x_batch + h.to(tl.int64) * x_head
    channels = tl.arange(0, PD)
    start = this * block
    size = tl.minimum(block, num - start)
    total = tl.zeros([PD], tl.float32)
    for first in range(0, size, TILE):
        inside = first + tl.arange(0, TILE) < size
        rows = (start + first + tl.arange(0, TILE)).to(tl.int64)
        if ORDERED:
            rows = tl.load(ORDER + h.to(tl.int64) * order_head + rows, mask=inside, other=0)
        places = base + rows[:, None] * x_row + channels[None, :] * x_channel
        tokens = tl.load(places, mask=inside[:, None] & (channels < D)[None, :], other=0.0)
        total += tl.sum(tokens.to(tl.float32), 0)
    out = MEANS + (bh.to(tl.int64) * blocks + this) * D + channels
    tl.store(out, total / size, mask=channels < D)
