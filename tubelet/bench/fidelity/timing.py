"""Latency of every variant, taking turns with the dense model of the same process.

Timed is the forward pass: scoring, gathering and merging included; making the clip, normalising it
and putting the recipe on the model are not. What is done to a clip beforehand (fewer frames, lower
resolution) is not timed either: a decoder would deliver such clips at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tubelet.bench.fidelity.budgets import OutOfReach
from tubelet.bench.fidelity.cells import Clips, Run
from tubelet.bench.fidelity.oracle import Oracle
from tubelet.bench.fidelity.variants import Variant
from tubelet.bench.measure import interleaved, median, seconds


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median forward pass of a variant.

    Args:
        variant: Its name.
        background: Of the clip; matters to recipes whose token count follows from it.
        batch: Clips per forward pass.
        seconds: Median.
        dense: Median of the dense model in the same turns.
        repeats: Timed runs.
    """

    variant: str
    background: str
    batch: int
    seconds: float
    dense: float
    repeats: int


def time_variants(
    variants: Sequence[Variant],
    clips: Clips,
    background: str,
    repeats: int,
    tick: Callable[[str], None],
) -> list[Latency]:
    """Latency of each variant on one batch, the dense model first.

    Args:
        variants: Dense first; controls are left out by the caller.
        clips: The batch, on the device.
        background: Written into the result.
        repeats: Timed runs per variant; each is warmed up before.
        tick: Called with a text after every round.
    """
    device = clips.pixels.device
    timed = [(v, run) for v in variants if (run := _timed(v, clips, device)) is not None]
    runs = [run for _, run in timed]
    interleaved(runs, 2, lambda: tick("warming up"))
    samples = interleaved(runs, repeats, lambda: tick(f"timing {background}"))
    dense = median(samples[0])
    return [
        Latency(
            variant=variant.name,
            background=background,
            batch=len(clips),
            seconds=median(times),
            dense=dense,
            repeats=repeats,
        )
        for (variant, _), times in zip(timed, samples, strict=True)
    ]


def _timed(variant: Variant, clips: Clips, device: torch.device) -> Callable[[], float] | None:
    host = variant.host
    geometry = host.geometry(clips.pixels.shape[1], tuple(clips.pixels.shape[3:]))
    recipe = variant.recipe(geometry)
    if isinstance(recipe, OutOfReach):
        return None
    inputs = host.normalised(Run(variant, recipe, geometry, clips).pixels)
    recipes = [] if recipe is None else [recipe]

    def run() -> float:
        if isinstance(recipe, Oracle):
            recipe.answers.relevant = clips.relevant
        with torch.inference_mode(), host.with_recipes(recipes):
            return seconds(lambda: host.model(inputs, task=clips.task), device)

    return run
