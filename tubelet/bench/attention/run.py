"""`tubelet bench attention`: check everything, then measure shape by shape."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tubelet.bench.attention.cases import (
    Attempts,
    Policy,
    add_dense,
    add_lists,
    add_policies,
    implementations,
    measure,
    of_prompts,
)
from tubelet.bench.attention.inputs import FIELDS, make_inputs
from tubelet.bench.attention.result import AttentionRun, read_runs, write_runs
from tubelet.bench.attention.shapes import Shape, chosen_shapes
from tubelet.bench.attention.tables import markdown
from tubelet.bench.attention.timer import WARM_UPS
from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.shards import shard_of
from tubelet.core.errors import RecipeError, TubeletError, UnsupportedError
from tubelet.core.files import check_folder, write_whole
from tubelet.core.recipe import SparseAttention, SparsePrefill
from tubelet.kernels.attention import IMPLEMENTATIONS
from tubelet.models.load import checked_device
from tubelet.recipes import catalogue, parse

FILES = ("attention.json", "attention.md")

BLOCKS = ((128, 128), (128, 64), (64, 64))
DENSITIES = (0.5, 0.2, 0.1, 0.05)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; see the options of `tubelet bench attention`."""

    out: Path
    shapes: tuple[str, ...] = ()
    heads: int | None = None
    impls: tuple[str, ...] = ()
    blocks: tuple[tuple[int, int], ...] = BLOCKS
    densities: tuple[float, ...] = DENSITIES
    recipes: tuple[str, ...] = ()
    policy_density: float = 0.2
    kernels: bool = True
    policies: bool = True
    fields: tuple[str, ...] = FIELDS
    repeats: int | None = None
    device: str = "cpu"
    seed: int = 0
    shard: tuple[int, int] = (1, 1)
    quick: bool = False


def run_attention(request: Request, progress: Progress) -> list[AttentionRun]:
    """Measure and write `attention.json` and `attention.md`, anew after every shape.

    Everything that can be wrong with the request is checked before anything is measured. A case
    that fails is recorded with its reason, and the others go on.

    Raises:
        TubeletError: Unknown shape, implementation or recipe, a number out of range, or a folder
            that cannot be written.
    """
    device = checked_device(request.device)
    request = _quick(request) if request.quick else request
    every = chosen_shapes(request.shapes, device.type, request.heads)
    shapes = shard_of(every, request.shard, f"has no shape; there are {len(every)}")
    recipes = policies(request.recipes, request.policy_density) if request.policies else []
    _check(request)
    check_folder(request.out, FILES)
    request.out.mkdir(parents=True, exist_ok=True)
    repeats = request.repeats or (7 if device.type == "cuda" else 3)
    run = AttentionRun(
        environment=environment(device),
        precision="bfloat16",
        repeats=repeats,
        seed=request.seed,
        quick=request.quick,
        notes=_notes(request, shapes),
    )
    for shape in shapes:
        run.shapes.append(shape.to_dict())
        _measure_shape(run, shape, request, recipes, device, progress)
        write(request.out, [run])
    return [run]


def join_files(paths: Sequence[str | os.PathLike[str]], out: Path) -> list[AttentionRun]:
    """Put the runs of several files into one, and write the same two files.

    Raises:
        TubeletError: A file cannot be read, or the folder cannot be written.
    """
    check_folder(out, FILES)
    runs = [run for path in paths for run in read_runs(path)]
    out.mkdir(parents=True, exist_ok=True)
    write(out, runs)
    return runs


def write(out: Path, runs: Sequence[AttentionRun]) -> None:
    """The two files of a result."""
    write_runs(out / "attention.json", runs)
    write_whole(out / "attention.md", markdown(runs))


def policies(texts: Sequence[str], density: float = 0.2) -> list[Policy]:
    """The recipes of these texts; without any, every one with a density, at that density.

    And those for prompts of language models, which set their density themselves.

    Raises:
        RecipeError: One is unknown, is no sparse attention, or has a value out of range.
    """
    chosen = [parse(text) for text in texts]
    if not texts:
        chosen = [
            cls(density=density)  # type: ignore[call-arg]
            for cls in catalogue().values()
            if issubclass(cls, SparseAttention)
            and any(f.name == "density" for f in dataclasses.fields(cls))
        ]
        chosen += [cls() for cls in catalogue().values() if issubclass(cls, SparsePrefill)]
    found = []
    for recipe in chosen:
        if not isinstance(recipe, SparseAttention | SparsePrefill):
            raise RecipeError(f"{recipe} is no sparse attention: its stage is {recipe.stage!r}")
        found.append(recipe)
    return found


def _measure_shape(
    run: AttentionRun,
    shape: Shape,
    request: Request,
    recipes: Sequence[Policy],
    device: torch.device,
    progress: Progress,
) -> None:
    """Kernels on random inputs, then the policies on each kind of inputs, all with dense calls."""
    impls, repeats = implementations(request.impls), run.repeats
    if not request.recipes:
        # Without a choice each kind of call gets the recipes of its kind.
        kind = SparsePrefill if shape.causal else SparseAttention
        recipes = [recipe for recipe in recipes if isinstance(recipe, kind)]
    parts = [("kernels", "random")] if request.kernels else []
    parts += [("policies", field) for field in request.fields if recipes]
    for part, field in parts:
        what = f"{shape.name}: {part} on {field} inputs"
        attempts = Attempts(shape)
        progress(f"{what}: trying", 0, 1)
        # Without autograd, kernels skip what only a backward pass needs.
        with torch.inference_mode():
            inputs = make_inputs(
                shape, field, seed=request.seed, device=device, dtype=torch.bfloat16
            )
            add_dense(attempts, inputs, impls)
            if part == "kernels":
                add_lists(attempts, inputs, impls, request.blocks, request.densities, request.seed)
            else:
                by = of_prompts(impls) if shape.causal and device.type == "cuda" else ["auto"]
                add_policies(attempts, inputs, field, recipes, by)
            rounds = repeats + (WARM_UPS if device.type == "cuda" else 0)
            ticks = _Ticks(progress, what, rounds * sum(len(c.runs) for c in attempts.cases))
            rows = measure(attempts, device, repeats, ticks)
        known = {(entry.shape, entry.name) for entry in run.skipped}
        run.skipped.extend(e for e in attempts.skipped if (e.shape, e.name) not in known)
        # Dense calls that every part is compared with are listed once.
        seen = {(row.kind, row.shape, row.name) for row in run.cases if row.kind == "dense"}
        run.cases.extend(row for row in rows if (row.kind, row.shape, row.name) not in seen)


class _Ticks:
    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.what, self.done, self.total)


def _quick(request: Request) -> Request:
    """The same request cut down to a smoke test of seconds."""
    return replace(
        request,
        shapes=request.shapes or ("tiny",),
        densities=request.densities[:2],
        repeats=request.repeats or 1,
    )


def _check(request: Request) -> None:
    for impl in request.impls:
        if impl not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise UnsupportedError(f"unknown attention implementation {impl!r}; there are {known}")
    for value in (*request.densities, request.policy_density):
        if not 0 < value <= 1:
            raise TubeletError(f"density must be in (0, 1], got {value:g}")
    for block in request.blocks:
        if min(block) < 1:
            raise TubeletError(f"blocks must be positive, got {block}")
    for field in request.fields:
        if field not in FIELDS:
            raise TubeletError(f"unknown inputs {field!r}; there are {', '.join(FIELDS)}")
    if not (request.kernels or request.policies):
        raise TubeletError("nothing to measure: neither kernels nor policies")


def _notes(request: Request, shapes: Sequence[Shape]) -> list[str]:
    notes = ["the time of flex with lists includes turning them into its own format"]
    if not all(shape.causal for shape in shapes):
        notes.append(
            "policies are timed late in a run: a search at an earlier step shows under first step "
            "only"
        )
    if any(shape.causal for shape in shapes):
        notes.append(
            "density of causal calls is the share of the pairs of a query and a token up to it"
        )
    if any(shape.groups > 1 for shape in shapes):
        notes.append("the time of sdpa includes repeating keys and values for all query heads")
    if request.quick:
        notes.insert(0, "a smoke test: sizes too small to conclude anything")
    if request.heads is not None:
        notes.append(f"{request.heads} heads instead of the model's own")
    return notes
