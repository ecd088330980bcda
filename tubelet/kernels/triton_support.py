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


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Where a kernel launches: Triton and FlashAttention-4 take the current device, not x's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
