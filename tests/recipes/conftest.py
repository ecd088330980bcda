"""Hosts and made-up contexts for the behavioural tests of recipes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tubelet.core.context import AttentionContext, Site, StepContext, TokenContext
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Recipe
from tubelet.models.accelerate import accelerate
from tubelet.testing import catalogue, tiny


@cache
def _host(name: str) -> Any:
    return catalogue.stir(tiny.build(name))


@pytest.fixture
def host() -> Callable[[str], Any]:
    """Tiny hosts by name, without exact ties between tokens."""
    return _host


@pytest.fixture
def accelerated() -> Callable[..., Tensor]:
    """Logits of a model with recipes on it."""

    def run(model: Any, recipe: Recipe, pixels: Tensor) -> Tensor:
        with accelerate(model, recipe):
            return catalogue.logits(model, pixels)

    return run


class Statistics:
    """Attention statistics that a test states instead of an attention call."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def keys(self) -> Tensor:
        return self.facts["keys"]

    def rows(self, queries: Any) -> Tensor:
        return self.facts["weights"][:, :, list(queries)]

    def value_norm(self) -> Tensor:
        return self.facts["value_norm"]

    def entropy(self) -> Tensor:
        return self.facts["entropy"]

    def received(self, weight: Tensor | None = None) -> Tensor:
        weights = self.facts["weights"]
        ones = torch.ones(weights.shape[0], weights.shape[2])
        return (
            torch.einsum("gi,ghij->gj", ones if weight is None else weight, weights)
            / (weights.shape[1])
        )


@pytest.fixture
def context() -> Callable[..., TokenContext]:
    """A token context from the facts that a test cares about."""

    def build(
        hidden: Tensor,
        *,
        tubelet: tuple[int, int, int] = (2, 4, 4),
        grid: TokenGrid | None = None,
        kind: Any = "joint",
        layer: int = 0,
        num_layers: int = 4,
        size: Tensor | None = None,
        anchor: Tensor | None = None,
        pixels: Tensor | None = None,
        shared: int = 1,
        **facts: Any,
    ) -> TokenContext:
        groups, num = hidden.shape[:2]
        grid = grid or TokenGrid(frames=1, height=1, width=num)
        return TokenContext(
            tubelet=tubelet,
            site=Site(name="layer", layer=layer, num_layers=num_layers, kind=kind),
            grid=grid,
            hidden=hidden,
            size=torch.ones(groups, num) if size is None else size,
            anchor=torch.arange(num).expand(groups, num) if anchor is None else anchor,
            protected=grid.before,
            shared=shared,
            stats=Statistics(**facts) if facts else None,
            pixels=pixels,
        )

    return build


@pytest.fixture
def attention_call() -> Callable[..., AttentionContext]:
    """An attention context of a video grid; queries, keys and values are random unless given."""

    def build(
        grid: TokenGrid,
        *,
        batch: int = 1,
        heads: int = 2,
        key_heads: int | None = None,
        width: int = 16,
        layer: int = 0,
        step: StepContext | None = None,
        padding: int = 0,
        state: dict[str, Any] | None = None,
        **tensors: Tensor,
    ) -> AttentionContext:
        query = tensors.get("query", torch.randn(batch, heads, grid.num_tokens, width))
        shape = (len(query), key_heads or heads, *query.shape[2:])
        return AttentionContext(
            site=Site(name="layer", layer=layer, num_layers=12, kind="joint"),
            grid=grid,
            query=query,
            key=tensors["key"] if "key" in tensors else torch.randn(shape),
            value=tensors["value"] if "value" in tensors else torch.randn(shape),
            scale=query.shape[-1] ** -0.5,
            num_keys=grid.num_tokens - padding if padding else None,
            step=step,
            state={} if state is None else state,
        )

    return build
