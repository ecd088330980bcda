"""What a recipe may look at when it shortens the prompt of a video language model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.context import BlockTools, Site
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid

VISION_STATISTICS = {
    "received": "attention that a place receives, mean over queries and heads",
    "class": "attention of the class token to a place, mean over heads",
    "class or received": "the one where the tower has a class token, the other where it has none",
    "keys": "key of a place, mean over heads",
    "hidden": "hidden state of a place behind the layer",
}
"""What a prompt recipe may ask of a layer of the vision tower."""


@dataclass(frozen=True, kw_only=True)
class PromptContext:
    """One video of one prompt, between the projector and the language model.

    Only tokens of the grid are shown. Text, timestamps, line breaks and class tokens that a host
    puts among them always stay, without the recipe having to know of them.

    Args:
        site: Where.
        grid: Frames, height and width of the video's tokens; nothing before, nothing after.
        hidden: [1, N, C] projected video tokens, N = grid.num_video in raster order.
        text: [Q, C] embeddings of the other tokens of this prompt, in order (system text,
            timestamps, question); neither padding nor any video.
        num_question: How many of them stand behind the last video of the prompt.
        vision: What was asked of the vision tower, by (statistic, layer as the recipe wrote it).
        tools: Operations that fit the device; None leaves them to plain torch.
    """

    site: Site
    grid: TokenGrid
    hidden: Float[Tensor, "1 n c"]
    text: Float[Tensor, "q c"]
    num_question: int = 0
    vision: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    tools: BlockTools | None = None

    @property
    def num_tokens(self) -> int:
        """Video tokens."""
        return self.hidden.shape[1]

    @property
    def frames(self) -> Float[Tensor, "t p c"]:
        """The same tokens as [frames, tokens per frame, C]."""
        return self.hidden[0].unflatten(0, (self.grid.frames, self.grid.per_frame))

    @property
    def question(self) -> Float[Tensor, "q c"]:
        """Text behind the last video; the whole text where nothing stands behind it."""
        return self.text[-self.num_question :] if self.num_question else self.text

    def statistic(self, name: str, layer: int) -> Float[Tensor, "1 n *c"]:
        """A statistic of the vision tower for each token: [1, N] or, for vectors, [1, N, C].

        Args:
            name: One of `VISION_STATISTICS`.
            layer: As in the recipe's `vision`; negative counts from the last layer.

        Raises:
            UnsupportedError: The recipe did not name it in `vision`.
        """
        return _asked_for(self.vision, name, layer)


@runtime_checkable
class LayerStatistics(Protocol):
    """The attention call of the layer before, for one prompt. No N x N map exists anywhere.

    H query heads, M tokens of the prompt as they were in that call, N video tokens among them.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, M."""
        ...

    def rows(self, queries: Sequence[int], softmax: bool = True) -> Float[Tensor, "h q n"]:
        """Attention of a few tokens of the prompt to each video token, float32.

        Args:
            queries: Places in the prompt, in [-M, M); -1 is the last token.
            softmax: Shares of a softmax over all keys up to the query; without it the scaled
                logits, which mean nothing at keys behind the query.
        """
        ...

    def question(self) -> list[int]:
        """Places of the tokens behind the last video."""
        ...

    def video_places(self) -> list[int]:
        """Places of the video tokens."""
        ...

    def queries(self) -> Float[Tensor, "h m d"]:
        """Queries of all tokens of the prompt, positions applied."""
        ...

    def keys(self) -> Float[Tensor, "h m d"]:
        """Keys of all tokens of the prompt, positions applied, one per query head."""
        ...

    def video_queries(self) -> Float[Tensor, "h n d"]:
        """Queries of the video tokens, positions applied."""
        ...

    def video_keys(self) -> Float[Tensor, "h n d"]:
        """Keys of the video tokens, positions applied, one per query head."""
        ...

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """All video tokens of one prompt, in front of a layer of the language model.

    Args:
        site: Where; `site.layer` is the first layer that sees the shorter prompt.
        grids: Geometry of each video of the prompt, in order.
        hidden: [1, N, C] video tokens as they enter the layer, in order.
        anchor: [1, N] int64, original place of each: videos one behind the other, each in raster
            order.
        size: [1, N] float32, originals that each token stands for.
        text: [Q, C] hidden states of the other tokens of the prompt, in order.
        num_question: How many of them stand behind the last video.
        stats: Attention of the layer before, where the recipe's `statistics` asks for it.
        embeds: [1, M, C] video tokens as they entered the first layer.
        text_embeds: [Q, C] the other tokens as they entered the first layer.
        vision: What was asked of the vision tower for the tokens that are left, by (statistic,
            layer as the recipe wrote it).
        tools: Operations that fit the device; None leaves them to plain torch.
    """

    site: Site
    grids: tuple[TokenGrid, ...]
    hidden: Float[Tensor, "1 n c"]
    anchor: Int[Tensor, "1 n"]
    size: Float[Tensor, "1 n"]
    text: Float[Tensor, "q c"]
    num_question: int = 0
    stats: LayerStatistics | None = None
    embeds: Float[Tensor, "1 m c"] | None = None
    text_embeds: Float[Tensor, "q c"] | None = None
    vision: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    tools: BlockTools | None = None

    @property
    def num_tokens(self) -> int:
        """Video tokens now."""
        return self.hidden.shape[1]

    @property
    def num_original(self) -> int:
        """Video tokens that the vision tower made."""
        return sum(grid.num_video for grid in self.grids)

    @property
    def num_entered(self) -> int:
        """Video tokens that entered the first layer."""
        return self.num_tokens if self.embeds is None else self.embeds.shape[1]

    def statistic(self, name: str, layer: int) -> Float[Tensor, "1 n *c"]:
        """As `PromptContext.statistic`, of the tokens that are left: a merged one has that of
        the token at its place."""
        return _asked_for(self.vision, name, layer)

    def statistics(self) -> LayerStatistics:
        """`stats`, or an error that names the misuse."""
        if self.stats is None:
            raise RuntimeError(f"no attention statistics in front of {self.site.name}")
        return self.stats


def _asked_for(vision: dict[tuple[str, int], Tensor], name: str, layer: int) -> Tensor:
    if (name, layer) not in vision:
        asked = ", ".join(f"{n} of layer {i}" for n, i in vision) or "nothing"
        raise UnsupportedError(
            f"{name} of vision layer {layer} was not kept; the recipe's `vision` asks for {asked}"
        )
    return vision[name, layer]
