"""Trained token reducers: the modules behind the recipes of `tubelet.recipes.learned`.

Put on a host as `model.reducers`, they train like any other part of it, through the recipes:

    >>> model.reducers = build_reducers(256, heads=4)
    >>> with tubelet.accelerate(model, VTM(keep_ratio=0.5)):
    ...     loss = objective(model(clips)) + model.reducers.penalty()
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from tubelet.core.errors import ModelError
from tubelet.nn.reducers.base import Reducer
from tubelet.nn.reducers.clusters import ClusterKeeper
from tubelet.nn.reducers.pooling import LookupExchange, SemanticTokens, TokenSlimmer
from tubelet.nn.reducers.scoring import GumbelKeeper, SalientMerger

REDUCERS: dict[str, Callable[[int, int, int], Reducer]] = {
    "gumbel-keep": lambda width, heads, slots: GumbelKeeper(width),
    "token-slimming": lambda width, heads, slots: TokenSlimmer(width, slots),
    "lookup": lambda width, heads, slots: LookupExchange(width, heads),
    "vtm": lambda width, heads, slots: SalientMerger(width),
    "semantic-tokens": lambda width, heads, slots: SemanticTokens(width, heads, slots),
    "hot": lambda width, heads, slots: ClusterKeeper(width, heads),
}
"""Builders by the name that recipes ask for; each takes width, heads and slots."""


@dataclass(frozen=True, kw_only=True)
class ReducersConfig:
    """Everything that decides the shape of `Reducers`.

    Args:
        width: Channels of the host's tokens.
        heads: Heads of the cross-attention; a divisor of `width`.
        max_slots: Length of the learned slot tables. Fewer slots take evenly spaced rows, more
            slots interpolate, so it limits nothing.
        names: Which ones, of `REDUCERS`.

    Raises:
        ModelError: An unknown name, or sizes that do not fit.
    """

    width: int
    heads: int
    max_slots: int = 256
    names: tuple[str, ...] = tuple(REDUCERS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if min(self.width, self.heads, self.max_slots) < 1 or self.width % self.heads:
            raise ModelError(
                "reducers need heads that divide the width and at least one slot, got width "
                f"{self.width}, heads {self.heads}, max_slots {self.max_slots}"
            )
        unknown = [name for name in self.names if name not in REDUCERS]
        if unknown:
            raise ModelError(f"no reducer {unknown[0]!r}; there are {', '.join(REDUCERS)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ReducersConfig":
        """Inverse of `to_dict`; unknown names raise ModelError."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ModelError(f"not a configuration of reducers: {error}") from None


class Reducers(nn.ModuleDict):
    """Fresh reducers by name, to be put on a host as `model.reducers`."""

    def __init__(self, config: ReducersConfig) -> None:
        sizes = (config.width, config.heads, config.max_slots)
        super().__init__({name: REDUCERS[name](*sizes) for name in config.names})
        self.config = config

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules."""
        return self.config.names

    def penalty(self) -> Tensor | float:
        """Sum of the modules' penalties since the last call; see `Reducer.penalty`."""
        return sum((module.penalty() for module in self.values()), 0.0)  # type: ignore[operator]


def build_reducers(
    width: int, heads: int, max_slots: int = 256, names: Iterable[str] | None = None
) -> Reducers:
    """Fresh reducers; for arguments and errors see `ReducersConfig`."""
    chosen = tuple(REDUCERS) if names is None else tuple(names)
    return Reducers(ReducersConfig(width=width, heads=heads, max_slots=max_slots, names=chosen))


__all__ = ["REDUCERS", "Reducer", "Reducers", "ReducersConfig", "build_reducers"]
