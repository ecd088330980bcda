"""Block lists on the CPU: the key blocks of a few query blocks are gathered, then attended to at
once by torch's fused kernel.

The query blocks of a batch are taken in the order of their list lengths, as many at a time as
keep their keys and values in the cache. Skipped blocks are never read. Causal calls add a mask of
single tokens where a diagonal is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.causal import CausalLists, causal_lists
from tubelet.kernels.attention.channels import padded_to

CACHE = 4 * 2**20
"""Bytes of gathered keys and values per fused call; from 1 to 8 MiB the speed is the same."""


def refuses(call: Call) -> str | None:
    """Why these inputs cannot run here, or None."""
    if call.mask is None:
        return "the cpu kernel is for block lists only"
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device.type!r}"
    if call.wants_gradient:
        return "the cpu kernel has no backward pass; use torch.no_grad()"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Fused attention over gathered key blocks."""
    causal = causal_lists(call) if call.causal else None
    mask = call.mask if causal is None else causal.mask
    assert mask is not None
    bq, rows = mask.block[0], mask.grid[0]
    batch, heads, num, _ = call.q.shape
    blocks = _Blocks.of(call, mask, causal)
    queries = _blocked(call.q, bq, blocks.keys.shape[-1])
    shape = (batch * heads * rows, bq)
    out = call.q.new_zeros(*shape, blocks.values.shape[-1])
    lse = torch.full(shape, -torch.inf, dtype=torch.promote_types(call.q.dtype, torch.float32))
    for some, listed, extra in _batches(call, mask, blocks):
        keys, values = (
            x.index_select(0, listed.flatten()).view(len(some), 1, -1, x.shape[-1])
            for x in (blocks.keys, blocks.values)
        )
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[some][:, None], keys, values, attn_mask=extra, scale=call.scale
        )
        blind = None if extra is None else extra.isneginf().all(-1)[:, 0]
        out[some] = part[:, 0] if blind is None else part[:, 0].masked_fill(blind[..., None], 0)
        lse[some] = (
            part_lse[:, 0] if blind is None else part_lse[:, 0].masked_fill(blind, -torch.inf)
        )
    out = out.view(batch, heads, rows * bq, -1)[:, :, :num, : call.v.shape[3]]
    return out, lse.view(batch, heads, -1)[:, :, :num]


@dataclass(frozen=True)
class _Blocks:
    """Keys, values and biases cut into blocks, the ragged tail filled up with zeros.

    Args:
        keys, values: [B * G * columns, bk, width].
        bias: [B * columns, bk], -inf past the last key; None when nothing is added to any key.
        biased: Whether it holds more than that.
        whole: [B, H, rows] how many of a causal list are seen whole; None for other calls.
        query_places, key_places: [H or 1, rows, bq] and [H or 1, columns, bk] of causal calls.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    biased: bool
    whole: Tensor | None = None
    query_places: Tensor | None = None
    key_places: Tensor | None = None

    @classmethod
    def of(cls, call: Call, mask: BlockMask, causal: CausalLists | None) -> "_Blocks":
        bk, missing = mask.block[1], -mask.num_keys % mask.block[1]
        width = max(call.k.shape[3], call.v.shape[3])
        bias = call.key_bias
        if bias is None and missing:
            bias = call.q.new_zeros(call.q.shape[0], mask.num_keys, dtype=torch.float32)
        if bias is not None:
            dtype = torch.promote_types(call.q.dtype, torch.float32)
            bias = F.pad(bias.to(dtype), (0, missing), value=-torch.inf).view(-1, bk)
        keys, values = (_blocked(x, bk, width) for x in (call.k, call.v))
        blocks = cls(keys, values, bias, call.key_bias is not None)
        if causal is None:
            return blocks
        never, (bq, bk) = causal.places.shape[1], mask.block
        queries = F.pad(causal.places, (0, -never % bq), value=never).unflatten(1, (-1, bq))
        seen = F.pad(causal.places[:, : mask.num_keys], (0, missing), value=never)
        return replace(
            blocks,
            whole=causal.whole.expand(call.q.shape[0], call.q.shape[1], -1).flatten(),
            query_places=queries.expand(call.q.shape[1], -1, -1),
            key_places=seen.unflatten(1, (-1, bk)).expand(call.q.shape[1], -1, -1),
        )


def _blocked(x: Tensor, block: int, width: int) -> Tensor:
    """[B, H, N, D] as [B * H * blocks, block, width], with zeros where it is too small."""
    x = F.pad(padded_to(x, width), (0, 0, 0, -x.shape[2] % block))
    return x.reshape(-1, block, width)


def _batches(
    call: Call, mask: BlockMask, blocks: _Blocks
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Query blocks, the key blocks listed for each [R, L], and what is added to their logits."""
    batch, heads = call.q.shape[:2]
    rows, columns = mask.grid
    counts = mask.counts.expand(batch, heads, rows).flatten()
    lists = mask.indices.expand(batch, heads, rows, -1)
    order = counts.argsort(stable=True)
    lengths = counts[order].tolist()
    bytes_per_block = 2 * blocks.keys[0].numel() * blocks.keys.element_size()
    if blocks.whole is not None:
        bytes_per_block += 4 * mask.block[0] * mask.block[1]
    start = next((i for i, n in enumerate(lengths) if n), len(lengths))
    while start < len(lengths):
        end = min(start + torch.get_num_threads(), len(lengths))
        # All lists of a batch are padded to the longest, its last.
        while end < len(lengths) and (end + 1 - start) * lengths[end] * bytes_per_block <= CACHE:
            end += 1
        some = order[start:end]
        start = end
        longest = lengths[start - 1]
        sample, head = some // (heads * rows), some // rows % heads
        listed = lists[sample, head, some % rows, :longest].long()
        # A shorter list repeats its first entry, a block that the query sees anyway.
        surplus = torch.arange(longest) >= counts[some][:, None]
        listed = torch.where(surplus, listed[:, :1], listed)
        extra = _extra(sample[:, None] * columns + listed, listed, surplus, blocks, columns)
        if blocks.whole is not None and bool((blocks.whole[some] < counts[some]).any()):
            extra = _with_causality(extra, blocks, head, some % rows, listed)
        group = sample * call.k.shape[1] + head // call.groups
        yield some, group[:, None] * columns + listed, extra


def _extra(
    places: Tensor, listed: Tensor, surplus: Tensor, blocks: _Blocks, columns: int
) -> Tensor | None:
    """What is added to the logits, [R, 1, 1, keys]; None for nothing, which is faster."""
    if blocks.bias is None:
        padded = False
        bias = blocks.keys.new_zeros(1, dtype=torch.promote_types(blocks.keys.dtype, torch.float32))
    else:
        padded = blocks.biased or bool((listed == columns - 1).any())
        bias = blocks.bias[places]
    if not padded and not bool(surplus.any()):
        return None
    bias = bias.expand(*listed.shape, blocks.keys.shape[1])
    return bias.masked_fill(surplus[..., None], -torch.inf).flatten(1)[:, None, None]


def _with_causality(
    extra: Tensor | None, blocks: _Blocks, head: Tensor, row: Tensor, listed: Tensor
) -> Tensor:
    """`extra` with -inf at keys later than the query, [R, 1, bq, keys]."""
    assert blocks.query_places is not None
    assert blocks.key_places is not None
    queries = blocks.query_places[head, row][:, :, None]
    keys = blocks.key_places[head[:, None], listed].flatten(1)[:, None]
    dtype = torch.promote_types(blocks.keys.dtype, torch.float32)
    later = torch.zeros(1, dtype=dtype).masked_fill(keys > queries, -torch.inf)[:, None]
    return later if extra is None else later + extra
