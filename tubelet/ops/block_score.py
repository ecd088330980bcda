"""Block scores: how much attention a query block gives to a key block, estimated or measured."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.grid import TokenGrid
from tubelet.core.tensors import take_tokens
from tubelet.ops.order import tile_members

WORKSPACE = 2**26
"""Entries of the largest intermediate table; longer work is done in parts."""


def block_means(
    x: Float[Tensor, "b h n d"], block: int, order: Int[Tensor, "1 n"] | None, num: int
) -> Float[Tensor, "b h m d"]:
    """Mean of each block of the first `num` tokens in the given order, at least float32.

    Args:
        x: Queries or keys in sequence order.
        block: Tokens per block; the last one may have fewer.
        order: Position of each ordered token; None for the order of the sequence.
        num: Tokens that take part. What is behind them, padding included, is not read.
    """
    return _block_sums(x, block, order, num) / _block_sizes(num, block, x.device)[:, None]


def block_similarity(
    x: Float[Tensor, "b h n d"], block: int, order: Int[Tensor, "1 n"] | None, num: int
) -> Float[Tensor, "b h m"]:
    """Mean cosine between the tokens of a block, all pairs, in [-1, 1].

    It is the squared length of the mean of the unit vectors; a block of one token has 1.
    Arguments as for `block_means`.
    """
    return block_means(F.normalize(x.float(), dim=-1), block, order, num).square().sum(-1)


def tile_means(
    x: Float[Tensor, "b h n d"], grid: TokenGrid, tile: tuple[int, int, int]
) -> Float[Tensor, "b h tiles d"]:
    """Mean of the video tokens of each tile, float32; tiles in raster order, those at the edges
    of what they have."""
    members, taken = tile_members(grid, tile, x.device)
    held = x.index_select(2, members.flatten() + grid.before).unflatten(2, members.shape)
    held = held.masked_fill(~taken[..., None], 0)
    return held.sum(3, dtype=torch.float32) / taken.sum(1)[:, None]


def pooled_scores(
    q: Float[Tensor, "b h m d"], k: Float[Tensor, "b g n d"], scale: float
) -> Float[Tensor, "b h m n"]:
    """Scaled products of block means; query heads are a multiple of key heads."""
    return q @ _for_heads(k, q.shape[1]).transpose(-1, -2) * scale


def sub_block_scores(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b g n d"],
    scale: float,
    parts: tuple[int, int],
) -> Float[Tensor, "b h i j"]:
    """log sum exp of the scaled products of all pairs of sub-block means of two blocks.

    It estimates the un-normalised softmax mass of a block pair: a few strong keys count, which
    the mean over a whole block would hide.

    Args:
        q, k: Means of sub-blocks, as from `block_means`.
        scale: Factor on the products.
        parts: Sub-blocks per (query, key) block; the last block may have fewer.

    Source:
        SubBlock estimator of SGLang (pull request 34148).
    """
    num = q.shape[2]
    rows = -(-num // parts[0])
    q = F.pad(q, (0, 0, 0, rows * parts[0] - num))
    k = _for_heads(k, q.shape[1])
    total = None
    # One query part at a time keeps the table `parts[1]` times the result, not the product.
    for part in range(parts[0]):
        logits = q[:, :, part :: parts[0]] @ k.transpose(-1, -2) * scale
        scores = _grouped(logits, parts[1], -torch.inf).logsumexp(-1)
        # The last block may lack this part.
        live = torch.arange(part, rows * parts[0], parts[0], device=q.device) < num
        scores = scores.masked_fill(~live[:, None], -torch.inf)
        total = scores if total is None else torch.logaddexp(total, scores)
    assert total is not None
    return total


def antidiagonal_mass(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    scale: float,
    block: tuple[int, int],
    stride: int,
    counts: tuple[int, int],
) -> Float[Tensor, "b h rows columns"]:
    """Softmax mass of block pairs, estimated from the antidiagonals of stride x stride squares.

    Each square is scored by the sum of its antidiagonal, divided by the stride; squares of a row
    share one softmax, whose weights are summed per block. Every vertical and every slanted line
    crosses the antidiagonal, so stripes are seen at 1 / stride of the cost.

    Args:
        q, k: Tokens in block order.
        scale: Factor on the logits.
        block: Tokens per (query, key) block, multiples of `stride`.
        stride: Side of the squares in tokens.
        counts: Query and key tokens that take part.

    Returns:
        Mean over the rows of squares of each block; rows sum to 1.

    Source:
        XAttention (Xu et al., 2025, arXiv:2503.16428).
    """
    rows, columns = antidiagonal_squares(q, k, stride, counts)
    per_row, per_column = block[0] // stride, block[1] // stride
    squares = -(-counts[1] // stride)
    num = -(-rows.shape[2] // per_row)
    chunk = max(1, WORKSPACE // max(1, rows[:, :, :per_row, 0].numel() * columns.shape[2]))
    parts = []
    for start in range(0, num, chunk):
        part = rows[:, :, start * per_row : (start + chunk) * per_row]
        logits = (part @ columns.transpose(-1, -2))[..., :squares]
        weights = logits.float().mul(scale / stride).softmax(-1)
        mass = _grouped(weights, per_column, 0.0).sum(-1)
        parts.append(_row_means(mass, per_row))
    return torch.cat(parts, dim=2)


def antidiagonal_squares(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], stride: int, counts: tuple[int, int]
) -> tuple[Float[Tensor, "b h s e"], Float[Tensor, "b h r e"]]:
    """Rows and columns of `antidiagonal_mass`, whose products are the antidiagonal sums.

    Reversing the queries within a square lines up its antidiagonal with the keys. Zeros fill a
    last square that is not full, and add columns up to a multiple of 8: GPU libraries multiply
    several times slower into rows that are not aligned.
    """
    rows = _squares(q[:, :, : counts[0]], stride).flip(3).flatten(3)
    columns = F.pad(k[:, :, : counts[1]], (0, 0, 0, -counts[1] % (8 * stride)))
    return rows, _for_heads(_squares(columns, stride).flatten(3), q.shape[1])


def block_mass(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    scale: float,
    block: tuple[int, int],
    counts: tuple[int, int],
    num_keys: int,
) -> Float[Tensor, "b h rows columns"]:
    """Exact softmax mass of block pairs: the sum of exp(z - lse) over their tokens.

    Unfused, in parts of bounded memory: about 40 bytes of traffic per pair of tokens, which on a
    GPU is ten fused calls or more; meant for a few steps of a run.

    Args:
        q, k: Tokens in block order.
        scale: Factor on the logits.
        block: Tokens per (query, key) block.
        counts: Query and key tokens whose blocks are returned.
        num_keys: Keys that share the softmax, at least counts[1].

    Returns:
        float32; a row sums to the queries in its block when all keys are in blocks.

    Source:
        AdaSpa (Xia et al., 2025, arXiv:2502.21079).
    """
    keys = _for_heads(k[:, :, :num_keys], q.shape[1]).transpose(-1, -2)
    size, sides = q.shape[:2].numel() * num_keys * block[0], []
    chunk = max(1, WORKSPACE // size) * block[0]
    for start in range(0, counts[0], chunk):
        part = q[:, :, start : min(start + chunk, counts[0])]
        weights = (part @ keys).float().mul(scale).softmax(-1)[..., : counts[1]]
        mass = _grouped(weights, block[1], 0.0).sum(-1)
        sides.append(_row_sums(mass, block[0]))
    return torch.cat(sides, dim=2)


def ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """`x` [B, H, N, D] with its tokens in the given order."""
    return x if order is None else take_tokens(x, order[0])


def _block_sums(x: Tensor, block: int, order: Tensor | None, num: int) -> Tensor:
    x = x[:, :, :num] if order is None else take_tokens(x, order[0, :num])
    x = F.pad(x, (0, 0, 0, -num % block))
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.unflatten(2, (-1, block)).sum(3, dtype=wide)


def _block_sizes(num: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, num, block, device=device)
    return (num - starts).clamp(max=block).float()


def _for_heads(k: Tensor, heads: int) -> Tensor:
    groups = heads // k.shape[1]
    return k.repeat_interleave(groups, dim=1) if groups > 1 else k


def _squares(x: Tensor, stride: int) -> Tensor:
    """[B, H, squares, stride, D]; a last square that is not full is filled with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % stride)).unflatten(2, (-1, stride))


def _grouped(x: Tensor, size: int, fill: float) -> Tensor:
    """The last axis in groups of `size`, [..., groups, size]."""
    return F.pad(x, (0, -x.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def _row_sums(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3)


def _row_means(x: Tensor, size: int) -> Tensor:
    return _row_sums(x, size) / _block_sizes(x.shape[2], size, x.device)[:, None]
