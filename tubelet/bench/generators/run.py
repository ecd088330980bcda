"""`tubelet compare` on a VideoDiT: the same clip dense and with each recipe, into a folder."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.generators.combinations import (
    Combination,
    name_of,
    read_combinations,
    refuse_early,
)
from tubelet.bench.generators.drawing import Drawn, Task, draw
from tubelet.bench.generators.page import FILES, write_folder
from tubelet.bench.generators.prediction import Prediction, predict, probe, sites_of
from tubelet.bench.generators.result import Densities, GeneratorComparison, Row
from tubelet.bench.quality import psnr, relative_error, ssim
from tubelet.core.errors import ModelError, TubeletError
from tubelet.core.files import check_folder
from tubelet.core.report import Report
from tubelet.models.load import checked_device
from tubelet.nn.dit import VideoDiT, count_tokens
from tubelet.nn.weights import load_weights, read_card
from tubelet.train.detector import detect
from tubelet.train.world import ATTRIBUTES, complete_attributes, describe, parse_attributes

PROMPT = "large red triangle moving left on stripes"
"""What is drawn when nothing is asked for."""

STEPS, GUIDANCE = 8, 1.0
"""Of the sampler, when not given."""

DEFAULT_RECIPES = (
    "SubBlock(density=0.3, block=(128, 128))",
    "XAttention(mass=0.5, dense_steps=0.2)",
    "RandomBlocks(density=0.3, dense_steps=0.2)",
)
"""What runs when no recipe is named: about as many blocks, chosen by content to a fixed budget, by
content to a fixed mass, and by chance."""

LEAST_FRAMES, LEAST_SIDE = 2, 32
"""Smallest clip that the detector reads."""

MOST_DRIFT = 1.5
"""The slowest dense step over the fastest, beyond which times mean little."""

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GeneratorRequest:
    """What was asked for; see the options of `tubelet compare`."""

    prompt: str
    model: str
    out: Path
    recipes: tuple[str, ...] = ()
    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = 0
    device: str = "cpu"


def is_generator(model: str | os.PathLike[str]) -> bool:
    """Whether a name or path means weights of a VideoDiT."""
    try:
        return read_card(model).architecture == "VideoDiT"
    except ModelError:
        return False


def run_generators(
    request: GeneratorRequest, progress: Progress, announce: Announce
) -> GeneratorComparison:
    """Predict, measure and write the files of `FILES`, all of them or none.

    Args:
        request: What to run.
        progress: Told what happens.
        announce: Told the predicted speed-ups before any run is timed.

    Raises:
        TubeletError: Wrong prompt, number, recipe, model, device or folder; nothing is written.
    """
    combinations = read_combinations(request.recipes or DEFAULT_RECIPES)
    wanted = _wanted(request)
    check_folder(request.out, FILES)
    device = checked_device(request.device)
    progress("loading the model", 0, 1)
    model: VideoDiT = load_weights(request.model, expect="VideoDiT", device=device)
    _check_model(request.model, model)
    refuse_early(model, combinations)
    task = Task(
        attributes=wanted.to(device),
        steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        # As in `tubelet bench generation`.
        dtype=torch.bfloat16 if device.type == "cuda" else None,
    )
    predictions = _predictions(model, task, combinations, progress, announce)
    drawn = _draw_all(model, task, combinations, progress)
    rows = [
        _row(recipes, one, drawn[0], wanted, prediction)
        for recipes, one, prediction in zip(
            [(), *combinations], drawn, [None, *predictions], strict=True
        )
    ]
    config = model.config
    found = GeneratorComparison(
        model=request.model,
        sha256=read_card(request.model).sha256,
        prompt=describe(wanted[0]),
        clip=[config.frames, *config.size],
        tokens=math.prod(count_tokens((config.frames, *config.size), config.patch)),
        steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        precision="float32" if task.dtype is None else "bfloat16 autocast",
        environment=environment(device),
        rows=rows,
        notes=[*_notes(combinations, drawn, predictions), *busy_notes(rows)],
    )
    progress("writing", 0, 1)
    write_folder(request.out, found, torch.cat([one.pixels for one in drawn]))
    return found


def _wanted(request: GeneratorRequest) -> Tensor:
    """[1, A] attributes of the prompt, what it leaves open drawn by the seed."""
    if not request.prompt.strip():
        raise TubeletError(f'the prompt is empty; write one such as "{PROMPT}"')
    if request.steps < 1:
        raise TubeletError(f"steps must be at least 1, got {request.steps}")
    return complete_attributes(parse_attributes(request.prompt)[None], request.seed)


def _check_model(name: str, model: VideoDiT) -> None:
    config = model.config
    if tuple(config.attributes) != tuple(len(values) for values in ATTRIBUTES.values()):
        raise ModelError(f"{name} was not trained on the attributes of tubelet's world")
    if config.frames < LEAST_FRAMES or min(config.size) < LEAST_SIDE:
        raise ModelError(
            f"{name} draws clips of {config.frames} frames of {config.size[0]}x{config.size[1]}; "
            f"comparing needs {LEAST_FRAMES} frames of {LEAST_SIDE}x{LEAST_SIDE} at least"
        )


def _predictions(
    model: VideoDiT,
    task: Task,
    combinations: Sequence[Combination],
    progress: Progress,
    announce: Announce,
) -> list[Prediction]:
    progress("predicting: dense", 0, len(combinations) + 1)
    dense, sites = probe(model, task), sites_of(model)
    found = []
    for done, recipes in enumerate(combinations, 1):
        progress(f"predicting: {name_of(recipes)}", done, len(combinations) + 1)
        sparse = probe(model, task, recipes)
        found.append(predict(sites, dense, sparse, recipes, task.steps))
        announce(f"{name_of(recipes)}: predicted: {found[-1]}")
    return found


def _draw_all(
    model: VideoDiT, task: Task, combinations: Sequence[Combination], progress: Progress
) -> list[Drawn]:
    """The dense run, then the others; probes have warmed them all up."""
    variants = [(), *combinations]
    total = len(variants) * task.steps
    drawn = []
    for number, recipes in enumerate(variants):
        before, name = number * task.steps, name_of(recipes)
        progress(f"drawing: {name}", before, total)
        tell = _teller(progress, name, before, total)
        drawn.append(draw(model, task, recipes, tell))
    return drawn


def _teller(progress: Progress, name: str, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(f"drawing: {name}", before + done, total)


def _row(
    recipes: Combination,
    drawn: Drawn,
    dense: Drawn,
    wanted: Tensor,
    prediction: Prediction | None,
) -> Row:
    read = detect(drawn.pixels)
    row = Row(
        name=name_of(recipes),
        recipes=[recipe.to_dict() for recipe in recipes],
        seconds=drawn.seconds,
        step_seconds=drawn.step_seconds,
        attention_seconds=sum(map(sum, drawn.attention)),
        psnr=float(psnr(drawn.pixels, dense.pixels)),
        ssim=float(ssim(drawn.pixels, dense.pixels)),
        latent_error=[
            float(relative_error(own, other))
            for own, other in zip(drawn.states, dense.states, strict=True)
        ],
        attributes=float((read == wanted).double().mean()),
        found=describe(read[0]) if bool((read >= 0).any()) else "nothing",
        prediction=None if prediction is None else prediction.to_dict(),
    )
    if drawn.report is not None:
        _add_report(row, drawn.report, layers=len(drawn.attention[0]), steps=len(drawn.states))
    return row


def _add_report(row: Row, report: Report, layers: int, steps: int) -> None:
    row.densities = densities(report, layers, steps)
    row.fallbacks, row.kernels = dict(report.fallbacks), dict(report.attention)
    checks = report.verified()
    if checks:
        errors = [check["error"] for check in checks]
        row.error, row.worst_error = sum(errors) / len(errors), max(errors)
    known = [check["recall"] for check in checks if check["recall"] is not None]
    row.recall = sum(known) / len(known) if known else None


def densities(report: Report, layers: int, steps: int) -> Densities:
    """Densities of the heads by layer and step; None where no sparse call was made."""
    table: Densities = [[None] * steps for _ in range(layers)]
    for call in report.densities():
        table[call["layer"]][call["step"]] = call["heads"]
    return table


def _notes(
    combinations: Sequence[Combination],
    drawn: Sequence[Drawn],
    predictions: Sequence[Prediction],
) -> list[str]:
    notes = [
        "one clip, one seed, one timed run of each variant: a picture, not a statistic; "
        "`tubelet bench generation` draws many clips",
        "one query block of each sparse call is done again densely to measure error and recall; "
        "its time is counted",
    ]
    for recipes, one, prediction in zip(combinations, drawn[1:], predictions, strict=True):
        report = one.report
        silent = [r for r in recipes if report is not None and not report.acted(str(r))]
        notes += [f"{recipe} never changed anything in this run" for recipe in silent]
        if not silent and prediction.speedup < 1:
            notes.append(f"{name_of(recipes)} was predicted not to pay here")
    return notes


def busy_notes(rows: Sequence[Row]) -> list[str]:
    """Signs that the machine had other work, so that the seconds are not to be trusted."""
    notes = []
    low, high = min(rows[0].step_seconds), max(rows[0].step_seconds)
    if high > MOST_DRIFT * low:
        notes.append(
            f"the machine was busy: dense steps took from {low:.1f} to {high:.1f} s, so compare "
            "no times"
        )
    notes += [
        f"{row.name} seems {rows[0].seconds / row.seconds:.2f}x as fast, above the "
        f"{row.prediction['limit']:.2f}x that attention at no cost would bring: the machine was "
        "busy"
        for row in rows[1:]
        if row.prediction is not None
        and rows[0].seconds / row.seconds > row.prediction["limit"] * 1.05
    ]
    return notes
