"""Launches of the selection kernels; each function equals its namesake in `tubelet.ops`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.kernels.triton_support import on_device, power_of_two
from tubelet.ops.block_score import WORKSPACE, antidiagonal_squares
from tubelet.ops.select import other_distances

WIDEST = 32768
"""Longest row of logits or distances that one program holds."""

DISTANCES = 2**30
"""Most bytes of a table of distances in float32; 16,384 tokens fill it."""

LOG2E = math.log2(math.e)

LONG = 4096
"""Entries of a row that one program searches alone; longer rows are searched by several."""

PASSES = 9
"""Over long rows: eight find four bits of the threshold each, the last one applies it."""

KEPT, WALKED = 128, 64
"""Sides of a tile of logits: along what a program's statistic is about, and along the other."""

CHANNELS = 256
"""Widest heads, for which tiles are smaller, as for wide numbers: all fit on small GPUs."""

SMALL = (4, 8, 16, 32)
"""Tokens of blocks that are averaged many at a time."""


def means(x: Tensor, block: int, order: Tensor | None, num: int, *, unit: bool) -> Tensor:
    """Block means, of the tokens or of their unit vectors."""
    from tubelet.kernels.selection import triton_kernels as kernels

    batch, heads, _, width = x.shape
    blocks = -(-num // block)
    result = x.new_empty(batch, heads, blocks, width, dtype=torch.float32)
    places = x if order is None else order[0].contiguous()
    shape = {"UNIT": unit, "ORDERED": order is not None, "D": width, "PD": power_of_two(width)}
    with on_device(x):
        if block in SMALL:
            together = 512 // block
            kernels.small_block_means[(-(-blocks // together) * batch * heads,)](
                *(x, places, result, *x.stride(), heads, num, blocks),
                SIZE=block,
                TOGETHER=together,
                **shape,
            )
        else:
            kernels.block_means[(blocks * batch * heads,)](
                *(x, places, x, result, *x.stride(), heads, num, blocks, block),
                UNEVEN=False,
                TILE=min(64, power_of_two(block)),
                **shape,
            )
    return result


def run_means(x: Tensor, starts: Tensor, order: Tensor, longest: int) -> Tensor:
    """Means of runs of ordered tokens of any lengths: run i is starts[i] to starts[i + 1]."""
    from tubelet.kernels.selection import triton_kernels as kernels

    batch, heads, _, width = x.shape
    runs = len(starts) - 1
    result = x.new_empty(batch, heads, runs, width, dtype=torch.float32)
    with on_device(x):
        kernels.block_means[(runs * batch * heads,)](
            *(x, order[0].contiguous(), starts, result, *x.stride(), heads, 0, runs, 0),
            ORDERED=True,
            UNEVEN=True,
            UNIT=False,
            TILE=min(64, power_of_two(longest)),
            D=width,
            PD=power_of_two(width),
        )
    return result


def sub_block_scores(q: Tensor, k: Tensor, scale: float, parts: tuple[int, int]) -> Tensor:
    """log sum exp over pairs of parts, kept in registers."""
    from tubelet.kernels.selection import triton_kernels as kernels

    q, k = q.contiguous(), k.contiguous()
    batch, heads, num_q, width = q.shape
    groups, num_k = k.shape[1:3]
    rows, columns = -(-num_q // parts[0]), -(-num_k // parts[1])
    result = q.new_empty(batch, heads, rows, columns, dtype=torch.float32)
    tile = (128, 64) if q.element_size() == 2 else (32, 32)
    tiles = -(-rows // tile[0]) * -(-columns // tile[1])
    with on_device(q):
        kernels.sub_block_scores[(tiles * batch * heads,)](
            *(q, k, result, heads, heads // groups, num_q, num_k, rows, columns, scale * LOG2E),
            PR=parts[0],
            PC=parts[1],
            TR=tile[0],
            TC=tile[1],
            D=width,
            PD=max(16, power_of_two(width)),
            **({"num_warps": 8} if tile[0] == 128 and q.is_cuda else {}),
        )
    return result


def block_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    block: tuple[int, int],
    counts: tuple[int, int],
    num_keys: int,
) -> Tensor:
    """Two passes over the keys: the log-sum-exp of each query, then the sums per block."""
    from tubelet.kernels.selection import triton_kernels as kernels

    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batch, heads, _, width = q.shape
    most = 64 if q.element_size() == 2 else 32
    tq, tk = (min(most, size & -size) for size in block)
    tiles, columns = -(-counts[0] // tq), -(-counts[1] // block[1])
    result = q.new_empty(batch, heads, tiles, columns, dtype=torch.float32)
    with on_device(q):
        kernels.block_mass[(tiles * batch * heads,)](
            *(q, k, result, *q.stride()[:3], *k.stride()[:3]),
            *(heads, heads // k.shape[1], tiles, columns, *counts, num_keys, scale * LOG2E),
            BK=block[1],
            TQ=tq,
            TK=tk,
            D=width,
            PD=max(16, power_of_two(width)),
        )
    per_row = block[0] // tq
    return F.pad(result, (0, 0, 0, -tiles % per_row)).unflatten(2, (-1, per_row)).sum(3)


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    block: tuple[int, int],
    stride: int,
    counts: tuple[int, int],
) -> Tensor:
    """One product and one pass over its result, a few query blocks at a time."""
    from tubelet.kernels.selection import triton_kernels as kernels

    rows, columns = antidiagonal_squares(q, k, stride, counts)
    squares, per_row, per_column = -(-counts[1] // stride), block[0] // stride, block[1] // stride
    batch, heads, num = rows.shape[:3]
    groups = -(-squares // per_column)
    weights = q.new_empty(batch, heads, num, groups, dtype=torch.float32)
    chunk = max(1, WORKSPACE * 4 // (batch * heads * columns.shape[2] * per_row)) * per_row
    with on_device(q):
        for start in range(0, num, chunk):
            part = rows[:, :, start : start + chunk]
            logits = (part @ columns.transpose(-1, -2)).contiguous()
            kernels.group_mass[(logits.shape[:3].numel(),)](
                *(logits, weights, columns.shape[2], squares, groups, scale / stride * LOG2E),
                *(part.shape[2], num, start),
                GROUP=per_column,
                WIDTH=max(per_column, power_of_two(squares)),
                num_warps=8,
            )
    sums = F.pad(weights, (0, 0, 0, -num % per_row)).unflatten(2, (-1, per_row)).sum(3)
    starts = torch.arange(0, num, per_row, device=q.device)
    return sums / (num - starts).clamp(max=per_row)[:, None]


def above(score: Tensor, wanted: float) -> Tensor:
    """Entries above a threshold: the `wanted`-th highest if an int, else that share of the sum."""
    from tubelet.kernels.selection import triton_kernels as kernels

    score = score.contiguous()
    columns = score.shape[-1]
    rows = score.numel() // columns
    kept = torch.empty_like(score, dtype=torch.bool)
    by_mass = isinstance(wanted, float)
    with on_device(score):
        if columns > LONG:
            _above_in_long_rows(score, kept, wanted, rows, columns)
        else:
            kernels.keep_above[(rows,)](
                *(score, kept.view(torch.uint8), wanted, columns),
                BY_MASS=by_mass,
                CHUNK=max(16, power_of_two(columns)),
            )
    return kept


def _above_in_long_rows(
    score: Tensor, kept: Tensor, wanted: float, rows: int, columns: int
) -> None:
    from tubelet.kernels.selection import triton_kernels as kernels

    segments = -(-columns // LONG)
    worth = torch.float32 if isinstance(wanted, float) else torch.int32
    sums = torch.empty(PASSES, rows, segments, 16, dtype=worth, device=score.device)
    found = torch.empty(PASSES, rows, dtype=torch.int32, device=score.device)
    total = torch.empty(rows, dtype=torch.float32, device=score.device)
    for number in range(PASSES):
        kernels.keep_above_pass[(rows * segments,)](
            *(score, kept.view(torch.uint8), sums, found, total, wanted),
            *(columns, rows, segments, number),
            BY_MASS=isinstance(wanted, float),
            FIRST=number == 0,
            LAST=number == PASSES - 1,
            CHUNK=LONG,
            SEGMENTS=power_of_two(segments),
            num_warps=8,
        )


def max_min(x: Tensor, k: int, weight: Tensor | None) -> Tensor:
    """All distances first, then one program per row takes all its `k` steps, each of which reads
    one row of the distances.

    Distances keep float32 while they take up to `DISTANCES` bytes, and float16 beyond.
    """
    from tubelet.kernels.selection import triton_kernels as kernels

    batch, num = x.shape[:2]
    wide = batch * num * num * 4 <= DISTANCES
    dtype = torch.float32 if wide else torch.float16
    distance = torch.empty(batch, num, num, dtype=dtype, device=x.device)
    nearest = torch.empty(batch, num, device=x.device)
    for start, part in other_distances(x):
        rows = slice(start, start + part.shape[1])
        distance[:, rows] = part
        nearest[:, rows] = part.amin(2)
    weight = None if weight is None else weight.float().contiguous()
    first = (nearest if weight is None else nearest * weight).argmax(1)
    chosen = torch.zeros(batch, num, dtype=torch.bool, device=x.device)
    width = max(16, power_of_two(num))
    with on_device(x):
        kernels.max_min[(batch,)](
            *(distance, distance if weight is None else weight, first, chosen.view(torch.uint8)),
            *(num, k),
            WEIGHTED=weight is not None,
            WIDTH=width,
            num_warps=min(32, max(1, width // 512)),
        )
    return chosen


def row_totals(q: Tensor, k: Tensor, places: Tensor, scale: float) -> Tensor:
    """One pass over the logits, in float32."""
    from tubelet.kernels.selection import triton_kernels as kernels

    q, k = _along_channels(q), _along_channels(k)
    (heads, rows, width), (_, tile) = q.shape, tile_sides(q.shape[2], q.element_size())
    totals = torch.empty(heads, rows, device=q.device)
    with on_device(q):
        kernels.row_totals[(heads * -(-rows // tile),)](
            *(q, k, places.int(), totals, *q.stride()[:2], *k.stride()[:2]),
            *(heads // k.shape[0], rows, k.shape[1], scale * LOG2E),
            TQ=tile,
            TK=tile,
            D=width,
            PD=max(16, power_of_two(width)),
        )
    return totals


def received(
    q: Tensor, k: Tensor, places: Tensor, scale: float, totals: Tensor, weight: Tensor | None
) -> Tensor:
    """One more pass over the logits, key by key."""
    from tubelet.kernels.selection import triton_kernels as kernels

    q, k = _along_channels(q), _along_channels(k)
    (heads, rows, width), num = q.shape, k.shape[1]
    kept, walked = tile_sides(q.shape[2], q.element_size())
    starts = torch.arange(0, num, kept, device=q.device, dtype=torch.int32)
    places = places.int()
    first = torch.searchsorted(places, starts, out_int32=True)
    found = torch.empty(heads, num, device=q.device)
    weight = totals if weight is None else weight.float().contiguous()
    with on_device(q):
        kernels.received[(heads * len(starts),)](
            *(q, k, places, first, totals.contiguous(), weight, found),
            *(*q.stride()[:2], *k.stride()[:2], heads // k.shape[0], rows, num, scale * LOG2E),
            WEIGHTED=weight is not totals,
            TQ=walked,
            TK=kept,
            D=width,
            PD=max(16, power_of_two(width)),
        )
    return found


def tile_sides(width: int, size: int) -> tuple[int, int]:
    """`KEPT` and `WALKED`, smaller where `width` numbers of `size` bytes are more than 256."""
    more = max(1, power_of_two(width) * size // 256)
    return KEPT // more, WALKED // more


def _along_channels(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, R] and ascending indices [B, H, R, C] of the True entries."""
    from tubelet.kernels.selection import triton_kernels as kernels

    kept = kept.contiguous()
    columns = kept.shape[3]
    counts = torch.empty(kept.shape[:3], dtype=torch.int32, device=kept.device)
    indices = torch.zeros(kept.shape, dtype=torch.int32, device=kept.device)
    with on_device(kept):
        kernels.lists[(counts.numel(),)](
            *(kept.view(torch.uint8), counts, indices, columns),
            CHUNK=min(2048, max(16, power_of_two(columns))),
        )
    return counts, indices
