"""Whether Triton kernels can run on a device."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    if not _installed():
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels need a GPU, the tensors are on {device.type!r}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU from Ampere on, or an AMD one"
    return None


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels run on these tensors: they have no backward pass and no float64."""
    x = tensors[0]
    if unavailable(x.device) is not None:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    # Triton's interpreter computes bfloat16 wrongly.
    allowed = DTYPES if x.device.type == "cuda" else (torch.float16, torch.float32)
    return all(x.dtype in allowed for x in tensors)


def power_of_two(size: int) -> int:
    """The least one that is not less, as the sides of Triton's tensors must be."""
    return 1 << (size - 1).bit_length()


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Where a kernel launches: Triton and FlashAttention-4 take the current device, not x's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
