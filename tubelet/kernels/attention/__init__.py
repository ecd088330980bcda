"""Attention: one call, several implementations, and statistics built on it."""

from tubelet.kernels.attention.api import IMPLEMENTATIONS, attention, choose, why_not
from tubelet.kernels.attention.packed import packed_attention
from tubelet.kernels.attention.statistics import (
    CallStatistics,
    attention_entropy,
    received_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "CallStatistics",
    "attention",
    "attention_entropy",
    "choose",
    "packed_attention",
    "received_attention",
    "why_not",
]
