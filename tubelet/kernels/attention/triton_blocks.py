"""Block lists in Triton: NVIDIA from Ampere on, and AMD GPUs.

Takes any pair of block sizes that are multiples of 16, any head width up to 256, strided inputs,
a bias per key, and causal calls. With TRITON_INTERPRET=1 it runs on the CPU, slowly, for tests.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.causal import CausalLists, places_of, spans
from tubelet.kernels.triton_support import on_device, power_of_two, unavailable

WIDEST = 256
"""Head width beyond which a tile does not fit into shared memory."""

TILES = {True: {64: (128, 64), 128: (128, 64), 256: (64, 32)},
         False: {64: (64, 32), 128: (64, 32), 256: (32, 16)}}  # fmt: skip
"""Largest (query, key) tile by half precision or not, and padded head width."""

SHARED_MEMORY = 64 * 1024
"""Bytes of shared memory per program assumed where the device does not tell: AMD's."""

LISTED = 1024
"""Entries of a list that a program looks at together."""


def refuses(call: Call) -> str | None:
    """Why these inputs cannot run here, or None."""
    if call.mask is None:
        return "the Triton kernel is for block lists only"
    reason = _refuses_tensors(call)
    if reason is None and any(size % 16 for size in call.mask.block):
        return f"the Triton kernel wants blocks that are multiples of 16, got {call.mask.block}"
    return reason


def _refuses_tensors(call: Call) -> str | None:
    if (reason := unavailable(call.q.device)) is not None:
        return reason
    if call.q.device.type == "cpu" and call.q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernel takes float16, bfloat16 and float32, not {call.q.dtype}"
    if max(call.q.shape[3], call.v.shape[3]) > WIDEST:
        return f"the Triton kernel takes heads up to {WIDEST} wide"
    if call.wants_gradient:
        return "the Triton kernel has no backward pass; use torch.no_grad()"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Block-list attention."""
    q, v = call.q, call.v
    batch, heads, num, _ = q.shape
    out = q.new_empty(batch, num, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, num, dtype=torch.float32)
    _attend(call, causal_lists(call) if call.causal else None, out, lse, continued=False)
    return out, lse


def add_partial(call: Call, causal: CausalLists, out: Tensor, lse: Tensor) -> None:
    """Add the blocks that queries see in part to a result of those they see whole, in place.

    Args:
        call: A causal call that `refuses` takes.
        causal: Its lists.
        out, lse: [B, H, N, E] in q's dtype, rows without gaps, and [B, H, N] contiguous float32.
    """
    _attend(call, causal, out, lse, continued=True)


def causal_lists(call: Call) -> CausalLists:
    """As in `causal`, in one pass over the lists."""
    from tubelet.kernels.attention import triton_kernels

    mask, places = call.mask, places_of(call).contiguous()
    assert mask is not None
    queries, keys = spans(mask, places)
    counts = mask.counts.contiguous()
    indices = mask.indices if mask.indices.stride(3) == 1 else mask.indices.contiguous()
    batch, heads = counts.shape[0], max(counts.shape[1], len(places))
    rows, columns = mask.grid[0], indices.shape[3]
    lengths, whole = (counts.new_empty(batch, heads, rows) for _ in range(2))
    lists = indices.new_zeros(batch, heads, rows, columns)
    with on_device(counts):
        triton_kernels.causal_lists[(batch * heads * rows,)](
            *(counts, indices, *queries, *keys, lengths, whole, lists),
            *(_shared_steps(counts)[:2] + _shared_steps(indices)[:3]),
            *(_shared_steps(x)[0] for x in (queries[0], keys[0])),
            *(heads, rows, columns),
            CHUNK=max(16, min(LISTED, 1 << max(columns - 1, 0).bit_length())),
        )
    kept = replace(mask, counts=lengths, indices=lists)
    return CausalLists(mask=kept, whole=whole, places=places)


def _attend(
    call: Call, causal: CausalLists | None, out: Tensor, lse: Tensor, *, continued: bool
) -> None:
    from tubelet.kernels.attention.triton_kernels import block_attention

    mask = call.mask
    assert mask is not None
    mask = mask.tail_last() if causal is None else causal.mask
    (q, k, v), bias = (_rowwise(x) for x in (call.q, call.k, call.v)), call.key_bias
    counts, indices = (x.contiguous() for x in (mask.counts, mask.indices))
    if indices.shape[3] == 0:
        indices = indices.new_zeros(*indices.shape[:3], 1)
    bias = None if bias is None else bias.float().contiguous()
    batch, heads, num, _ = q.shape
    # Never read where the call is not causal.
    whole, places = (counts, counts) if causal is None else (causal.whole, causal.places)
    tiles, shape = _shapes(q, v, mask.block)
    with on_device(q):
        block_attention[(-(-num // tiles["TQ"]) * batch * heads,)](
            *(q, k, v, out, lse, counts, indices, lse if bias is None else bias, whole, places),
            *(step for x in (q, k, v, out) for step in x.stride()[:3]),
            *(_shared_steps(counts)[:2] + _shared_steps(indices)[:3]),
            0 if bias is None else bias.stride(0),
            *(*_shared_steps(whole)[:2], _shared_steps(places)[0]),
            *(heads, call.groups, num, mask.num_keys, call.scale * math.log2(math.e)),
            BQ=mask.block[0],
            BK=mask.block[1],
            BIASED=bias is not None,
            TAIL=mask.num_keys % mask.block[1] != 0,
            CAUSAL=causal is not None,
            CONTINUED=continued,
            **tiles,
            **shape,
            **_launch(q, tiles, shape),
        )


def adds_left_out(call: Call) -> bool:
    """Whether `add_left_out` takes this call; it asks nothing of the size of key blocks."""
    assert call.mask is not None
    return call.mask.block[0] % 16 == 0 and _refuses_tensors(call) is None


def add_left_out(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Let the blocks that `mask` leaves out count by their means.

    Args:
        out, lse: [B, H, N, E] and [B, H, N] of the blocks that were computed.
        q: [B, H, N, D].
        k_mean, v_mean: [B, G, columns, D] and [.., E] means of the key blocks, in q's dtype.
        mask: The blocks that were computed; query blocks are multiples of 16.
        scale: Factor on the logits.

    Returns:
        Output and log-sum-exp over all keys.
    """
    from tubelet.kernels.attention import triton_kernels

    q, out, lse = _rowwise(q), _rowwise(out).clone(), lse.float().clone().contiguous()
    k_mean, v_mean = k_mean.contiguous(), v_mean.contiguous()
    table = mask.to_dense().view(torch.uint8).contiguous()
    batch, heads, num, _ = q.shape
    columns = mask.grid[1]
    tail = mask.num_keys - (columns - 1) * mask.block[1]
    tiles, shape = _shapes(q, v_mean, (mask.block[0], 64))
    with on_device(q):
        triton_kernels.add_left_out[(-(-num // tiles["TQ"]) * batch * heads,)](
            *(q, k_mean, v_mean, table, out, lse),
            *(step for x in (q, out) for step in x.stride()[:3]),
            *_shared_steps(table)[:2],
            *(heads, heads // k_mean.shape[1], num, columns, scale * math.log2(math.e)),
            *(math.log2(mask.block[1]), math.log2(tail)),
            BQ=mask.block[0],
            **tiles,
            **shape,
            **_launch(q, tiles, shape),
        )
    return out, lse


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _shared_steps(x: Tensor) -> list[int]:
    """Strides, with 0 along batch and heads where one entry serves all."""
    return [0 if x.shape[axis] == 1 and axis < 2 else x.stride(axis) for axis in range(x.ndim)]


def _shapes(q: Tensor, v: Tensor, block: tuple[int, int]) -> tuple[dict[str, int], dict[str, int]]:
    widths = q.shape[3], v.shape[3]
    padded = [max(16, power_of_two(width)) for width in widths]
    largest = TILES[q.element_size() == 2][max(64, *padded)]
    # The largest power of two that divides the block.
    sizes = [min(most, size & -size) for most, size in zip(largest, block, strict=True)]
    tiles = {"TQ": sizes[0], "TK": sizes[1]}
    return tiles, {"D": widths[0], "PD": padded[0], "E": widths[1], "PE": padded[1]}


def _launch(q: Tensor, tiles: dict[str, int], shape: dict[str, int]) -> dict[str, int]:
    """Warps, and as many pipeline stages, up to three, as fit into shared memory."""
    if q.device.type == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(q.device)
    room = getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)
    row = (shape["PD"] + shape["PE"]) * q.element_size()
    stages = (room - tiles["TQ"] * row // 2) // (tiles["TK"] * row)
    return {"num_warps": 8 if tiles["TQ"] >= 128 else 4, "num_stages": max(1, min(3, stages))}
