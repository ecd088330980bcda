"""What an attention recipe decides about one attention call."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError
from tubelet.core.tensors import decode_tensor, encode_tensor


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """A block mask and what happens around it; the empty plan is dense attention.

    Args:
        mask: Block pairs to compute, in the order given by `order`; None computes all.
        order: [H or 1, N] int64 permutation of the tokens applied to queries, keys and values
            before the call and undone on the result; None keeps the order. Self-attention only.
        bias: [B, N] float32 added to every logit of a key; -inf excludes the key.
        temperature: Logits are divided by it, > 0. Below 1 sharpens the softmax.

    Raises:
        ShapeError: `temperature` is not a positive finite number, or a tensor has a wrong rank.
    """

    mask: BlockMask | None = None
    order: Int[Tensor, "h n"] | None = None
    bias: Float[Tensor, "b n"] | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ShapeError(f"temperature must be a positive number, got {self.temperature}")
        for name in ("order", "bias"):
            value = getattr(self, name)
            if value is not None and value.ndim != 2:
                raise ShapeError(f"AttentionPlan {name} must have 2 axes, got {tuple(value.shape)}")

    @property
    def is_dense(self) -> bool:
        """True when the plan changes nothing."""
        return (
            self.mask is None
            and self.order is None
            and self.bias is None
            and self.temperature == 1.0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "mask": None if self.mask is None else self.mask.to_dict(),
            "order": None if self.order is None else encode_tensor(self.order),
            "bias": None if self.bias is None else encode_tensor(self.bias),
            "temperature": self.temperature,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionPlan":
        """Inverse of `to_dict`."""
        return cls(
            mask=None if data["mask"] is None else BlockMask.from_dict(data["mask"]),
            order=None if data["order"] is None else decode_tensor(data["order"]),
            bias=None if data["bias"] is None else decode_tensor(data["bias"]),
            temperature=data["temperature"],
        )
