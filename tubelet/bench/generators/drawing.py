"""Drawing one clip, with every attention call timed inside the running model."""

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.bench.generators.combinations import Combination
from tubelet.core.errors import NoEffectWarning
from tubelet.core.report import Report
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.nn.flow import generate

VERIFIED_BLOCKS = 1
"""Query blocks of each sparse call that are done again densely, to measure the error."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every variant draws.

    Args:
        attributes: [1, A] int64.
        steps: Of the sampler.
        guidance: 1 turns it off.
        seed: Of the noise.
        dtype: Autocast; None is float32.
    """

    attributes: Tensor
    steps: int
    guidance: float
    seed: int
    dtype: torch.dtype | None


@dataclass(kw_only=True)
class Drawn:
    """One run of the sampler.

    Args:
        seconds: The whole run.
        step_seconds: Each step.
        attention: Seconds of each attention call, a row per step, a column per layer.
        states: [1, T, 3, H, W] after each step, in [-1, 1], not clamped.
        pixels: [1, T, 3, H, W] in [0, 1].
        report: Of the recipes; None when dense.
    """

    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    attention: list[list[float]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    pixels: Tensor
    report: Report | None = None


def draw(
    model: nn.Module,
    task: Task,
    recipes: Combination = (),
    tell: Callable[[int], None] = lambda step: None,
) -> Drawn:
    """Draw the clip, with the recipes on the model meanwhile.

    Args:
        model: A `VideoDiT` in eval mode; it is left as it was.
        task: What to draw.
        recipes: None of them is dense.
        tell: Called with the number of steps done.
    """
    device = next(model.parameters()).device
    drawn = Drawn(pixels=torch.empty(0))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # What never acted becomes a note of the result.
        warnings.simplefilter("ignore", NoEffectWarning)
        if recipes:
            options: dict[str, Any] = {"verify": VERIFIED_BLOCKS, "num_steps": task.steps}
            drawn.report = stack.enter_context(accelerate(model, *recipes, **options)).report()
        watch = stack.enter_context(AttentionWatch(model))
        start = last = _now(device)

        def step_done(step: int, x: Tensor, velocity: Tensor) -> None:
            nonlocal last
            now = _now(device)
            drawn.step_seconds.append(now - last)
            drawn.states.append(x)
            tell(step + 1)
            last = _now(device)

        pixels = generate(
            model,
            task.attributes,
            seed=task.seed,
            steps=task.steps,
            guidance=task.guidance,
            dtype=task.dtype,
            callback=step_done,
        )
        drawn.seconds = _now(device) - start
        calls = watch.seconds()
    layers = len(calls) // task.steps
    drawn.attention = [calls[i : i + layers] for i in range(0, len(calls), layers)]
    drawn.pixels, drawn.states = pixels.cpu(), [state.cpu() for state in drawn.states]
    return drawn


class AttentionWatch:
    """Times the attention calls of a model while it is entered, deciding included."""

    def __init__(self, model: nn.Module) -> None:
        names = [site.name for site in adapter_for(model).sites(model)]
        self._modules: list[Any] = [model.get_submodule(name) for name in names]
        self._device = next(model.parameters()).device
        self._marks: list[tuple[Any, Any]] = []

    def __enter__(self) -> "AttentionWatch":
        for module in self._modules:
            module.attend = self._timed(module.attend)
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self._modules:
            del module.attend

    def seconds(self) -> list[float]:
        """Of each call, in order; waits for the device."""
        if self._device.type != "cuda":
            return [end - start for start, end in self._marks]
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1000 for start, end in self._marks]

    def _timed(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any) -> Tensor:
            start = self._mark()
            out = attend(*args)
            self._marks.append((start, self._mark()))
            return out

        return timed

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _now(device: torch.device) -> float:
    """Seconds, the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
