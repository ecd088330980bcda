"""Triton code of the cache kernels; imported only where it runs."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _codes(packed, rows, real, channels, BITS: tl.constexpr, D: tl.constexpr):
    """Codes of some tokens of one head, float32; the first of a byte is in its lowest bits."""
    EACH: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = (D + EACH - 1) // EACH
    places = packed + rows.to(tl.int64)[:, None] * WIDTH + (channels // EACH)[None, :]
    found = tl.load(places, mask=real[:, None] & (channels < D)[None, :], other=0).to(tl.int32)
    found = (found >> ((channels % EACH) * BITS)[None, :]) & (2**BITS - 1)
    return found.to(tl.float32)


@triton.jit
@no_type_check
def restore(
    KEYS, KEY_SCALE, KEY_LOW, VALUES, VALUE_SCALE, VALUE_LOW, NORM, COLUMNS, TO_KEYS, TO_VALUES,
    k_head, k_row, v_head, v_row, num,
    BITS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Numbers of TILE tokens of one head, written to their columns: code * scale + low.

    Grid: heads x tiles, and keys or values. Levels of keys belong to channels; those of values to
    tokens, and NORM to their channels. All but the outputs are contiguous.
    """
    tiles = tl.cdiv(num, TILE)
    h, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    h64 = h.to(tl.int64)
    rows, channels = tile * TILE + tl.arange(0, TILE), tl.arange(0, PD)
    real, wide = rows < num, channels < D
    column = tl.load(COLUMNS + rows, mask=real, other=0).to(tl.int64)
    inside = real[:, None] & wide[None, :]
    line = h64 * num + rows
    if tl.program_id(1) == 0:
        scale = tl.load(KEY_SCALE + h64 * D + channels, mask=wide, other=0.0).to(tl.float32)
        low = tl.load(KEY_LOW + h64 * D + channels, mask=wide, other=0.0).to(tl.float32)
        found = _codes(KEYS, line, real, channels, BITS, D) * scale[None, :] + low[None, :]
        out = TO_KEYS + h64 * k_head + column[:, None] * k_row + channels[None, :]
        tl.store(out, found.to(TO_KEYS.dtype.element_ty), mask=inside)
    else:
        # Names of their own: types must not differ between branches.
        step = tl.load(VALUE_SCALE + line, mask=real, other=0.0).to(tl.float32)
        least = tl.load(VALUE_LOW + line, mask=real, other=0.0).to(tl.float32)
        norm = tl.load(NORM + h64 * D + channels, mask=wide, other=0.0).to(tl.float32)
        even = _codes(VALUES, line, real, channels, BITS, D) * step[:, None] + least[:, None]
        to = TO_VALUES + h64 * v_head + column[:, None] * v_row + channels[None, :]
        tl.store(to, (even * norm[None, :]).to(TO_VALUES.dtype.element_ty), mask=inside)
