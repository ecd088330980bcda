"""Pipelines of diffusers: recipes go on their video transformers, all under one handle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tubelet.core.context import Site
from tubelet.core.errors import UnsupportedError
from tubelet.core.handle import Handle
from tubelet.core.recipe import Recipe
from tubelet.models.diffusion import Clock, DiffusionAdapter, install, prefixed

NAMES = ("transformer", "transformer_2")
"""Attributes of a pipeline that hold its video transformers."""


def transformers_of(pipeline: Any) -> dict[str, Any]:
    """The video transformers of a pipeline by their name; none for anything else."""
    held = {name: getattr(pipeline, name, None) for name in NAMES if hasattr(pipeline, "scheduler")}
    return {name: model for name, model in held.items() if model is not None}


@dataclass(kw_only=True)
class PipelineAdapter:
    """A pipeline seen as one host.

    Args:
        family: Class name of the pipeline.
        classes: The same.
        adapters: Adapter of each transformer by its name.
    """

    family: str
    classes: tuple[str, ...]
    adapters: dict[str, DiffusionAdapter]
    fused_by_tubelet: bool = False

    def variants(self) -> dict[str, dict[str, str]]:
        """What the families of its transformers lack."""
        return {k: v for adapter in self.adapters.values() for k, v in adapter.variants().items()}

    def lacks(self, model: Any) -> dict[str, str]:
        """What any of its transformers lacks."""
        lacks: dict[str, str] = {}
        for name, adapter in self.adapters.items():
            lacks.update(adapter.lacks(getattr(model, name)))
        return lacks

    def sites(self, model: Any) -> list[Site]:
        """Sites of all its transformers, named by their paths in the pipeline."""
        parts = self._parts(model)
        return [site for prefix, part in parts.items() for site in prefixed(prefix, *part)]

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        """Hook the recipes into all its transformers, which share runs, steps and state."""
        install(self._parts(model), recipes, handle, _clock(model))

    def _parts(self, model: Any) -> dict[str, tuple[DiffusionAdapter, Any]]:
        named = self.adapters.items()
        return {f"{name}.": (adapter, getattr(model, name)) for name, adapter in named}


def pipeline_adapter(pipeline: Any, adapters: dict[str, Any]) -> PipelineAdapter:
    """The adapter of a pipeline whose transformers have these adapters.

    Raises:
        UnsupportedError: One of them is no video transformer.
    """
    family = type(pipeline).__name__
    for name, adapter in adapters.items():
        if not isinstance(adapter, DiffusionAdapter):
            raise UnsupportedError(
                f"{family}.{name} is a {type(getattr(pipeline, name)).__name__}, "
                "which is not a video transformer of diffusers"
            )
    return PipelineAdapter(family=family, classes=(family,), adapters=adapters)


def _clock(pipeline: Any) -> Clock:
    """Timestep and number of steps as the pipeline's loop has them.

    Transformers are often given timesteps in half precision, where neighbours coincide; the
    pipeline keeps the exact one.
    """

    def read() -> tuple[float | None, int | None]:
        timestep = getattr(pipeline, "current_timestep", None)
        scheduler = pipeline.scheduler
        count = getattr(pipeline, "num_timesteps", None)
        if count is not None and getattr(scheduler, "order", 1) > 1:
            # Second-order samplers list most timesteps twice.
            count = len(scheduler.timesteps.unique())
        return None if timestep is None else float(timestep), count

    return read
