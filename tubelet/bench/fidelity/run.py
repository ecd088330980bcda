"""`tubelet bench fidelity`: check everything, then measure cell by cell."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.fidelity.budgets import KEEPS, check_keep
from tubelet.bench.fidelity.cells import (
    CHUNK,
    Cell,
    Clips,
    Entry,
    MakeClips,
    clip_batches,
    evaluate_cell,
    is_dense,
)
from tubelet.bench.fidelity.hosts import Host, Role, load_host
from tubelet.bench.fidelity.page import write_page
from tubelet.bench.fidelity.probes import PROBE_SEED, PROBES, Features, probe_scores
from tubelet.bench.fidelity.result import Fidelity, Line, join, read_runs, write_runs
from tubelet.bench.fidelity.summary import summary
from tubelet.bench.fidelity.tables import docs_table
from tubelet.bench.fidelity.timing import Latency, time_variants
from tubelet.bench.fidelity.variants import (
    Variant,
    check_recipes,
    drop_unsupported,
    make_variants,
)
from tubelet.bench.measure import seconds
from tubelet.bench.shards import shard_of
from tubelet.core.errors import TubeletError, UnsupportedError
from tubelet.core.files import check_folder, write_whole
from tubelet.models.load import checked_device
from tubelet.nn.weights import shipped
from tubelet.train.clips import BACKGROUNDS, CORE_TASKS, TASKS, TEST_SEED, make_clips

SIZE = 64
"""Side of the clips in pixels."""

REPORTED = ("static", "noise", "pan")
"""Backgrounds of the protocol; on black everything looks good."""

ELASTIC = "tubelet-vit-elastic"
"""The shipped encoder that was trained with its reducers."""

PATIENCE = 600
"""Seconds that a run on a CPU may take without being confirmed."""

FILES = ("fidelity.json", "fidelity.html", "fidelity.md")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; see the options of `tubelet bench fidelity`."""

    out: Path
    model: str = "tubelet-vit"
    small: tuple[str, ...] | None = None
    trained: str | None = None
    tasks: tuple[str, ...] = CORE_TASKS
    backgrounds: tuple[str, ...] = REPORTED
    recipes: tuple[str, ...] = ()
    keeps: tuple[float, ...] = KEEPS
    clips: int = 4096
    device: str = "cpu"
    shard: tuple[int, int] = (1, 1)
    seed_name: str = "0"
    latency: bool = True
    quick: bool = False
    yes: bool = False


def quick(request: Request) -> Request:
    """The same request cut down to a smoke test of minutes on two cores."""
    return replace(
        request,
        tasks=tuple(t for t in request.tasks if t in ("direction", "collisions"))
        or request.tasks[:1],
        backgrounds=tuple(b for b in request.backgrounds if b in ("static", "pan"))
        or request.backgrounds[:1],
        recipes=request.recipes or ("ToMe", "RLT"),
        keeps=tuple(k for k in request.keeps if k in (1.0, 0.5, 0.25)) or request.keeps[:1],
        clips=min(request.clips, 16),
        quick=True,
    )


def run_fidelity(request: Request, progress: Progress) -> list[Fidelity]:
    """Measure and write `fidelity.json`, `fidelity.html` and `fidelity.md`.

    Everything that can be wrong with the request is checked before anything is measured.

    Raises:
        TubeletError: Unknown task, background, recipe or model, a budget without tokens, a folder
            that cannot be written, or a run on a CPU that would take long and was not confirmed.
    """
    request = quick(request) if request.quick else request
    pairs = checked_cells(request)
    check_folder(request.out, FILES)
    device = checked_device(request.device)
    progress("loading the models", 0, 1)
    hosts = [load_host(request.model, "dense", device)]
    hosts += [load_host(name, role, device) for name, role in _companions(request)]
    run = measure(request, hosts, pairs, progress, make_clips)
    write(request.out, [run])
    return [run]


def join_files(paths: Sequence[str | os.PathLike[str]], out: Path) -> list[Fidelity]:
    """Join shards, or runs over seeds, and write the same three files.

    Raises:
        TubeletError: A file cannot be read, or the runs do not belong together.
    """
    check_folder(out, FILES)
    runs = join([run for path in paths for run in read_runs(path)])
    write(out, runs)
    return runs


def write(out: Path, runs: Sequence[Fidelity]) -> None:
    """The three files of a result."""
    out.mkdir(parents=True, exist_ok=True)
    write_runs(out / "fidelity.json", runs, summary(runs))
    write_page(out / "fidelity.html", runs)
    write_whole(out / "fidelity.md", docs_table(runs) + "\n")


def measure(
    request: Request,
    hosts: Sequence[Host],
    pairs: Sequence[tuple[str, str]],
    progress: Progress,
    make: MakeClips,
) -> Fidelity:
    """All cells of a checked request with loaded models."""
    device = hosts[0].weights.device
    geometries = [hosts[0].geometry(TASKS[task].frames, (SIZE, SIZE)) for task, _ in pairs]
    variants, notes = drop_unsupported(
        make_variants(hosts, request.keeps, request.recipes), geometries
    )
    _check_patience(request, hosts[0], variants, pairs)
    bench = _Bench(request, hosts, variants, device, make, progress, len(pairs))
    cells = [bench.cell(task, background) for task, background in pairs]
    latencies = bench.latencies(pairs) if request.latency else []
    lines = {
        v.name: Line(family=v.family, kind=v.kind, regime=v.regime, keep=v.keep) for v in variants
    }
    lines |= {n: Line(family=n, kind="control", regime="training-free", keep=None) for n in PROBES}
    if request.quick:
        notes = ["a smoke test: too few clips to conclude anything", *notes]
    return Fidelity(
        seed_name=request.seed_name,
        quick=request.quick,
        precision=str(hosts[0].weights.dtype).removeprefix("torch."),
        clips=request.clips,
        first_seed=TEST_SEED,
        core_tasks=CORE_TASKS,
        models=[_about(host) for host in hosts],
        environment=environment(device),
        variants=lines,
        cells=cells,
        latencies=latencies,
        notes=notes,
    )


def checked_cells(request: Request) -> list[tuple[str, str]]:
    """(task, background) of this shard, after checking all that needs no model.

    Raises:
        TubeletError: Naming what is wrong and what is known.
    """
    for what, names, known in (
        ("task", request.tasks, TASKS),
        ("background", request.backgrounds, BACKGROUNDS),
    ):
        for name in names:
            if name not in known:
                raise UnsupportedError(f"unknown {what} {name!r}; there are {', '.join(known)}")
    check_recipes(request.recipes)
    if request.clips < 1:
        raise TubeletError(f"clips must be at least 1, got {request.clips}")
    for keep in request.keeps:
        # A token is 2 x 8 x 8 pixels in all of tubelet's encoders.
        check_keep(keep, min(TASKS[task].frames for task in request.tasks) // 2 * (SIZE // 8) ** 2)
    pairs = [
        (task, background)
        for task in dict.fromkeys(request.tasks)
        for background in dict.fromkeys(request.backgrounds)
        if background not in TASKS[task].refused
    ]
    without = f"has no cell; there are {len(pairs)} (task, background) pairs"
    return shard_of(pairs, request.shard, without)


def _companions(request: Request) -> list[tuple[str, Role]]:
    """Smaller and trained models: those named, else those that come with tubelet."""
    small = request.small
    if small is None:
        small = tuple(name for name in shipped() if name.startswith("tubelet-vit-small"))
    trained = request.trained
    if trained is None and not request.quick and ELASTIC in shipped():
        trained = ELASTIC
    found: list[tuple[str, Role]] = [(name, "small") for name in small]
    return found if trained is None else [*found, (trained, "trained")]


def _about(host: Host) -> dict[str, Any]:
    parameters = sum(weight.numel() for weight in host.model.parameters())
    return {
        "name": host.name,
        "role": host.role,
        "sha256": host.checksum,
        "parameters": parameters,
    }


def _check_patience(
    request: Request,
    host: Host,
    variants: Sequence[Variant],
    pairs: Sequence[tuple[str, str]],
) -> None:
    """Refuse a run of many minutes on a CPU that nobody confirmed."""
    device = host.weights.device
    if device.type == "cuda" or request.quick or request.yes:
        return
    blank = torch.zeros(2, TASKS[pairs[0][0]].frames, 3, SIZE, SIZE)
    with torch.inference_mode():
        host.answer(blank, pairs[0][0])
        each = seconds(lambda: host.answer(blank, pairs[0][0]), device) / 2
    # A variant costs about its share of the tokens; without a budget it counts whole.
    work = sum(1.0 if v.keep is None else v.keep for v in variants)
    total = each * work * request.clips * len(pairs)
    if total > PATIENCE:
        raise TubeletError(
            f"this would take about {in_words(total)} on this CPU ({1 / each:.1f} dense clips per "
            f"second, {len(variants)} variants, {len(pairs)} cells of {request.clips} clips); use "
            "--device cuda, --quick, fewer --clips, or confirm with --yes"
        )


def in_words(total: float) -> str:
    """Seconds as minutes or hours."""
    return f"{total / 3600:.1f} hours" if total >= 5400 else f"{total / 60:.0f} minutes"


class _Bench:
    """The running measurement: what is shared by all cells."""

    def __init__(
        self,
        request: Request,
        hosts: Sequence[Host],
        variants: Sequence[Variant],
        device: torch.device,
        make: MakeClips,
        progress: Progress,
        num_cells: int,
    ) -> None:
        self.request, self.hosts, self.variants, self.device = request, hosts, variants, device
        self.make, self.progress = make, progress
        self.batch = 8 * CHUNK if device.type == "cuda" else CHUNK
        self.macs: dict[tuple[str, int], int] = {}
        self.done = 0
        self.total = num_cells * len(variants) * -(-request.clips // self.batch)

    def cell(self, task: str, background: str) -> Cell:
        """Variants, then probes, on the test clips of one cell."""
        facts, seen = TASKS[task], Features()
        empty = Cell(
            task=task, background=background, chance=facts.chance, floors=control_floors(task)
        )

        def tick(name: str) -> None:
            self.done += 1
            self.progress(f"{task} on {background}: {name}", self.done, self.total)

        cell = evaluate_cell(
            empty,
            self.variants,
            self.clips(task, background, TEST_SEED),
            lambda v, pixels: v.host.geometry(pixels.shape[1], tuple(pixels.shape[3:])),
            self.macs,
            tick,
            (lambda clips: None) if is_dense(task) else seen.add,
        )
        if not is_dense(task):
            self.progress(f"{task} on {background}: probes", self.done, self.total)
            train = Features(self.clips(task, background, PROBE_SEED))
            for name, scores in probe_scores(train, seen, facts.classes).items():
                cell.entries[name] = Entry(setting=name, share=0.0, macs=0, scores=scores)
        return cell

    def clips(self, task: str, background: str, first_seed: int, num: int | None = None):
        """Batches of this run's clips."""
        return clip_batches(
            self.make,
            task,
            background,
            num or self.request.clips,
            self.batch,
            self.hosts[0].tubelet,
            self.device,
            first_seed,
        )

    def latencies(self, pairs: Sequence[tuple[str, str]]) -> list[Latency]:
        """Of all variants on the first task; of recipes that follow the clip on each background."""
        cuda = self.device.type == "cuda"
        task = next((task for task, _ in pairs if TASKS[task].frames == 16), pairs[0][0])
        backgrounds = list(dict.fromkeys(background for _, background in pairs))
        found: list[Latency] = []
        for batch in (64, 1) if cuda else ((1,) if self.request.quick else (8, 1)):
            repeats = 30 if cuda else (1 if self.request.quick else 5)
            for number, background in enumerate(backgrounds):
                clips = next(iter(self.clips(task, background, TEST_SEED, batch)))
                chosen = self._timed(clips, number == 0)
                found += time_variants(chosen, clips, background, repeats, self._tell)
            found += _shared([x for x in found if x.batch == batch], backgrounds)
        return found

    def _timed(self, clips: Clips, first: bool) -> list[Variant]:
        shape = clips.pixels.shape
        there = [v for v in self.variants if v.kind != "control"]

        def follows(variant: Variant) -> bool:
            return variant.ragged(variant.host.geometry(shape[1], tuple(shape[3:])))

        return there if first else [there[0], *[v for v in there[1:] if follows(v)]]

    def _tell(self, what: str) -> None:
        self.progress(what, self.done, self.total)


def _shared(found: Sequence[Latency], backgrounds: Sequence[str]) -> list[Latency]:
    """Latencies that do not depend on the clip, copied to the backgrounds they were not run on."""
    there = {(x.variant, x.background) for x in found}
    first = [x for x in found if x.background == backgrounds[0]]
    return [
        replace(x, background=background)
        for background in backgrounds[1:]
        for x in first
        if (x.variant, background) not in there
    ]


def control_floors(task: str) -> dict[str, float]:
    """Best score without the skill, by control; controls without a stated floor are left out."""
    facts = TASKS[task]
    if is_dense(task):
        # Masks overlap by chance, by an amount that nobody has stated.
        return {}
    floors = {"shuffled labels": facts.chance}
    floors |= dict.fromkeys(PROBES, facts.floor)
    for control, denied in (("shuffled frames", "shuffled"), ("single frame", "single frame")):
        if denied in facts.floors:
            floors[control] = facts.floors[denied]
    return floors
