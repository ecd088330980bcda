"""What a recipe may look at when it thins out the attention over a prompt."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.context import BlockTools, Site
from tubelet.core.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class PrefillContext:
    """One causal attention call over a whole prompt of a video language model.

    Text, timestamps and line breaks may stand in front of, between and behind the videos, and
    tokens of a video may be gone already. A query attends to no later token.

    Args:
        site: Where; `site.layer` is the layer.
        grids: Geometry of each video of the prompt, in order; empty for text alone.
        query: [1, H, N, D] queries, positions applied.
        key: [1, G, N, D] keys, positions applied; H is a multiple of G.
        value: [1, G, N, E] values.
        scale: Factor on the logits.
        video: [N] int64, which of the videos a token is of, -1 for all other tokens.
        place: [N] int64, raster place of a token in its video, 0 for all other tokens.
        tools: Block operations that fit the device; None leaves them to plain torch.
    """

    site: Site
    grids: tuple[TokenGrid, ...]
    query: Float[Tensor, "1 h n d"]
    key: Float[Tensor, "1 g n d"]
    value: Float[Tensor, "1 g n e"]
    scale: float
    video: Int[Tensor, "n"]
    place: Int[Tensor, "n"]
    tools: BlockTools | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt in front of this layer."""
        return self.query.shape[2]

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]
