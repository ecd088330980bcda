"""Contexts of prompt recipes, made by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.grid import TokenGrid
from tubelet.core.prompt import LayerContext, PromptContext


def prompt_context(
    tokens: Tensor, *, question: Tensor | None = None, vision: dict[Any, Tensor] | None = None
) -> PromptContext:
    """A video of given tokens.

    Args:
        tokens: [T, H, W, C].
        question: [Q, C] text behind the video.
        vision: Statistics [1, N] or [1, N, C] by (name, layer).
    """
    frames, height, width, channels = tokens.shape
    text = torch.zeros(0, channels) if question is None else question
    return PromptContext(
        site=Site(name="model.language_model", layer=-1, num_layers=4, kind="prompt"),
        grid=TokenGrid(frames=frames, height=height, width=width),
        hidden=tokens.reshape(1, -1, channels),
        text=text,
        num_question=len(text),
        vision=vision or {},
    )


def noise(frames: int = 4, side: int = 4, channels: int = 16, seed: int = 0) -> Tensor:
    """[T, side, side, C] about N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, side, side, channels, generator=generator)


class GivenStatistics:
    """Attention of a layer that a test makes up.

    Args:
        attention: [H, M, N] share of each of M tokens' attention that goes to each video token.
        question: Places behind the last video.
    """

    def __init__(self, attention: Tensor, question: Sequence[int] = ()) -> None:
        self.attention, self.behind = attention, list(question)
        self.num_tokens = attention.shape[1]

    def rows(self, queries: Sequence[int], softmax: bool = True) -> Tensor:
        picked = self.attention[:, list(queries)]
        return picked if softmax else picked.log()

    def question(self) -> list[int]:
        return self.behind


def layer_context(
    hidden: Tensor,
    *,
    layer: int = 2,
    num_layers: int = 4,
    grids: Sequence[TokenGrid] = (),
    text: Tensor | None = None,
    stats: Any = None,
) -> LayerContext:
    """Video tokens [N, C] in front of a layer; by default of one video of one frame."""
    num, channels = hidden.shape
    text = torch.zeros(0, channels) if text is None else text
    return LayerContext(
        site=Site(name=f"layers.{layer}", layer=layer, num_layers=num_layers, kind="llm"),
        grids=tuple(grids) or (TokenGrid(frames=1, height=1, width=num),),
        hidden=hidden[None],
        anchor=torch.arange(num)[None],
        size=torch.ones(1, num),
        text=text,
        num_question=len(text),
        stats=stats,
    )


def kept(plan: Any) -> list[int]:
    """Places that a plan which only drops keeps."""
    assert plan is not None
    assert plan.copies
    return plan.anchor[0].tolist()
