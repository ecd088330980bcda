"""torch's FlexAttention: block lists on CPU and GPU.

On CUDA it is compiled on first use. On the CPU torch's compiled FlexAttention returns no
log-sum-exp, so the uncompiled one runs, which is correct but materialises the map.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask


def refuses(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, causal: bool) -> str | None:
    """Why these inputs cannot run here, or None."""
    if q.device.type not in ("cpu", "cuda"):
        return f"FlexAttention is not tested on device {q.device.type!r}"
    if q.dtype == torch.float64:
        return "FlexAttention takes no float64"
    if (
        q.device.type == "cpu"
        and any(x.requires_grad for x in (q, k, v))
        and torch.is_grad_enabled()
    ):
        return "FlexAttention has no backward pass on the CPU; use torch.no_grad()"
    if mask is not None and q.device.type == "cuda" and any(size % 128 for size in mask.block):
        return f"FlexAttention on CUDA wants blocks that are multiples of 128, got {mask.block}"
    if causal and mask is not None:
        return "causal block lists are not supported here; put causality into the lists"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    mask: BlockMask | None,
) -> tuple[Tensor, Tensor]:
    """FlexAttention with the block lists of `mask`, or dense without one."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    block_mask = None if mask is None else mask.to_flex()
    if causal:
        block_mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=str(q.device)
        )
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
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out, aux.lse


@cache
def _function(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cpu":
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # It warns that it materialises the map, which this module's docstring says already.
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return flex_attention
