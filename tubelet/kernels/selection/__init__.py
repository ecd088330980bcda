"""Block operations of a selection, fused where Triton runs."""

from tubelet.kernels.selection.api import TOOLS, FusedTools

__all__ = ["TOOLS", "FusedTools"]
