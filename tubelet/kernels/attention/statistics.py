"""Attention statistics in O(N) memory, each from fused attention calls."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.kernels.attention.api import attention
from tubelet.kernels.attention.channels import with_bias_channels


def received_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    lse: Float[Tensor, "b h n"],
    *,
    weight: Float[Tensor, "b n"] | None = None,
    scale: float | None = None,
    key_bias: Float[Tensor, "b m"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h m"]:
    """Attention that each key receives: sum over queries i of w_i A_ij.

    It is the exponentiated log-sum-exp of a call with the roles swapped (queries := K,
    keys := Q) and the per-key bias log w_i - lse_i, so no N x N map exists.

    Args:
        q, k: As given to `attention`.
        lse: Log-sum-exp that this attention call returned.
        weight: Non-negative weight of each query, default 1.
        scale: As given to `attention`.
        key_bias: As given to `attention`.
        impl: As for `attention`.

    Returns:
        float32; sums to the total query weight over the keys of each head.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(groups, dim=1) if groups > 1 else k
    # A query without keys gives nothing to any.
    lse = lse.masked_fill(lse.isneginf(), torch.inf)
    shift = -lse if weight is None else weight.float().log()[:, None] - lse
    # The bias differs per head, so heads move into the batch; these are views.
    fold = [x.reshape(-1, 1, *x.shape[2:]) for x in (keys, q)]
    bias = shift.reshape(-1, shift.shape[-1])
    _, swapped = attention(fold[0], fold[1], fold[1], scale=scale, key_bias=bias, impl=impl)
    if key_bias is not None:
        swapped = swapped.reshape(*keys.shape[:3]) + key_bias[:, None]
    return swapped.reshape(*keys.shape[:3]).exp()


def attention_entropy(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    lse: Float[Tensor, "b h n"],
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "b m"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h n"]:
    """Entropy of each query's softmax, in nats.

    H_i = lse_i - scale * q_i . o_i, where o is attention with the keys as values: one fused
    call, and no logarithm of an attention weight that may be zero.

    Args:
        q, k, lse, scale, key_bias, impl: As for `received_attention`. With -inf in `key_bias`
            the excluded keys count as weight 0.

    Returns:
        float32 in [0, log M].
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    values = k
    if key_bias is not None:
        q, values = with_bias_channels(q, k, key_bias, factor)
    out, _ = attention(q, values, values, scale=factor, impl=impl)
    wide = torch.promote_types(q.dtype, torch.float32)
    mean_logit = (q.to(wide) * out.to(wide)).sum(-1) * factor
    return (lse - mean_logit).clamp(min=0)


@dataclass(frozen=True)
class CallStatistics:
    """Statistics of one attention call; see `tubelet.core.context.AttentionStatistics`.

    Args:
        q, k, v: [G, H, N, D] as given to `attention`.
        scale: Factor on the logits.
        lse: [G, H, N], needed by `received` and `entropy`.
        key_bias: [G, N] as given to `attention`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    lse: Tensor | None = None
    key_bias: Tensor | None = None

    def keys(self) -> Tensor:
        """Keys averaged over heads, float32 [G, N, D]."""
        return self.k.mean(1).float()

    def rows(self, queries: Sequence[int]) -> Tensor:
        """Softmax rows of a few queries, float32 [G, H, len(queries), N]."""
        picked = self.q[:, :, list(queries)].float()
        groups = self.q.shape[1] // self.k.shape[1]
        keys = self.k.repeat_interleave(groups, dim=1).float()
        logits = picked @ keys.transpose(-1, -2) * self.scale
        if self.key_bias is not None:
            logits = logits + self.key_bias[:, None, None]
        return logits.softmax(-1)

    def value_norm(self) -> Tensor:
        """Euclidean norm of the values, float32 [G, H, N]."""
        groups = self.q.shape[1] // self.v.shape[1]
        return self.v.float().norm(dim=-1).repeat_interleave(groups, dim=1)

    def received(self, weight: Tensor | None = None) -> Tensor:
        """Attention received, mean over heads, float32 [G, N]."""
        options = {"scale": self.scale, "key_bias": self.key_bias}
        return received_attention(self.q, self.k, self._lse(), weight=weight, **options).mean(1)

    def entropy(self) -> Tensor:
        """Entropy, mean over heads, float32 [G, N]."""
        options = {"scale": self.scale, "key_bias": self.key_bias}
        return attention_entropy(self.q, self.k, self._lse(), **options).mean(1)

    def _lse(self) -> Tensor:
        if self.lse is None:
            raise ShapeError(
                "this call kept no log-sum-exp; name 'received' or 'entropy' in the recipe's "
                "`statistics`"
            )
        return self.lse
