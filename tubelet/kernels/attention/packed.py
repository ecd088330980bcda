"""Attention over samples of different lengths, laid out one after the other."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.kernels.attention.api import attention
from tubelet.kernels.attention.channels import aligned, padded_to, with_bias_channels


def packed_attention(
    q: Float[Tensor, "1 h n d"],
    k: Float[Tensor, "1 h n d"],
    v: Float[Tensor, "1 h n d"],
    lengths: Sequence[int],
    *,
    scale: float,
    key_bias: Float[Tensor, "1 n"] | None = None,
) -> tuple[Float[Tensor, "1 h n d"], Float[Tensor, "1 h n"]]:
    """Each sample attends to itself only; no padding is computed.

    On CUDA in half precision this is one variable-length kernel, elsewhere one fused call per
    sample.

    Args:
        q, k, v: Samples packed along N.
        lengths: Tokens of each sample, each >= 1, summing to N.
        scale: Factor on the logits.
        key_bias: Added to every logit of a key, float32.

    Returns:
        Output and log-sum-exp, packed likewise.

    Raises:
        ShapeError: The lengths do not sum to N.
    """
    if sum(lengths) != q.shape[2] or min(lengths) < 1:
        raise ShapeError(f"lengths {list(lengths)} do not fill {q.shape[2]} packed tokens")
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(q, k, v, tuple(lengths), scale, key_bias)
    parts = [x.split(list(lengths), dim=2) for x in (q, k, v)]
    biases = [None] * len(lengths) if key_bias is None else key_bias.split(list(lengths), dim=1)
    results = [
        attention(*sample, scale=scale, key_bias=bias)
        for *sample, bias in zip(*parts, biases, strict=True)
    ]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _variable_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    width = v.shape[-1]
    if key_bias is not None:
        q, k = with_bias_channels(q, k, key_bias, scale)
    # This kernel wants one width for all three.
    wide = aligned(q.shape[-1])
    rows = [padded_to(x, wide)[0].transpose(0, 1) for x in (q, k, v)]
    starts, longest = _starts(lengths, q.device), max(lengths)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.contiguous() for x in rows),
        starts,
        starts,
        longest,
        longest,
        0.0,
        False,
        False,
        scale=scale,
    )
    return out.transpose(0, 1)[None, ..., :width], lse[None]


@lru_cache(maxsize=16)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # One copy to the device per set of lengths, not one per layer, and the host waits for none.
    # A tensor made in inference mode could not serve a later training step.
    with torch.inference_mode(False):
        starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int()
        return starts.pin_memory().to(device, non_blocking=True)
