"""Dense attention of a few query rows: what a block mask would lose, what a question looks at."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.ops.block_mask import Blocks
from tubelet.ops.block_score import WORKSPACE
from tubelet.ops.score import white_noise


def sampled_rows(
    num: int, rows: int, seed: int, device: torch.device | str | None = None
) -> Int[Tensor, "r"]:
    """Ascending positions in [0, num), one drawn from each of `rows` equal stretches.

    All positions when there are no more than `rows`. No random state and no host sync.
    """
    if num <= rows:
        return torch.arange(num, device=device)
    place = torch.arange(rows, device=device) + white_noise(rows, seed, device)
    return (place * (num / rows)).long().clamp(max=num - 1)


def row_parts(
    rows: Callable[..., Tensor], queries: Sequence[int], softmax: bool = True, most: int = 16
) -> Iterator[Float[Tensor, "h q n"]]:
    """`LayerStatistics.rows` of up to `most` queries at a time, so that a long question needs no
    more memory than a short one."""
    for start in range(0, len(queries), most):
        yield rows(queries[start : start + most], softmax)


def mask_errors(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n e"],
    scale: float,
    rows: Int[Tensor, "r"],
    blocks: Blocks,
    tables: Sequence[Bool[Tensor, "_ _ mq mk"]],
) -> Float[Tensor, "p b h"]:
    """Relative squared error |O_p - O|^2 / |O|^2 of sampled rows under each of several masks.

    The dense rows are computed once in parts of bounded memory; each mask then costs one more
    product with the values.

    Args:
        q, k, v: Tokens in block order.
        scale: Factor on the logits.
        rows: Positions of the sampled queries.
        blocks: Geometry.
        tables: Blocks kept by each mask, exempt ones included; 1 sample or head shares a mask.

    Returns:
        float32. A row without any kept weight counts as zero output.
    """
    heads, groups, keys = q.shape[1], q.shape[1] // k.shape[1], blocks.num_keys
    # Whole groups of query heads share their key head.
    step = max(1, WORKSPACE // max(1, q.shape[0] * len(rows) * keys * groups))
    parts = []
    for start in range(0, k.shape[1], step):
        stop = min(start + step, k.shape[1])
        part = slice(start * groups, stop * groups)
        parts.append(
            _errors(
                q[:, part].index_select(2, rows),
                k[:, start:stop, :keys].repeat_interleave(groups, dim=1),
                v[:, start:stop, :keys].repeat_interleave(groups, dim=1),
                scale,
                [
                    _token_rows(t if t.shape[1] != heads else t[:, part], rows, blocks)
                    for t in tables
                ],
            )
        )
    return torch.cat(parts, dim=2)


def _errors(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: list[Tensor]) -> Tensor:
    # Weights in the precision of the host, sums in float32: ten times faster on a GPU.
    weights = (q @ k.transpose(-1, -2)).float().mul(scale).softmax(-1).to(v.dtype)
    dense = (weights @ v).float()
    norm = dense.square().sum((2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    found = []
    for mask in masks:
        kept = weights * mask
        total = kept.sum(-1, keepdim=True, dtype=torch.float32)
        sparse = (kept @ v).float() / total.clamp(min=torch.finfo(torch.float32).tiny)
        found.append((sparse - dense).square().sum((2, 3)) / norm)
    return torch.stack(found)


def _token_rows(table: Tensor, rows: Tensor, blocks: Blocks) -> Tensor:
    """The mask of single keys for the sampled rows, [B or 1, H or 1, r, keys]."""
    picked = table.index_select(2, rows // blocks.size[0])
    return picked.repeat_interleave(blocks.size[1], dim=3)[..., : blocks.num_keys]
