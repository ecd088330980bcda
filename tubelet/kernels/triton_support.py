"""Whether Triton kernels can run on a device."""

import os
from functools import cache
from importlib.util import find_spec

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


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
