"""Rotary position embedding: one kernel where it runs, else what hosts compute, step by step."""

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.kernels.triton_support import on_device, power_of_two, takes

ROWS = 16
"""Tokens of one program, which turns all their heads by angles that it reads once."""


def rotary(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "s h d"],
    cos: Float[Tensor, "s d"],
    sin: Float[Tensor, "s d"],
) -> tuple[Float[Tensor, "h s d"], Float[Tensor, "h s d"]]:
    """Queries and keys turned by their positions' angles, as Qwen's vision towers do.

    Channel i is turned together with channel i + d / 2. The arithmetic is float32 without fused
    multiply-adds, so the kernel gives what separate torch operations give, bit for bit.

    Args:
        q, k: Any strides, such as slices of one projection's output.
        cos, sin: Of the angle of each token and channel; computed with in float32.

    Returns:
        Both in the dtype of `q` and `k`, heads first: contiguous from the kernel; a view of
        [s, h, d] on a CPU, in float64 and where gradients are recorded.

    Raises:
        ShapeError: The channels do not come in pairs.
    """
    if q.shape[2] % 2:
        raise ShapeError(f"rotary embedding turns pairs of channels, got {q.shape[2]}")
    cos, sin = cos.float(), sin.float()
    if takes(q, k, cos, sin):
        return _launch(q, k, cos, sin)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype).transpose(0, 1)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from tubelet.kernels.rotary import triton_kernels as kernels

    num, heads, width = q.shape
    results = q.new_empty(heads, num, width), k.new_empty(heads, num, width)
    if num == 0:
        return results
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    # The interpreter takes no compiler options, and fuses nothing.
    options = {"enable_fp_fusion": False} if q.is_cuda else {}
    with on_device(q):
        kernels.rotary[(-(-num // ROWS),)](
            *(q, k, cos.contiguous(), sin.contiguous(), *results),
            *(num, heads, q.stride(0), k.stride(0)),
            Q_HEAD=q.stride(1),
            K_HEAD=k.stride(1),
            ROWS=ROWS,
            HALF=width // 2,
            LANES=power_of_two(width // 2),
            **options,
        )
    return results
