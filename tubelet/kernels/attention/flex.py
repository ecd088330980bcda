"""torch's FlexAttention: block lists on CPU and GPU.

On CUDA it is compiled on first use. On the CPU torch's compiled FlexAttention returns no
log-sum-exp, so the uncompiled one runs, which is correct but materialises the map.
"""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.causal import causal_lists

DENSE = 128
"""Tokens per block of dense causal calls."""


def refuses(call: Call) -> str | None:
    """Why these inputs cannot run here, or None."""
    device, mask = call.q.device.type, call.mask
    if device not in ("cpu", "cuda"):
        return f"FlexAttention is not tested on device {device!r}"
    if call.q.dtype == torch.float64:
        return "FlexAttention takes no float64"
    if device == "cpu" and call.wants_gradient:
        return "FlexAttention has no backward pass on the CPU; use torch.no_grad()"
    if mask is not None and device == "cuda" and any(size % 128 for size in mask.block):
        return f"FlexAttention on CUDA wants blocks that are multiples of 128, got {mask.block}"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """FlexAttention with the block lists of the mask, or dense without one."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v, key_bias = call.q, call.k, call.v, call.key_bias
    uncompiled = call.mask is not None and q.device.type == "cpu"
    if uncompiled:
        v = torch.where(v.isfinite(), v, 0.0)
    block_mask = None if call.mask is None else call.mask.to_flex()
    if call.causal and call.mask is not None:
        block_mask = _causal_mask(call)
    elif call.causal:
        block_mask = _triangle(q.shape[2], q.device)
    score_mod = None if key_bias is None else (lambda s, b, h, i, j: s + key_bias[b, j])
    # Past its limit of recompilations torch would fall back to materialising the map, or with
    # `fullgraph` refuse; models that shrink their sequence meet many shapes.
    with torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096):
        out, aux = _function(q.device.type)(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=call.scale,
            enable_gqa=call.groups > 1,
            return_aux=AuxRequest(lse=True),
        )
    return out.masked_fill(_spoiled(call), torch.nan) if uncompiled else out, aux.lse


@cache
def _not_later() -> Any:
    # One function for all calls: torch would compile again for another.
    return lambda b, h, query, key: query >= key


def _triangle(num: int, device: torch.device) -> Any:
    """Ordinary causal attention; torch's own function would ask about every pair of tokens."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    blocks = -(-num // DENSE)
    places = torch.arange(blocks, dtype=torch.int32, device=device)
    every = places.expand(1, 1, blocks, -1)
    asked, whole = torch.ones_like(places)[None, None], places[None, None].clone()
    diagonal = (places[:, None] + every).remainder(blocks)
    if num % DENSE:
        # All of a ragged last row is asked about, in the order in which torch lists blocks.
        asked[..., -1], whole[..., -1] = blocks, 0
        diagonal[..., -1, :] = places
    return FlexBlockMask.from_kv_blocks(
        asked,
        diagonal.to(torch.int32).contiguous(),
        whole,
        every.contiguous(),
        BLOCK_SIZE=DENSE,
        mask_mod=_not_later(),
        seq_lengths=(num, num),
    )


def _causal_mask(call: Call) -> Any:
    """The lists of a causal call; only what is not seen whole asks about single tokens."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    causal = causal_lists(call)
    mask, places = causal.mask, causal.places
    # Blocks of a ragged last row are asked about too.
    whole = causal.whole.clone()
    if mask.num_queries % mask.block[0]:
        whole[:, :, -1] = 0
    columns = mask.grid[1]
    indices = F.pad(mask.indices, (0, columns - mask.indices.shape[3]))
    slots = torch.arange(columns, device=whole.device)
    behind = (slots + whole[..., None]).clamp(max=columns - 1)
    dense, (bq, bk) = mask.to_dense(), mask.block
    # Factors of 0 send every sample or head to what is shared.
    batch, head, own = (int(n > 1) for n in (*dense.shape[:2], places.shape[0]))
    return FlexBlockMask.from_kv_blocks(
        mask.counts - whole,
        indices.gather(3, behind),
        whole,
        indices,
        BLOCK_SIZE=mask.block,
        mask_mod=lambda b, h, q, k: (
            dense[b * batch, h * head, q // bq, k // bk]
            & (places[h * own, q] >= places[h * own, k])
        ),
        seq_lengths=(mask.num_queries, mask.num_keys),
    )


def _spoiled(call: Call) -> Tensor:
    """Outputs that see a value which is not finite, [B, H, N, E].

    The uncompiled function multiplies values of skipped blocks by 0, which leaves NaN.
    """
    mask = causal_lists(call).mask if call.causal else call.mask
    assert mask is not None
    (bq, bk), (_, columns) = mask.block, mask.grid
    bad = F.pad(~call.v.isfinite(), (0, 0, 0, columns * bk - mask.num_keys))
    bad = bad.unflatten(2, (columns, bk)).any(3).repeat_interleave(call.groups, dim=1)
    seen = mask.to_dense().float() @ bad.float() > 0
    return seen.repeat_interleave(bq, dim=2)[:, :, : mask.num_queries]


@cache
def _function(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cpu":
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # It warns that it materialises the map, which this module's docstring says already.
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return flex_attention
