"""The main job: one clip, one model, several recipes, a folder with the report."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tubelet.bench.clip_inputs import gather_inputs
from tubelet.bench.compare import Progress, compare
from tubelet.bench.fidelity.budgets import Geometry, OutOfReach, at_budget
from tubelet.bench.pictures import strips
from tubelet.bench.result import Comparison
from tubelet.core.assignment import TokenAssignment
from tubelet.core.files import check_folder
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Recipe
from tubelet.models.catalogue import adapter_for
from tubelet.models.encoder import EncoderAdapter
from tubelet.models.load import checked_device, load_model
from tubelet.recipes import parse

FILES = ("report.json", "report.html")

DEFAULT_RECIPES = ("VidTLDR", "EVAD", "RLT", "UniformPool", "RandomDrop")
"""What runs when no recipe is named: the authors' defaults, after ToMe at half of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `tubelet compare` was asked for; see its options."""

    clip: str
    model: str
    recipes: tuple[str, ...]
    out: Path
    rate: float | None
    batch: int
    repeats: int
    dtype: str
    device: str
    seed: int
    ceiling: bool


def run_comparison(request: Request, progress: Progress) -> Comparison:
    """Compare and write `report.json` and `report.html` into the folder.

    Everything that can be wrong with the request is checked before the model runs.

    Raises:
        TubeletError: Wrong clip, model, recipe, device or folder; nothing is written then.
    """
    combinations = [combination(text) for text in request.recipes]
    check_folder(request.out, FILES)
    device = checked_device(request.device)
    progress("loading the model", 0, 1)
    hush_transformers()
    dtype = getattr(torch, request.dtype)
    loaded = load_model(request.model, dtype=dtype, device=device, seed=request.seed)
    progress("decoding the clip", 0, 1)
    inputs = gather_inputs(request.clip, loaded, request.rate, request.batch)
    adapter = adapter_for(loaded.model)
    assert isinstance(adapter, EncoderAdapter)
    base = adapter.base_model(loaded.model)
    grid = adapter.grid(base, inputs.arguments[loaded.clip.argument])
    if not combinations:
        combinations = _defaults(adapter.sites(loaded.model)[0].num_layers, grid)
    assignments: dict[str, list[TokenAssignment]] = {}
    comparison = compare(
        loaded.model,
        inputs.arguments,
        combinations,
        labels=inputs.labels,
        repeats=request.repeats,
        ceiling=request.ceiling,
        name=loaded.name,
        description=inputs.description,
        random_weights=loaded.random_weights,
        progress=progress,
        assignments=assignments,
        notes=loaded.notes,
    )
    shrunk = {n: parts for n, parts in assignments.items() if parts[0].num_out < parts[0].num_in}
    pictures = strips(inputs.clip.frames, grid, shrunk)
    request.out.mkdir(parents=True, exist_ok=True)
    comparison.to_html(request.out / "report.html", pictures)
    comparison.to_json(request.out / "report.json")
    return comparison


def _defaults(layers: int, grid: TokenGrid) -> list[list[Recipe]]:
    half = at_budget("ToMe", 0.5, Geometry(layers=layers, grid=grid))
    first = [] if isinstance(half, OutOfReach) else [half]
    return [[recipe] for recipe in [*first, *map(parse, DEFAULT_RECIPES)]]


def combination(text: str) -> list[Recipe]:
    """Recipes joined by +, outside of parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [parse(part) for part in parts]


def hush_transformers() -> None:
    """No bars and no chatter of transformers in this process."""
    # Its bars and tables would break the one-line errors; what matters becomes a note.
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
