"""Block means in one read of the tokens, in any order, without a reordered copy."""

import torch
from torch import Tensor

from tubelet.kernels.triton_support import on_device, unavailable


def refuses(x: Tensor) -> str | None:
    """Why these inputs cannot run here, or None."""
    if (reason := unavailable(x.device)) is not None:
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernel takes float16, bfloat16 and float32, not {x.dtype}"
    if x.requires_grad and torch.is_grad_enabled():
        return "the Triton kernel has no backward pass; use torch.no_grad()"
    return None


def run(x: Tensor, block: int, order: Tensor | None, num: int) -> Tensor:
    """See `tubelet.kernels.pool.block_means`."""
    from tubelet.kernels.pool.triton_kernels import block_means

    batch, heads, _, width = x.shape
    blocks = -(-num // block)
    means = x.new_empty(batch, heads, blocks, width, dtype=torch.float32)
    places = None if order is None else order.contiguous()
    with on_device(x):
        block_means[(blocks * batch * heads,)](
            *(x, x if places is None else places, means),
            *x.stride(),
            0 if places is None or places.shape[0] == 1 else places.stride(0),
            *(heads, num, blocks, block),
            ORDERED=places is not None,
            TILE=min(64, 1 << (block - 1).bit_length()),
            D=width,
            PD=1 << (width - 1).bit_length(),
        )
    return means
