"""Rotary position embedding of queries and keys, in one launch where Triton runs."""

from tubelet.kernels.rotary.api import rotary

__all__ = ["rotary"]
