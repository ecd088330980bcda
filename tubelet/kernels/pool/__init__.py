"""Means of blocks of tokens: what most block selections look at."""

from tubelet.kernels.pool.api import block_means

__all__ = ["block_means"]
