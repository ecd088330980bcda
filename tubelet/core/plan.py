"""What an attention recipe decides about one attention call."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError
from tubelet.core.tensors import decode_tensor, encode_tensor

RANKS = {"order": 2, "bias": 2, "gain": 3, "residual": 4}
"""Axes of the tensors of a plan."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """A block mask and what happens around it; the empty plan is dense attention.

    Args:
        mask: Block pairs to compute, in the order given by `order`; None computes all. A mask with
            fewer keys than queries leaves out the last tokens of the order as keys: padding.
        order: [G or 1, N] int64 permutation of the tokens applied to queries, keys and values
            before the call and undone on the result, one per key head or one for all; None keeps
            the order. Self-attention only.
        approximate: Key blocks that the mask leaves out still count, to zeroth order: each by its
            mean key and mean value, as often as it has tokens (Sol-Attn, arXiv:2607.24027).
        delta_rows: Compute every such query densely too and add what it gains over the sparse
            result to its followers (delta attention, arXiv:2505.11254); None adds nothing.
        gain, residual: The result is gain * O + residual, [B, H, N] float32 and [B, H, N, E];
            None leaves it (Re-ttention, arXiv:2505.22918).
        bias: [B, N] float32 added to every logit of a key; -inf excludes the key.
        temperature: Logits are divided by it, > 0. Below 1 sharpens the softmax.

    Raises:
        ShapeError: `temperature` is not a positive finite number, or a tensor has a wrong rank.
    """

    mask: BlockMask | None = None
    order: Int[Tensor, "h n"] | None = None
    bias: Float[Tensor, "b n"] | None = None
    temperature: float = 1.0
    approximate: bool = False
    delta_rows: int | None = None
    gain: Float[Tensor, "b h n"] | None = None
    residual: Float[Tensor, "b h n e"] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ShapeError(f"temperature must be a positive number, got {self.temperature}")
        for name, axes in RANKS.items():
            value = getattr(self, name)
            if value is not None and value.ndim != axes:
                raise ShapeError(
                    f"AttentionPlan {name} must have {axes} axes, got {tuple(value.shape)}"
                )
        if self.delta_rows is not None and self.delta_rows < 2:
            raise ShapeError(f"delta_rows must be at least 2, got {self.delta_rows}")
        if self.approximate and self.mask is None:
            raise ShapeError("only blocks that a mask leaves out can be approximated")

    @property
    def is_dense(self) -> bool:
        """True when the plan changes nothing."""
        tensors = (self.mask, self.order, self.bias, self.gain, self.residual)
        return all(x is None for x in tensors) and self.temperature == 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        tensors = {name: getattr(self, name) for name in RANKS}
        return {
            "mask": None if self.mask is None else self.mask.to_dict(),
            **{n: None if x is None else encode_tensor(x) for n, x in tensors.items()},
            "temperature": self.temperature,
            "approximate": self.approximate,
            "delta_rows": self.delta_rows,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionPlan":
        """Inverse of `to_dict`."""
        tensors = {n: None if data[n] is None else decode_tensor(data[n]) for n in RANKS}
        mask = None if data["mask"] is None else BlockMask.from_dict(data["mask"])
        return cls(**{**data, **tensors, "mask": mask})
