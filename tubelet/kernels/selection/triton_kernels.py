"""Triton code of the selection kernels; imported only where it runs."""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _tokens(base, rows, inside, x_row, x_channel, UNIT: tl.constexpr, D: tl.constexpr,
            PD: tl.constexpr):  # fmt: skip
    """Rows of a matrix in float32, zeros outside; with UNIT each divided by its length."""
    channels = tl.arange(0, PD)
    places = base + rows[:, None] * x_row + channels[None, :] * x_channel
    tokens = tl.load(places, mask=inside[:, None] & (channels < D)[None, :], other=0.0)
    tokens = tokens.to(tl.float32)
    if UNIT:
        length = tl.sqrt(tl.sum(tokens * tokens, 1))
        tokens = tokens / tl.maximum(length, 1e-12)[:, None]
    return tokens


@triton.jit
@no_type_check
def block_means(
    X, ORDER, STARTS, MEANS, x_batch, x_head, x_row, x_channel, heads, num, blocks, block,
    ORDERED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Mean of the tokens of one block of one head; with UNEVEN it ends where the next starts.

    Grid: batch x heads x blocks.
    """
    # One axis, because CUDA takes no more than 65,535 along the others.
    this, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = bh // heads, bh % heads
    base = X + b.to(tl.int64) * x_batch + h.to(tl.int64) * x_head
    channels = tl.arange(0, PD)
    if UNEVEN:
        start = tl.load(STARTS + this)
        size = tl.load(STARTS + this + 1) - start
    else:
        start = this * block
        size = tl.minimum(block, num - start)
    total = tl.zeros([PD], tl.float32)
    for first in range(0, size, TILE):
        inside = first + tl.arange(0, TILE) < size
        rows = (start + first + tl.arange(0, TILE)).to(tl.int64)
        if ORDERED:
            rows = tl.load(ORDER + rows, mask=inside, other=0)
        total += tl.sum(_tokens(base, rows, inside, x_row, x_channel, UNIT, D, PD), 0)
    out = MEANS + (bh.to(tl.int64) * blocks + this) * D + channels
    tl.store(out, total / size, mask=channels < D)


@triton.jit
@no_type_check
def small_block_means(
    X, ORDER, MEANS, x_batch, x_head, x_row, x_channel, heads, num, blocks,
    ORDERED: tl.constexpr, UNIT: tl.constexpr, SIZE: tl.constexpr, TOGETHER: tl.constexpr,
    D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Means of TOGETHER blocks of SIZE tokens each: one token of all of them at a time, so that
    nothing is added across threads. Grid: batch x heads x groups of blocks.
    """
    groups = tl.cdiv(blocks, TOGETHER)
    this, bh = tl.program_id(0) % groups, tl.program_id(0) // groups
    b, h = bh // heads, bh % heads
    base = X + b.to(tl.int64) * x_batch + h.to(tl.int64) * x_head
    channels = tl.arange(0, PD)
    which = this * TOGETHER + tl.arange(0, TOGETHER)
    total = tl.zeros([TOGETHER, PD], tl.float32)
    for i in tl.static_range(SIZE):
        at = which * SIZE + i
        inside = at < num
        rows = at.to(tl.int64)
        if ORDERED:
            rows = tl.load(ORDER + rows, mask=inside, other=0)
        total += _tokens(base, rows, inside, x_row, x_channel, UNIT, D, PD)
    sizes = tl.maximum(tl.minimum(SIZE, num - which * SIZE), 1)
    out = MEANS + (bh.to(tl.int64) * blocks + which[:, None]) * D + channels[None, :]
    real = (which < blocks)[:, None] & (channels < D)[None, :]
    tl.store(out, total / sizes[:, None], mask=real)


@triton.jit
@no_type_check
def sub_block_scores(
    Q, K, OUT, heads, groups, num_q, num_k, rows, columns, scale,
    PR: tl.constexpr, PC: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """log sum exp over the PR x PC pairs of parts of TR x TC block pairs.

    One product per pair of parts, so that the sum is element by element. Grid: batch x heads x
    tiles. All tensors are contiguous; `scale` includes log2(e).
    """
    across = tl.cdiv(columns, TC)
    tiles = tl.cdiv(rows, TR) * across
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    r = (tile // across) * TR + tl.arange(0, TR)
    c = (tile % across) * TC + tl.arange(0, TC)
    channels = tl.arange(0, PD)
    wide = (channels < D)[None, :]
    queries = Q + bh.to(tl.int64) * num_q * D
    keys = K + (b.to(tl.int64) * (heads // groups) + h // groups) * num_k * D
    m = tl.full([TR, TC], float("-inf"), tl.float32)
    total = tl.zeros([TR, TC], tl.float32)
    for i in range(PR):
        row = r * PR + i
        q = tl.load(
            queries + row[:, None] * D + channels[None, :],
            mask=(row < num_q)[:, None] & wide,
            other=0.0,
        )
        for j in range(PC):
            column = c * PC + j
            k = tl.load(
                keys + column[:, None] * D + channels[None, :],
                mask=(column < num_k)[:, None] & wide,
                other=0.0,
            )
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            real = (row < num_q)[:, None] & (column < num_k)[None, :]
            logits = tl.where(real, logits, float("-inf"))
            m_new = tl.maximum(m, logits)
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            total = total * tl.exp2(m - base) + tl.exp2(logits - base)
            m = m_new
    out = OUT + (bh.to(tl.int64) * rows + r[:, None]) * columns + c[None, :]
    real = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(out, (m + tl.log2(total)) / LOG2E, mask=real)


@triton.jit
@no_type_check
def _logits(queries, keys, at, k_row, limit, scale, TK: tl.constexpr, D: tl.constexpr,
            PD: tl.constexpr):  # fmt: skip
    """Logits of a tile of queries and TK keys from `at`, -inf from key `limit` on."""
    rows, channels = at + tl.arange(0, TK), tl.arange(0, PD)
    places = keys + at.to(tl.int64) * k_row + tl.arange(0, TK)[:, None] * k_row + channels[None, :]
    k = tl.load(places, mask=(rows < limit)[:, None] & (channels < D)[None, :], other=0.0)
    logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
    return tl.where((rows < limit)[None, :], logits, float("-inf"))


@triton.jit
@no_type_check
def block_mass(
    Q, K, MASS, q_batch, q_head, q_row, k_batch, k_head, k_row,
    heads, groups, tiles, columns, num_rows, num_columns, num_keys, scale,
    BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Softmax mass of TQ queries on each of `columns` key blocks of BK tokens.

    Grid: batch x heads x query tiles. The softmax is over `num_keys` keys; blocks hold the first
    `num_columns`. MASS is contiguous; `scale` includes log2(e).
    """
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    rows, channels = tile * TQ + tl.arange(0, TQ), tl.arange(0, PD)
    places = Q + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    places += rows.to(tl.int64)[:, None] * q_row + channels[None, :]
    real = rows < num_rows
    queries = tl.load(places, mask=real[:, None] & (channels < D)[None, :], other=0.0)
    keys = K + b.to(tl.int64) * k_batch + (h // groups).to(tl.int64) * k_head
    m = tl.full([TQ], float("-inf"), tl.float32)
    total = tl.zeros([TQ], tl.float32)
    zero = tl.zeros([], tl.int32)
    for at in range(0, num_keys, TK):
        logits = _logits(queries, keys, zero + at, k_row, num_keys, scale, TK, D, PD)
        m_new = tl.maximum(m, tl.max(logits, 1))
        total = total * tl.exp2(m - m_new) + tl.sum(tl.exp2(logits - m_new[:, None]), 1)
        m = m_new
    lse = m + tl.log2(total)
    out = MASS + (bh.to(tl.int64) * tiles + tile) * columns
    for column in range(columns):
        mass = tl.zeros([TQ], tl.float32)
        for part in range(0, BK, TK):
            at = zero + column * BK + part
            logits = _logits(queries, keys, at, k_row, num_columns, scale, TK, D, PD)
            mass += tl.sum(tl.exp2(logits - lse[:, None]), 1)
        tl.store(out + column, tl.sum(tl.where(real, mass, 0.0), 0))


@triton.jit
@no_type_check
def row_totals(
    Q, K, PLACES, TOTALS, q_head, q_row, k_head, k_row, groups, num_rows, num_keys, scale,
    TQ: tl.constexpr, TK: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Natural log-sum-exp of TQ rows, each over the keys up to its place.

    Grid: heads x tiles of rows. PLACES and TOTALS are contiguous; `scale` includes log2(e).
    """
    tiles = tl.cdiv(num_rows, TQ)
    tile, h = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    rows, channels = tile * TQ + tl.arange(0, TQ), tl.arange(0, PD)
    real = rows < num_rows
    place = tl.load(PLACES + rows, mask=real, other=-1)
    at = Q + h.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row + channels[None, :]
    queries = tl.load(at, mask=real[:, None] & (channels < D)[None, :], other=0.0)
    keys = K + (h // groups).to(tl.int64) * k_head
    m = tl.full([TQ], float("-inf"), tl.float32)
    total = tl.zeros([TQ], tl.float32)
    zero = tl.zeros([], tl.int32)
    for start in range(0, tl.max(place, 0) + 1, TK):
        logits = _logits(queries, keys, zero + start, k_row, num_keys, scale, TK, D, PD)
        seen = (start + tl.arange(0, TK))[None, :] <= place[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        # Rows past the end see nothing.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2(m - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        m = m_new
    value = (m + tl.log2(total)) / LOG2E
    tl.store(TOTALS + h.to(tl.int64) * num_rows + rows, value, mask=real)


@triton.jit
@no_type_check
def received(
    Q, K, PLACES, FIRST, TOTALS, WEIGHT, OUT,
    q_head, q_row, k_head, k_row, groups, num_rows, num_keys, scale,
    WEIGHTED: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, D: tl.constexpr,
    PD: tl.constexpr,
):  # fmt: skip
    """Sum over all rows of their attention to each of TK keys; places ascend.

    Grid: heads x tiles of keys. FIRST is the first row that sees a key of each tile. All but Q and
    K are contiguous; `scale` includes log2(e).
    """
    tiles = tl.cdiv(num_keys, TK)
    tile, h = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    own, channels = tile * TK + tl.arange(0, TK), tl.arange(0, PD)
    wide = (channels < D)[None, :]
    base = K + (h // groups).to(tl.int64) * k_head + own.to(tl.int64)[:, None] * k_row
    keys = tl.load(base + channels[None, :], mask=(own < num_keys)[:, None] & wide, other=0.0)
    line = h.to(tl.int64) * num_rows
    found = tl.zeros([TK], tl.float32)
    for start in range(tl.load(FIRST + tile), num_rows, TQ):
        rows = start + tl.arange(0, TQ)
        real = rows < num_rows
        at = Q + h.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row + channels[None, :]
        queries = tl.load(at, mask=real[:, None] & wide, other=0.0)
        place = tl.load(PLACES + rows, mask=real, other=-1)
        total = tl.load(TOTALS + line + rows, mask=real, other=0.0) * LOG2E
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        shares = tl.exp2(logits - total[None, :])
        if WEIGHTED:
            shares *= tl.load(WEIGHT + line + rows, mask=real, other=0.0)[None, :]
        # Without meaning, and possibly infinite, where a row does not see a key.
        found += tl.sum(tl.where(own[:, None] <= place[None, :], shares, 0.0), 1)
    tl.store(OUT + h.to(tl.int64) * num_keys + own, found, mask=own < num_keys)


@triton.jit
@no_type_check
def group_mass(
    LOGITS, MASS, row_step, columns, groups, scale, part, num, first,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Softmax of one row of logits, summed over groups of GROUP columns.

    Grid: batch x heads x `part` rows, which are rows `first`... of the `num` of MASS. `scale`
    includes log2(e).
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    logits = tl.load(LOGITS + row * row_step + places, mask=places < columns, other=float("-inf"))
    logits = logits.to(tl.float32) * scale
    weights = tl.exp2(logits - tl.max(logits, 0))
    masses = tl.sum(tl.reshape(weights, [WIDTH // GROUP, GROUP]), 1) / tl.sum(weights, 0)
    group = tl.arange(0, WIDTH // GROUP)
    out = MASS + ((row // part) * num + first + row % part) * groups
    tl.store(out + group, masses, mask=group < groups)


@triton.jit
@no_type_check
def _key(score):
    """Unsigned integers in the order of the float32 scores."""
    # Adding zero makes -0 and 0 equal.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)


@triton.jit
@no_type_check
def keep_above(
    SCORE, KEPT, wanted, columns, BY_MASS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Largest threshold that enough of a row reaches: two bits of it per pass over the row.

    Enough is `wanted` entries, or with BY_MASS that share of the row's sum. Grid: rows.
    """
    row = tl.program_id(0).to(tl.int64) * columns
    places = tl.arange(0, CHUNK)
    target = wanted
    total = 0.0
    if BY_MASS:
        sums = tl.zeros([CHUNK], tl.float32)
        for start in range(0, columns, CHUNK):
            at = start + places
            sums += tl.load(SCORE + row + at, mask=at < columns, other=0.0)
        total = tl.sum(sums, 0)
        target = wanted * total
    found = tl.zeros([], tl.uint32)
    unit = tl.full([], 0x40000000, tl.uint32)
    for _ in range(16):
        one, two, three = found + unit, found + 2 * unit, found + 3 * unit
        # Added up across threads once per pass, which costs more than the pass.
        first = tl.zeros([CHUNK], tl.float32 if BY_MASS else tl.int32)
        second, third = first, first
        for start in range(0, columns, CHUNK):
            at = start + places
            score = tl.load(SCORE + row + at, mask=at < columns, other=0.0)
            key = _key(score)
            worth = tl.where(at < columns, score if BY_MASS else 1, 0)
            first += tl.where(key >= one, worth, 0)
            second += tl.where(key >= two, worth, 0)
            third += tl.where(key >= three, worth, 0)
        digit = (tl.sum(first, 0) >= target).to(tl.uint32)
        digit += (tl.sum(second, 0) >= target).to(tl.uint32)
        digit += (tl.sum(third, 0) >= target).to(tl.uint32)
        found += digit * unit
        unit = unit >> 2
    if BY_MASS:
        # A row that sums to zero has no ranking and keeps everything.
        found = tl.where(total > 0, found, tl.zeros([], tl.uint32))
    for start in range(0, columns, CHUNK):
        at = start + places
        score = tl.load(SCORE + row + at, mask=at < columns, other=0.0)
        tl.store(KEPT + row + at, (_key(score) >= found).to(tl.uint8), mask=at < columns)


@triton.jit
@no_type_check
def keep_above_pass(
    SCORE, KEPT, SUMS, FOUND, TOTAL, wanted, columns, rows, segments, place,
    BY_MASS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One pass of `keep_above` over long rows, four bits of the threshold each.

    A program sums one segment of a row above 16 candidates; the next pass adds up the segments
    and knows four more bits. Nothing is added atomically, so the result is always the same. Grid:
    rows x segments. SUMS [9, rows, segments, 16], FOUND [9, rows] and TOTAL [rows] are scratch;
    `place` is the number of the pass, the last of which writes KEPT.
    """
    segment, row = tl.program_id(0) % segments, tl.program_id(0) // segments
    candidates = tl.arange(0, 16)
    found = tl.zeros([], tl.uint32)
    total = 0.0
    if not FIRST:
        before = tl.load(FOUND + (place - 1) * rows + row).to(tl.uint32, bitcast=True)
        at = tl.arange(0, SEGMENTS)
        parts = SUMS + (((place - 1) * rows + row) * segments + at[:, None]) * 16
        held = tl.load(parts + candidates[None, :], mask=(at < segments)[:, None], other=0)
        sums = tl.sum(held, 0)
        target = wanted
        if BY_MASS:
            # The lowest candidate of the first pass is below every entry.
            total = tl.sum(tl.where(candidates == 0, sums, 0.0), 0)
            if place > 1:
                total = tl.load(TOTAL + row)
            target = wanted * total
        reached = (sums >= target) & (candidates > 0)
        digit = tl.sum(reached.to(tl.int32), 0).to(tl.uint32)
        found = before + (digit << tl.cast(32 - 4 * place, tl.uint32))
    if segment == 0:
        tl.store(FOUND + place * rows + row, found.to(tl.int32, bitcast=True))
        if BY_MASS:
            tl.store(TOTAL + row, total)
    at = segment * CHUNK + tl.arange(0, CHUNK)
    start = row.to(tl.int64) * columns
    score = tl.load(SCORE + start + at, mask=at < columns, other=0.0)
    key = _key(score)
    if LAST:
        if BY_MASS:
            # A row that sums to zero has no ranking and keeps everything.
            found = tl.where(total > 0, found, tl.zeros([], tl.uint32))
        tl.store(KEPT + start + at, (key >= found).to(tl.uint8), mask=at < columns)
    else:
        worth = tl.where(at < columns, score if BY_MASS else 1, 0)
        unit = tl.full([], 1, tl.uint32) << tl.cast(28 - 4 * place, tl.uint32)
        out = SUMS + ((place * rows + row) * segments + segment) * 16
        for j in tl.static_range(16):
            tl.store(out + j, tl.sum(tl.where(key >= found + j * unit, worth, 0), 0))


@triton.jit
@no_type_check
def lists(KEPT, COUNTS, INDICES, columns, CHUNK: tl.constexpr):  # fmt: skip
    """Numbers of the kept columns of one row, in ascending order. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CHUNK)
    count = tl.zeros([], tl.int32)
    for start in range(0, columns, CHUNK):
        at = start + places
        kept = tl.load(KEPT + row * columns + at, mask=at < columns, other=0).to(tl.int32)
        slot = count + tl.cumsum(kept, 0) - 1
        tl.store(INDICES + row * columns + slot, at, mask=kept == 1)
        count += tl.sum(kept, 0)
    tl.store(COUNTS + row, count)


@triton.jit
@no_type_check
def max_min(DISTANCE, WEIGHT, FIRST, CHOSEN, num, k, WEIGHTED: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """`k` times the token farthest from those chosen. Grid: batch.

    How far each token is from those chosen stays in registers; -inf for the chosen ones.
    """
    sample = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    gap = tl.where(at < num, float("inf"), float("-inf"))
    pick = tl.load(FIRST + sample).to(tl.int32)
    if WEIGHTED:
        weight = tl.load(WEIGHT + sample * num + at, mask=at < num, other=0.0)
    for _ in range(k):
        tl.store(CHOSEN + sample * num + pick, 1)
        row = DISTANCE + (sample * num + pick) * num
        distance = tl.load(row + at, mask=at < num, other=0.0).to(tl.float32)
        gap = tl.where(at == pick, float("-inf"), tl.minimum(gap, distance))
        worth = gap
        if WEIGHTED:
            # The product of -inf and a weight of zero is no number.
            free = gap > float("-inf")
            worth = tl.where(free, tl.where(free, gap, 0.0) * weight, gap)
        pick = tl.argmax(worth, 0).to(tl.int32)
