"""What a recipe may look at when it decides what a key-value cache stores, or what is read of it.

Both contexts are about one prompt in one layer and know no padding: places count its real tokens.
"""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tubelet.core.context import BlockTools, Site

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
        tools: Operations that fit the device; None leaves them to plain torch.
    """

    site: Site
    queries: Float[Tensor, "h n d"]
    keys: Float[Tensor, "hkv m d"]
    scale: float
    tools: BlockTools | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens to decide on, n."""
        return self.queries.shape[1]

    @property
    def num_before(self) -> int:
        """Tokens stored before them, m - n."""
        return self.keys.shape[1] - self.num_tokens


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
        query = self.query.float().unflatten(0, (self.keys.shape[0], -1))
        logits = query @ self.keys.float()[:, None].mT * self.scale
        return logits.flatten(0, 2).softmax(-1)
