"""Putting recipes on a model and taking them off again."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site
from tubelet.core.errors import NoEffectWarning, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Recipe
from tubelet.core.report import Report
from tubelet.core.saved import SavedPlan

TRAINED = ("gumbel-keep", "hot", "lookup", "semantic-tokens", "token-slimming", "vtm")
"""Modules that learned reductions need; see `tubelet.nn.reducers`."""

CAPABILITIES = {
    "any subset": "attention that takes any subset of the tokens",
    "grid": "tokens on a regular frames x height x width grid",
    "pixels": "the input pixels",
    "class token": "a class token",
    "divided": "divided space-time attention",
    "attention": "an attention call that can be replaced",
    "joint": "attention over all tokens of a grid at once",
    "generator": "a run of denoising steps",
    "video prompt": "a language model with video tokens in its prompt",
    "kv cache": "a language model with a key-value cache",
    **{f"trained {name}": "trained modules of its own" for name in TRAINED},
}
"""What a recipe may require of a host, in words."""


@runtime_checkable
class ModelAdapter(Protocol):
    """Facts about one family of host models, and how to act there.

    Adapters are stateless: all methods take the model. Every class of a family that tubelet
    knows is named in `classes`, so no host library is imported to find out.
    """

    family: str
    classes: tuple[str, ...]
    fused_by_tubelet: bool

    def variants(self) -> dict[str, dict[str, str]]:
        """What each kind of model in the family lacks, by the kind's name."""
        ...

    def lacks(self, model: Any) -> dict[str, str]:
        """Capabilities that this very model does not offer, each with the reason."""
        ...

    def sites(self, model: Any) -> list[Site]:
        """Every place where a plan can act."""
        ...

    def install(self, model: Any, recipes: Sequence[Recipe], handle: "Handle") -> None:
        """Hook the recipes in; each change registers its own undo on `handle`."""
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How attention recipes are carried out.

    Args:
        impl: Implementation of the attention calls; see `tubelet.kernels.attention`. A named one
            is never replaced by another.
        verify: Query blocks of each call that are recomputed densely to measure the error; 0 is
            off. It costs about this many rows of blocks per call.
        max_error: Relative error of a call, measured by `verify`, beyond which the call is done
            again densely and counted; None only measures.
        num_steps: Denoising steps of a run, for hosts that do not tell.

    Raises:
        UnsupportedError: A number is out of range, or `max_error` without `verify`.
    """

    impl: str = "auto"
    verify: int = 0
    max_error: float | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.verify < 0:
            raise UnsupportedError(f"verify must be a number of query blocks, got {self.verify}")
        if self.max_error is not None and not self.max_error > 0:
            raise UnsupportedError(f"max_error must be positive, got {self.max_error}")
        if self.max_error is not None and self.verify == 0:
            raise UnsupportedError("max_error needs verify: a number of query blocks to measure")
        if self.num_steps is not None and self.num_steps < 1:
            raise UnsupportedError(f"num_steps must be at least 1, got {self.num_steps}")


class Handle:
    """A model with recipes on it. Also a context manager that removes them at the end.

    Example:
        >>> with accelerate(model, ToMe(r=64)) as handle:
        ...     output = model(**inputs)
        >>> print(handle.report())
    """

    def __init__(
        self,
        model: Any,
        recipes: Sequence[Recipe],
        num_layers: int = 0,
        options: AttentionOptions | None = None,
    ) -> None:
        self.options = options or AttentionOptions()
        self._undo: list[Callable[[], object]] = []
        self._report = Report(type(model).__name__, tuple(str(recipe) for recipe in recipes))
        self._recipes = tuple(recipes)
        self._num_layers = num_layers
        self._grid: TokenGrid | None = None
        self._assignment: list[TokenAssignment] | None = None

    def on_remove(self, undo: Callable[[], object]) -> None:
        """Register how to take one change back; undone last in, first out."""
        self._undo.append(undo)

    def report(self) -> Report:
        """What fired where, since `accelerate`."""
        return self._report

    def record_grid(self, grid: TokenGrid) -> None:
        """A run begins with this geometry (called by adapters)."""
        self._grid = grid
        self._assignment = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write recipes, model and geometry to one small file; `tubelet.load_plan` reads it.

        Raises:
            TubeletError: The folder cannot be written.
        """
        plan = SavedPlan(
            recipes=self._recipes,
            model=self._report.model,
            num_layers=self._num_layers,
            grid=self._grid,
        )
        return plan.save(path)

    def record_assignment(self, assignment: list[TokenAssignment]) -> None:
        """Keep where the tokens of the latest run went (called by adapters)."""
        self._assignment = assignment

    @property
    def assignment(self) -> list[TokenAssignment] | None:
        """Where the original tokens of the latest run ended, in raster order.

        One entry for the whole batch, or one per sample when their counts differ. None before
        the first run or when no recipe reduces tokens.
        """
        return self._assignment

    def remove(self) -> None:
        """Give the model back exactly as it was. Calling it twice is harmless."""
        failed: list[Exception] = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def __deepcopy__(self, memo: Any) -> "Handle":
        raise UnsupportedError("an accelerated model cannot be copied; remove() the recipes first")

    def __reduce__(self) -> Any:
        raise UnsupportedError("an accelerated model cannot be saved; remove() the recipes first")

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
        if exc[0] is None:
            self.warn_without_effect()

    def warn_without_effect(self) -> None:
        """Emit NoEffectWarning for each recipe that ran and never changed anything."""
        if not self._report.calls:
            return
        for recipe in self._recipes:
            if not self._report.acted(str(recipe)):
                warnings.warn(
                    f"{recipe} ran {self._report.calls} times on {self._report.model} and never "
                    "changed anything; see handle.report()",
                    NoEffectWarning,
                    stacklevel=3,
                )
