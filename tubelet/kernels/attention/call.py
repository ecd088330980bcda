"""One attention call as implementations see it: in order, with everything resolved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask


@dataclass(frozen=True, kw_only=True)
class Call:
    """Inputs that fit together (see `attention`); a mask has as many keys as k.

    Args:
        q: [B, H, N, D].
        k: [B, G, M, D], H a multiple of G.
        v: [B, G, M, E].
        scale: Factor on the logits.
        causal: A query sees no key from a later place.
        key_bias: [B, M], added to every logit of a key; -inf excludes it.
        mask: Block pairs to compute; None computes all.
        places: [H or 1, N] int32, place of each token of a causal call with a mask before it was
            reordered; None when it was not.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool = False
    key_bias: Tensor | None = None
    mask: BlockMask | None = None
    places: Tensor | None = None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def wants_gradient(self) -> bool:
        """Whether a backward pass may follow."""
        tensors = (self.q, self.k, self.v, self.key_bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
