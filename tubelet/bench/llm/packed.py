"""Attention of Qwen's vision towers with all frames of equal length in one fused call.

With any attention but FlashAttention's package, transformers computes the frames (in Qwen2.5-VL
windows of 64 patches) one after the other in Python: thousands of launches. That would bound
every time here, dense or not. Frames of one length are a batch for torch's fused attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tubelet.models.packed_calls import batches

# Transformers hands all frames over at once only to names with "flash" in them.
NAME = "tubelet_flash_packed"


@contextmanager
def packed_vision(model: Any) -> Iterator[bool]:
    """The model with packed attention in its vision tower, where that exists; yields whether."""
    tower = getattr(model.model, "visual", None)
    if tower is None:
        yield False
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, PackedAttention())
    before = tower.config._attn_implementation
    # Its setter would look for a package of kernels behind a name with "flash" in it.
    tower.config._attn_implementation = NAME
    try:
        yield True
    finally:
        tower.config._attn_implementation = before


class PackedAttention:
    """Attention within the sequences that lie one behind the other, as transformers calls it."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None
        self.lengths: list[int] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """[1, S, H, D] from [1, H, S, D] each."""
        assert cu_seq_lens_q is not None
        if self.seen is not cu_seq_lens_q:
            # All layers get the same object; reading it waits for the device.
            self.seen, self.lengths = cu_seq_lens_q, cu_seq_lens_q.diff().tolist()
        return attend(query, key, value, self.lengths, scaling), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    """Attention within consecutive sequences.

    Args:
        query, key, value: [1, H, S, D].
        lengths: Of the sequences; they add up to S.
        scale: Of the logits; None is 1 / sqrt(D).

    Returns:
        [1, S, H, D].
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for rows, (q, k, v) in batches(lengths, query, key, value):
        part = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        part = part.transpose(1, 2).flatten(0, 1)
        if rows is None:
            return part[None]
        out[0, rows] = part
    return out
