"""Triton code of the rotary embedding; imported only where it runs."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _turn(source, target, inside, cos, cos_far, sin, sin_far, HALF: tl.constexpr):  # fmt: skip
    """One head of a tile of tokens: the channels of both halves are turned together."""
    near = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    far = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target, (near * cos - far * sin).to(kind), mask=inside)
    tl.store(target + HALF, (far * cos_far + near * sin_far).to(kind), mask=inside)


@triton.jit
@no_type_check
def rotary(
    Q, K, COS, SIN, Q_OUT, K_OUT, num, heads, q_row, k_row,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Queries and keys of ROWS tokens, all heads, by angles read once. Grid: tiles of tokens.

    The strides of heads are constants, so that the compiler knows how addresses are aligned.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    inside = (rows < num)[:, None] & (lanes < HALF)[None, :]
    place = rows[:, None] * (2 * HALF) + lanes[None, :]
    cos = tl.load(COS + place, mask=inside, other=0.0)
    cos_far = tl.load(COS + place + HALF, mask=inside, other=0.0)
    sin = tl.load(SIN + place, mask=inside, other=0.0)
    sin_far = tl.load(SIN + place + HALF, mask=inside, other=0.0)
    q = Q + rows[:, None] * q_row + lanes[None, :]
    k = K + rows[:, None] * k_row + lanes[None, :]
    for head in range(heads):
        # Both results are contiguous: a head is one plane of all tokens.
        out = (rows[:, None] + head * num) * (2 * HALF) + lanes[None, :]
        at_q, at_k = q + head * Q_HEAD, k + head * K_HEAD
        _turn(at_q, Q_OUT + out, inside, cos, cos_far, sin, sin_far, HALF)
        _turn(at_k, K_OUT + out, inside, cos, cos_far, sin, sin_far, HALF)
