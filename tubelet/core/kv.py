"""What a recipe may look at when it decides what a key-value cache stores, or what is read of it.

Both contexts are about one prompt in one layer and know no padding: places count its real tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tubelet.core.context import Site

BITS = (2, 4, 8, 16)
"""Bits per number that a cache can store a token with; 16 leaves it as it is, in any dtype."""


@dataclass(frozen=True, kw_only=True)
class StoreContext:
    """Tokens that a cache holds as they came and that may now be stored in fewer bits.

    First the whole prompt, behind its attention call; later what was generated since.

    Args:
        site: Which layer.
        queries: [H, n, D] queries of these tokens, positions applied.
        keys: [Hkv, m, D] keys of all tokens up to the last of these, as attention saw them.
        scale: Factor on the logits.
    """

    site: Site
    queries: Float[Tensor, "h n d"]
    keys: Float[Tensor, "hkv m d"]
    scale: float

    @property
    def num_tokens(self) -> int:
        """Tokens to decide on, n."""
        return self.queries.shape[1]

    def rows(self, places: "Sequence[int] | Tensor") -> Float[Tensor, "h q n"]:
        """Attention of some of these tokens to all of these tokens, float32.

        Shares of a softmax over all keys up to the query, those stored before among them.

        Args:
            places: In [0, n).
        """
        return attention_rows(self.queries, self.keys, self.scale, places)[..., -self.num_tokens :]


@dataclass(frozen=True, kw_only=True)
class ReadContext:
    """One layer about to read a prompt's cache for one new token.

    Args:
        site: Which layer.
        num_tokens: Tokens in the layer's cache, M, the new one among them.
        kv_heads: Heads of the cache; each may read other tokens.
        video: [M] True at video tokens.
        query, keys: [H, 1, D] and [Hkv, M, D] of the layer before, in this step.
        scale: Factor on its logits.
        state: Kept from layer to layer and from step to step of this prompt's run, for the
            recipe alone.
    """

    site: Site
    num_tokens: int
    kv_heads: int
    video: Bool[Tensor, "m"]
    query: Float[Tensor, "h 1 d"]
    keys: Float[Tensor, "hkv m d"]
    scale: float
    state: dict[str, Any] = field(default_factory=dict)

    def attention(self) -> Float[Tensor, "h m"]:
        """Attention of the new token to all tokens in the layer before, float32.

        All of them, also where that layer read only some.
        """
        return attention_rows(self.query, self.keys, self.scale, [0])[:, 0]


def attention_rows(q: Tensor, k: Tensor, scale: float, places: "Sequence[int] | Tensor") -> Tensor:
    """[H, len(places), m] float32 causal softmax rows of some queries.

    Args:
        q: [H, n, D], the last n of the m tokens.
        k: [Hkv, m, D].
        scale: Factor on the logits.
        places: In [0, n).
    """
    num, whole = q.shape[1], k.shape[1]
    index = torch.as_tensor(places, device=q.device)
    rows = q[:, index].float().unflatten(0, (k.shape[0], -1))
    logits = (rows @ k.float()[:, None].mT * scale).flatten(0, 1)
    behind = torch.arange(whole, device=q.device) > (index + whole - num)[:, None]
    return logits.masked_fill(behind, -torch.inf).softmax(-1)
