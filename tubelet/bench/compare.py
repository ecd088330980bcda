"""`compare`: the dense model first, then each recipe, on the same input."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.ceiling import CountLog
from tubelet.bench.environment import environment
from tubelet.bench.measure import count_macs, interleaved, median, peak_memory, seconds
from tubelet.bench.result import Comparison, Row
from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import NoEffectWarning, RecipeError, ShapeError
from tubelet.core.recipe import Recipe, TokenRecipe
from tubelet.core.report import Report
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.models.encoder import EncoderAdapter

Progress = Callable[[str, int, int], None]
"""Called with what is going on, the steps done and the steps in total."""

Combination = Recipe | Sequence[Recipe]


@dataclass
class _Variant:
    name: str
    recipes: tuple[Recipe, ...]
    sliced: tuple[Recipe, ...] | None = None
    output: Tensor | None = None
    report: Report | None = None
    assignment: list[TokenAssignment] | None = None
    macs: int = 0
    memory: int = 0


def compare(
    model: Any,
    inputs: Tensor | Mapping[str, Any],
    recipes: Combination | Sequence[Combination],
    *,
    labels: Tensor | None = None,
    repeats: int = 5,
    ceiling: bool = True,
    name: str | None = None,
    description: str | None = None,
    random_weights: bool = False,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
    assignments: dict[str, list[TokenAssignment]] | None = None,
) -> Comparison:
    """Measure what recipes cost and change, against the dense model of the same run.

    Args:
        model: A supported model in eval mode.
        inputs: The clip as the model takes it, or keyword arguments of its forward.
        recipes: Recipes, or sequences of recipes that work together; each only once.
        labels: int64 [B], the right class of each clip, to report accuracy.
        repeats: Timed runs per variant, >= 1; variants take turns.
        ceiling: Also time each variant with its token counts merely sliced off.
        name: Name of the model in the result, default its class name.
        description: The input in words.
        random_weights: State that the weights were never trained.
        notes: Further things that a reader must know.
        progress: Called before every step.
        assignments: Filled with where the tokens of each variant went.

    Returns:
        The comparison; `table()`, `to_json(path)` and `to_html(path)` show it.

    Raises:
        ShapeError: The input holds NaN or infinite values, or is not of the model's dtype and
            device.
        RecipeError: No recipe, something else, or one twice was given, or `repeats` is below 1.
        UnsupportedError, NoMatchingSitesError, ConflictError: A recipe cannot run on this model;
            raised before anything is measured.
    """
    arguments = _checked(model, inputs)
    combinations = _combinations(recipes)
    if repeats < 1:
        raise RecipeError(f"compare needs repeats >= 1, got {repeats}")
    first = next(x for x in arguments.values() if isinstance(x, Tensor))
    device = first.device
    variants = [_Variant("dense", ()), *map(_variant, combinations)]
    for variant in variants[1:]:
        # Refusals must come before minutes of measuring.
        accelerate(model, *variant.recipes).remove()
    timed = len(variants) * (1 + ceiling)
    steps = _Steps(progress, 3 * len(variants) + timed * (repeats + 1))
    with torch.inference_mode(), warnings.catch_warnings():
        # A recipe without effect becomes a note, once.
        warnings.simplefilter("ignore", NoEffectWarning)
        for variant in variants:
            _observe(model, arguments, device, variant, steps)
        runs, of = _runs(model, arguments, device, variants, ceiling)
        interleaved(runs, 1, lambda: steps("warming up"))
        timings = interleaved(runs, repeats, lambda: steps("timing"))
    samples = dict(zip(of, timings, strict=True))
    full_length = _full_length(model, variants[1])
    rows = [_row(variant, variants[0], samples, full_length, labels) for variant in variants]
    if assignments is not None:
        assignments.update({v.name: v.assignment for v in variants if v.assignment})
    return Comparison(
        model=name or type(model).__name__,
        random_weights=random_weights,
        input=description or "x".join(str(n) for n in first.shape),
        dtype=str(first.dtype).removeprefix("torch."),
        repeats=repeats,
        environment=environment(device),
        rows=rows,
        notes=[*notes, *_notes(model, random_weights), *_without_effect(variants)],
    )


def on_model(model: Any, recipes: Sequence[Recipe]) -> AbstractContextManager[Any]:
    """The model with recipes; without any, dense with the fused attention of the comparison."""
    if recipes or adapter_for(model).fused_by_tubelet:
        return accelerate(model, *recipes)
    return nullcontext()


def output_of(result: Any) -> Tensor:
    """[B, ...] float32 output that is compared: logits, else the last hidden state."""
    logits = getattr(result, "logits", None)
    chosen = result.last_hidden_state if logits is None else logits
    return chosen.detach().float()


def _checked(model: Any, inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(inputs, Tensor):
        adapter = adapter_for(model)
        assert isinstance(adapter, EncoderAdapter)
        inputs = {adapter.clip(adapter.base_model(model).config).argument: inputs}
    clips = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    if not clips:
        raise ShapeError(f"compare needs a clip, got arguments {list(inputs)}")
    weights = next(model.parameters())
    for name, clip in clips.items():
        if clip.ndim < 5 or not clip.is_floating_point():
            continue
        if (clip.dtype, clip.device) != (weights.dtype, weights.device):
            raise ShapeError(
                f"{name} is {clip.dtype} on {clip.device}, the model {weights.dtype} on "
                f"{weights.device}"
            )
        if not bool(torch.isfinite(clip).all()):
            raise ShapeError(f"{name} holds NaN or infinite values")
    return dict(inputs)


def _combinations(recipes: Combination | Sequence[Combination]) -> list[tuple[Recipe, ...]]:
    listed = [recipes] if isinstance(recipes, Recipe) else list(recipes)
    combinations = [(c,) if isinstance(c, Recipe) else c for c in listed]
    for choice in combinations:
        whole = isinstance(choice, list | tuple) and len(choice) > 0
        if not whole or not all(isinstance(recipe, Recipe) for recipe in choice):
            raise RecipeError(
                "compare takes recipe instances such as ToMe(r=8), or lists of them, got "
                f"{choice!r}"
            )
    if not combinations:
        raise RecipeError("compare needs recipes, got none")
    chosen = [tuple(choice) for choice in combinations]
    for choice in chosen:
        if chosen.count(choice) > 1:
            raise RecipeError(f"{_variant(choice).name} was given twice")
    return chosen


def _variant(recipes: tuple[Recipe, ...]) -> _Variant:
    return _Variant(" + ".join(str(recipe) for recipe in recipes), recipes)


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def _observe(
    model: Any, arguments: dict[str, Any], device: torch.device, variant: _Variant, steps: _Steps
) -> None:
    """Everything but time: output, report, counts of the ceiling, MACs, memory."""
    log = CountLog()
    steps(f"running {variant.name}")
    with on_model(model, [log.watch(recipe) for recipe in variant.recipes]) as handle:
        variant.output = output_of(model(**arguments))
        if handle is not None:
            variant.report, variant.assignment = handle.report(), handle.assignment
    cut = log.sliced()
    others = [r for r in variant.recipes if not isinstance(r, TokenRecipe)]
    variant.sliced = None if cut is None else (cut, *others)
    with on_model(model, variant.recipes):
        steps(f"counting {variant.name}")
        variant.macs = count_macs(lambda: model(**arguments))
        steps(f"weighing {variant.name}")
        variant.memory = peak_memory(lambda: model(**arguments), device)


def _runs(
    model: Any,
    arguments: dict[str, Any],
    device: torch.device,
    variants: Sequence[_Variant],
    ceiling: bool,
) -> tuple[list[Callable[[], float]], list[tuple[str, bool]]]:
    """Timed runs, and for each its variant and whether it is the ceiling."""

    def timed(recipes: Sequence[Recipe]) -> Callable[[], float]:
        def run() -> float:
            with on_model(model, recipes):
                return seconds(lambda: model(**arguments), device)

        return run

    runs = [timed(variant.recipes) for variant in variants]
    of = [(variant.name, False) for variant in variants]
    for variant in variants:
        if ceiling and variant.sliced is not None:
            runs.append(timed(variant.sliced))
            of.append((variant.name, True))
    return runs, of


def _row(
    variant: _Variant,
    dense: _Variant,
    samples: dict[tuple[str, bool], list[float]],
    full_length: list[float],
    labels: Tensor | None,
) -> Row:
    assert variant.output is not None
    assert dense.output is not None
    latency = {key: median(seen) for key, seen in samples.items()}
    base, own = latency[dense.name, False], latency[variant.name, False]
    cut = latency.get((variant.name, True))
    a, b = variant.output.flatten(1), dense.output.flatten(1)
    logits = variant.output.ndim == 2
    agree = (variant.output.argmax(-1) == dense.output.argmax(-1)).float().mean()
    right = None if labels is None else variant.output.argmax(-1) == labels
    report = {} if variant.report is None else variant.report.to_dict()
    tokens = report.get("tokens_per_layer") or full_length
    return Row(
        name=variant.name,
        latency=own,
        samples=samples[variant.name, False],
        speedup=base / own,
        ceiling=None if cut is None else base / cut,
        tokens_per_layer=tokens,
        macs=variant.macs,
        memory=variant.memory,
        cosine=float(torch.cosine_similarity(a, b, dim=1).mean()),
        top1=float(agree) if logits else None,
        accuracy=None if right is None else float(right.float().mean()),
        error=float((a - b).norm() / b.norm()),
        report=report,
    )


def _without_effect(variants: Sequence[_Variant]) -> list[str]:
    return [
        f"{recipe} never changed anything on this clip"
        for variant in variants
        for recipe in variant.recipes
        if variant.report is not None and not variant.report.acted(str(recipe))
    ]


def _full_length(model: Any, variant: _Variant) -> list[float]:
    """Tokens entering each layer of the dense model."""
    assert variant.report is not None
    layers = adapter_for(model).sites(model)[0].num_layers
    return [float(variant.report.tokens_in)] * layers


def _notes(model: Any, random_weights: bool) -> list[str]:
    notes = []
    if random_weights:
        notes.append(
            "random weights: speed and token counts are real, agreement of the outputs is not "
            "a measure of quality"
        )
    if adapter_for(model).fused_by_tubelet:
        notes.append(
            "the host has no fused attention; the dense baseline runs with tubelet's, so that "
            "recipes get no credit for it"
        )
    return notes
