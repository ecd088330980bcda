"""Which adapter serves which model, found by class name without importing any host library."""

import importlib
import pkgutil
from functools import cache
from typing import Any

import tubelet.models
from tubelet.core.errors import UnsupportedError
from tubelet.core.handle import CAPABILITIES, ModelAdapter
from tubelet.core.recipe import Recipe
from tubelet.models.pipelines import pipeline_adapter, transformers_of


@cache
def adapters() -> tuple[ModelAdapter, ...]:
    """Every adapter: the `ADAPTER` of each module in this package."""
    names = [module.name for module in pkgutil.iter_modules(tubelet.models.__path__)]
    modules = [importlib.import_module(f"tubelet.models.{name}") for name in sorted(names)]
    return tuple(m.ADAPTER for m in modules if hasattr(m, "ADAPTER"))


def adapter_for(model: Any) -> ModelAdapter:
    """The adapter of a model instance, or of a pipeline of diffusers by its transformers.

    Raises:
        UnsupportedError: No adapter knows the model's class; the message lists those it could be.
    """
    held = transformers_of(model)
    if held:
        return pipeline_adapter(model, {name: adapter_for(part) for name, part in held.items()})
    name = type(model).__name__
    for adapter in adapters():
        if name in adapter.classes:
            return adapter
    known = "; ".join(f"{a.family}: {', '.join(a.classes)}" for a in adapters())
    raise UnsupportedError(f"no adapter for {name}. Known models: {known}")


def modules_of(model: Any) -> list[Any]:
    """The modules that recipes change: the model, or the transformers of a pipeline."""
    return list(transformers_of(model).values()) or [model]


def refusal(recipe: Recipe | type[Recipe], lacks: dict[str, str]) -> str | None:
    """Why a recipe cannot run where `lacks` is missing, or None."""
    for need in sorted(recipe.requires & lacks.keys()):
        return f"needs {CAPABILITIES[need]}: {lacks[need]}"
    return None
