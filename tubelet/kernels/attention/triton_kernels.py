"""Triton code of the block-list kernels; imported only where it runs.

Every program computes one tile of queries of one head and keeps the state of the online softmax
in float32: running maximum m and total of the logits in base 2, and the output so far.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _rows(
    base,
    start,
    step,
    limit,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
):
    """Rows start..start+SIZE of a matrix, [SIZE, P]: zeros past row `limit` and channel D."""
    rows = tl.arange(0, SIZE)
    channels = tl.arange(0, P)
    # Only the start needs 64 bits: a tile is small.
    places = base + start.to(tl.int64) * step + rows[:, None] * step + channels[None, :]
    if MASKED:
        wanted = (start + rows < limit)[:, None] & (channels < D)[None, :]
        return tl.load(places, mask=wanted, other=0.0)
    elif D < P:
        return tl.load(places, mask=(channels < D)[None, :], other=0.0)
    else:
        return tl.load(places)


@triton.jit
@no_type_check
def _absorb(m, total, acc, logits, values, EMPTY: tl.constexpr):
    """The softmax state after more keys; with EMPTY a row of -inf logits is allowed."""
    m_new = tl.maximum(m, tl.max(logits, 1))
    base = m_new
    if EMPTY:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return m_new, total, acc


@triton.jit
@no_type_check
def _store(
    m, total, acc, out, out_step, lse, start, limit,
    SIZE: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
):  # fmt: skip
    """Write output and natural log-sum-exp of a tile; 0 and -inf where no key was seen."""
    rows = tl.arange(0, SIZE)
    channels = tl.arange(0, PE)
    inside = start + rows < limit
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    acc = acc / divisor[:, None]
    places = out + start.to(tl.int64) * out_step + rows[:, None] * out_step + channels[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=inside[:, None] & (channels < E)[None, :])
    value = tl.where(empty, float("-inf"), (m + tl.log2(divisor)) / LOG2E)
    tl.store(lse + start + rows, value, mask=inside)


@triton.jit
@no_type_check
def block_attention(
    Q, K, V, OUT, LSE, COUNTS, INDICES, BIAS, WHOLE, PLACES,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, c_batch, c_head, i_batch, i_head, i_row, b_batch,
    w_batch, w_head, p_head,
    heads, groups, num_queries, num_keys, scale,
    BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    D: tl.constexpr, PD: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
    BIASED: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile over the key blocks of its list.

    Grid: batch x heads x query tiles. Lists hold a ragged last key block at their end (TAIL).
    Lists of CAUSAL calls begin with WHOLE blocks that every query sees; in the others, the ragged
    one among them, a query sees keys of no later place. CONTINUED calls find the result of the
    former in OUT and LSE and add the latter. `scale` includes log2(e). LSE is contiguous
    [B, H, N].
    """
    # One axis, because CUDA takes no more than 65,535 along the others.
    tiles = tl.cdiv(num_queries, TQ)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    g = h // groups
    block = tile // (BQ // TQ)
    start = tile * TQ
    b64, h64, g64 = b.to(tl.int64), h.to(tl.int64), g.to(tl.int64)
    keys = K + b64 * k_batch + g64 * k_head
    values = V + b64 * v_batch + g64 * v_head
    entries = INDICES + b64 * i_batch + h64 * i_head + block.to(tl.int64) * i_row
    count = tl.load(COUNTS + b64 * c_batch + h64 * c_head + block)
    queries = _rows(Q + b64 * q_batch + h64 * q_head, start, q_row, num_queries, True, TQ, D, PD)

    m = tl.full([TQ], float("-inf"), tl.float32)
    total = tl.zeros([TQ], tl.float32)
    acc = tl.zeros([TQ, PE], tl.float32)
    PARTS: tl.constexpr = BK // TK
    whole = count
    if TAIL:
        whole = tl.maximum(count - 1, 0)
    if CAUSAL:
        whole = tl.load(WHOLE + b64 * w_batch + h64 * w_head + block)
    out = OUT + b64 * o_batch + h64 * o_head
    lse = LSE + bh.to(tl.int64) * num_queries
    if CONTINUED:
        inside = start + tl.arange(0, TQ)
        m = tl.load(lse + inside, mask=inside < num_queries, other=float("-inf")) * LOG2E
        total = tl.where(m == float("-inf"), 0.0, 1.0)
        acc = _rows(out, start, o_row, num_queries, True, TQ, E, PE).to(tl.float32)
    else:
        for i in range(whole * PARTS):
            at = tl.load(entries + i // PARTS) * BK + (i % PARTS) * TK
            k = _rows(keys, at, k_row, num_keys, False, TK, D, PD)
            logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            if BIASED:
                bias = tl.load(BIAS + b64 * b_batch + at + tl.arange(0, TK))
                logits += bias[None, :] * LOG2E
            v = _rows(values, at, v_row, num_keys, False, TK, E, PE)
            m, total, acc = _absorb(m, total, acc, logits, v, BIASED)
    if TAIL or CAUSAL:
        # These entries may or may not need it; masking is right either way.
        rows = start + tl.arange(0, TQ)
        own = PLACES + h64 * p_head
        if CAUSAL:
            row_places = tl.load(own + rows, mask=rows < num_queries, other=0)
        for i in tl.range(whole * PARTS, count * PARTS, num_stages=1):
            at = tl.load(entries + i // PARTS) * BK + (i % PARTS) * TK
            places = at + tl.arange(0, TK)
            k = _rows(keys, at, k_row, num_keys, True, TK, D, PD)
            logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            if BIASED:
                bias = tl.load(BIAS + b64 * b_batch + places, mask=places < num_keys, other=0.0)
                logits += bias[None, :] * LOG2E
            seen = (places < num_keys)[None, :]
            if CAUSAL:
                key_places = tl.load(own + places, mask=places < num_keys, other=0)
                seen = seen & (key_places[None, :] <= row_places[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            v = _rows(values, at, v_row, num_keys, True, TK, E, PE)
            m, total, acc = _absorb(m, total, acc, logits, v, True)
    _store(m, total, acc, out, o_row, lse, start, num_queries, TQ, E, PE)


@triton.jit
@no_type_check
def add_left_out(
    Q, KMEAN, VMEAN, KEPT, OUT, LSE,
    q_batch, q_head, q_row, o_batch, o_head, o_row, t_batch, t_head,
    heads, groups, num_queries, columns, scale, log_block, log_tail,
    BQ: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    D: tl.constexpr, PD: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
):  # fmt: skip
    """Continue the softmax that ended in OUT and LSE with the mean of each block left out.

    Grid: batch x heads x query tiles. KMEAN [B, G, columns, D], VMEAN [B, G, columns, E] and
    LSE are contiguous; KEPT is uint8 [.., rows, columns], 1 where a block was computed.
    `log_block` and `log_tail` are log2 of the tokens in a block and in the last one.
    """
    # One axis, because CUDA takes no more than 65,535 along the others.
    tiles = tl.cdiv(num_queries, TQ)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    block = tile // (BQ // TQ)
    start = tile * TQ
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    pooled = (b64 * (heads // groups) + h // groups) * columns
    kept = KEPT + b64 * t_batch + h64 * t_head + block.to(tl.int64) * columns
    out, lse = OUT + b64 * o_batch + h64 * o_head, LSE + bh.to(tl.int64) * num_queries
    queries = _rows(Q + b64 * q_batch + h64 * q_head, start, q_row, num_queries, True, TQ, D, PD)

    rows = start + tl.arange(0, TQ)
    m = tl.load(lse + rows, mask=rows < num_queries, other=float("-inf")) * LOG2E
    total = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = _rows(out, start, o_row, num_queries, True, TQ, E, PE).to(tl.float32)
    for first in range(0, columns, TK):
        places = first + tl.arange(0, TK)
        inside = places < columns
        left_out = tl.load(kept + places, mask=inside, other=1) == 0
        at = tl.zeros([], tl.int32) + first
        k = _rows(KMEAN + pooled * D, at, D, columns, True, TK, D, PD)
        logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        logits += tl.where(places == columns - 1, log_tail, log_block)[None, :]
        logits = tl.where(left_out[None, :], logits, float("-inf"))
        v = _rows(VMEAN + pooled * E, at, E, columns, True, TK, E, PE)
        m, total, acc = _absorb(m, total, acc, logits, v, True)
    _store(m, total, acc, out, o_row, lse, start, num_queries, TQ, E, PE)


@triton.jit
@no_type_check
def causal_lists(
    COUNTS, INDICES, FIRST_QUERY, LAST_QUERY, FIRST_KEY, LAST_KEY, LENGTHS, WHOLE, LISTS,
    c_batch, c_head, i_batch, i_head, i_row, q_head, k_head, heads, rows, columns,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One list without what is later than its queries; blocks that are seen whole come first.

    Grid: batch x heads x rows. LENGTHS and WHOLE are contiguous [B, H, rows], LISTS too,
    [B, H, rows, columns]; the others are read by their strides, 0 where heads share them.
    """
    row, bh = tl.program_id(0) % rows, tl.program_id(0) // rows
    b64, h64 = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    count = tl.load(COUNTS + b64 * c_batch + h64 * c_head + row)
    given = INDICES + b64 * i_batch + h64 * i_head + row.to(tl.int64) * i_row
    first = tl.load(FIRST_QUERY + h64 * q_head + row)
    last = tl.load(LAST_QUERY + h64 * q_head + row)
    from_key, to_key = FIRST_KEY + h64 * k_head, LAST_KEY + h64 * k_head
    wholes = tl.zeros([], tl.int32)
    for start in range(0, count, CHUNK):
        live = start + tl.arange(0, CHUNK) < count
        entry = tl.load(given + start + tl.arange(0, CHUNK), mask=live, other=0)
        early = tl.load(to_key + entry, mask=live, other=0) <= first
        wholes += tl.sum((live & early).to(tl.int32), 0)
    place = tl.program_id(0).to(tl.int64)
    target = LISTS + place * columns
    number, behind = tl.zeros([], tl.int32), wholes
    for start in range(0, count, CHUNK):
        live = start + tl.arange(0, CHUNK) < count
        entry = tl.load(given + start + tl.arange(0, CHUNK), mask=live, other=0)
        early = tl.load(to_key + entry, mask=live, other=0) <= first
        begun = tl.load(from_key + entry, mask=live, other=0) <= last
        whole, part = (live & early).to(tl.int32), (live & begun & (early == 0)).to(tl.int32)
        tl.store(target + number + tl.cumsum(whole, 0) - 1, entry, mask=whole == 1)
        tl.store(target + behind + tl.cumsum(part, 0) - 1, entry, mask=part == 1)
        number += tl.sum(whole, 0)
        behind += tl.sum(part, 0)
    tl.store(WHOLE + place, wholes)
    tl.store(LENGTHS + place, behind)
