"""FlashAttention-4 (package flash-attn-4): block lists and dense calls on Hopper and Blackwell.

The library ignores block lists on other GPUs without a word, so those are refused. Its kernels
look for the end of the keys only in the last entry of a list (hence `tail_last`), and return
zero output and a log-sum-exp of -inf for empty lists. Checked against version 4.0.0b36; causal
calls were not run on a GPU yet.

Of causal lists it computes the blocks that queries see whole; the Triton kernel adds the others,
which are few, to its result.
"""

from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.kernels.attention import triton_blocks
from tubelet.kernels.attention.call import Call
from tubelet.kernels.triton_support import on_device

WIDTHS = (64, 128)
"""Head widths that were tested."""

HOPPER = ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64))
"""(query, key) blocks that run on Hopper; other sizes are split into the first that divides."""

BLACKWELL = ((256, 128),)


def refuses(call: Call) -> str | None:
    """Why these inputs cannot run here, or None."""
    q, mask = call.q, call.mask
    if not _installed():
        return "flash-attn-4 is not installed"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"FlashAttention-4 needs an NVIDIA GPU, the tensors are on {q.device.type!r}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability[0] not in (9, 10):
        what = "is not used" if mask is None else "ignores block lists"
        return f"FlashAttention-4 {what} on sm_{capability[0]}{capability[1]}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-4 takes float16 and bfloat16, not {q.dtype}"
    if q.shape[3] != call.v.shape[3] or q.shape[3] not in WIDTHS:
        return f"FlashAttention-4 is used for heads of width {WIDTHS}, got {q.shape[3]}"
    if call.key_bias is not None:
        return "FlashAttention-4 takes no key bias"
    if call.wants_gradient:
        return "FlashAttention-4 is used without its backward pass here; use torch.no_grad()"
    if mask is not None and _block(mask, capability[0]) is None:
        sizes = BLACKWELL if capability[0] == 10 else HOPPER
        return f"blocks of {mask.block} tokens cannot be split into any of {sizes}"
    if call.causal and mask is not None and (reason := triton_blocks.refuses(call)) is not None:
        return f"the blocks of a causal call that are seen in part go to Triton: {reason}"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """FlashAttention-4, with the lists of the mask or dense."""
    if not call.causal or call.mask is None:
        return _run(call, call.mask)
    causal = triton_blocks.causal_lists(call)
    whole = replace(causal.mask, counts=causal.whole)
    out, lse = _run(replace(call, causal=False), whole)
    # In place, because a copy of the output would cost more than what is added.
    out, lse = (out if out.stride(3) == 1 else out.contiguous()), lse.contiguous()
    triton_blocks.add_partial(call, causal, out, lse)
    return out, lse


def _run(call: Call, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    lists = None
    if mask is not None:
        block = _block(mask, torch.cuda.get_device_capability(q.device)[0])
        assert block is not None
        mask = mask.split(block).tail_last()
        if mask.indices.shape[3] == 0:
            mask = replace(mask, indices=mask.counts[..., None])
        # Every listed block is computed whole; the list of partly masked ones stays empty.
        none = torch.zeros_like(mask.counts, memory_format=torch.contiguous_format)
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=none,
            mask_block_idx=none[..., None],
            full_block_cnt=mask.counts.contiguous(),
            full_block_idx=mask.indices.contiguous(),
            block_size=block,
        )
    with on_device(q):
        out, lse = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=call.scale,
            causal=call.causal,
            pack_gqa=None if lists is None else False,
            block_sparse_tensors=lists,
            return_lse=True,
        )[:2]
    return out.transpose(1, 2), lse


@cache
def _installed() -> bool:
    # The package is only imported when it runs: that takes seconds.
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True


def _block(mask: BlockMask, major: int) -> tuple[int, int] | None:
    """Block sizes to run with: those of the mask, or the largest that divide them."""
    sizes = BLACKWELL if major == 10 else HOPPER
    fits = (s for s in sizes if mask.block[0] % s[0] == 0 and mask.block[1] % s[1] == 0)
    return next(fits, None)
