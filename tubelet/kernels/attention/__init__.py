"""Attention: one call, several implementations, and statistics built on it."""

from tubelet.kernels.attention.api import (
    IMPLEMENTATIONS,
    PREFERENCES,
    attention,
    choose,
    why_not,
)
from tubelet.kernels.attention.merge import merge
from tubelet.kernels.attention.packed import packed_attention
from tubelet.kernels.attention.statistics import (
    CallStatistics,
    attention_entropy,
    received_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "PREFERENCES",
    "CallStatistics",
    "attention",
    "attention_entropy",
    "choose",
    "merge",
    "packed_attention",
    "received_attention",
    "why_not",
]
