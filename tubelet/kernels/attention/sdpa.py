"""torch's fused scaled-dot-product kernels, called where they return the log-sum-exp.

The public function hides the log-sum-exp, so the per-backend operators are used; a canary test
watches their signatures.
"""

import torch
from torch import Tensor

from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.channels import aligned, padded_to, with_bias_channels

aten = torch.ops.aten


def refuses(call: Call) -> str | None:
    """Why these inputs cannot run here, or None."""
    q, v = call.q, call.v
    if call.mask is not None:
        return "the sdpa kernels take no block lists"
    if q.device.type not in ("cpu", "cuda"):
        return f"no fused kernel with a log-sum-exp is known for device {q.device.type!r}"
    if q.device.type == "cuda" and q.dtype == torch.float64:
        return "the CUDA kernels take no float64"
    if v.shape[-1] != q.shape[-1]:
        return f"key width {q.shape[-1]} and value width {v.shape[-1]} must agree"
    if call.causal and q.shape[2] != call.k.shape[2]:
        return "causal attention needs as many queries as keys"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Fused attention without a block mask."""
    q, k, v, key_bias = call.q, call.k, call.v, call.key_bias
    if call.groups > 1:
        k, v = (x.repeat_interleave(call.groups, dim=1) for x in (k, v))
    q, k, v = (_aligned(x) for x in (q, k, v))
    fused = _cpu if q.device.type == "cpu" else _cuda
    out, lse = fused(q, k, v, call.scale, call.causal, key_bias)
    return (out, lse) if key_bias is None else _without_keys(out, lse, key_bias, call.causal)


def _aligned(x: Tensor) -> Tensor:
    """A tensor that the kernels read rightly: they neither check strides nor alignment."""
    fine = x.stride(-1) == 1
    if fine and x.device.type == "cuda":
        # A traced tensor does not tell its offset; only a plain one surely starts aligned.
        tracing = torch.compiler.is_compiling()
        steps = () if tracing else (x.storage_offset(), *x.stride()[:-1])
        whole = all(step * x.element_size() % 16 == 0 for step in steps)
        fine = x.is_contiguous() if tracing else whole
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def _without_keys(
    out: Tensor, lse: Tensor, key_bias: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Zero output and -inf for queries that see excluded keys only; the kernels differ there."""
    excluded = key_bias.isneginf()
    blind = excluded.cummin(-1).values if causal else excluded.all(-1, keepdim=True)
    lse = lse.masked_fill(blind[:, None], -torch.inf)
    if out.requires_grad:
        return out.masked_fill(blind[:, None, :, None], 0), lse
    # In place, because a copy of the output would cost more than the rest of this function.
    return out.masked_fill_(blind[:, None, :, None], 0), lse


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    # This kernel adds a broadcast float32 row while it runs: exact, and cheaper than channels.
    dtype = torch.promote_types(q.dtype, torch.float32)
    # A strided row (as the log-sum-exp of this very kernel) would double its time.
    bias = None if key_bias is None else key_bias.to(dtype).contiguous()[:, None, None, :]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, lse


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    width, queries = v.shape[-1], q.shape[2]
    if key_bias is not None:
        q, k = with_bias_channels(q, k, key_bias, scale)
    q, k, v = (padded_to(x, aligned(x.shape[-1])) for x in (q, k, v))
    if _prefers_cudnn(q, k):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out[..., :width], lse.reshape(q.shape[:3])
    v = padded_to(v, q.shape[-1])
    if q.dtype == torch.float32 or q.shape[-1] > 256:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
    # The memory-efficient kernel pads its statistics to whole tiles.
    return out[..., :width], lse[..., :queries]


def _prefers_cudnn(q: Tensor, k: Tensor) -> bool:
    """On Hopper and later cuDNN is the faster kernel, and takes values narrower than keys."""
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 128
        and min(q.shape[2], k.shape[2]) >= 64
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
        and torch.backends.cudnn.is_available()
    )
