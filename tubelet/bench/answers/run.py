"""`tubelet bench answers`: check everything, then ask part by part."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tubelet.bench.answers.ask import ask, encoded_once, search
from tubelet.bench.answers.page import render
from tubelet.bench.answers.quiz import (
    CALIBRATION_SEED,
    PART,
    Prompts,
    Quiz,
    check_words,
    draw_quiz,
)
from tubelet.bench.answers.result import (
    Answers,
    Cell,
    Entry,
    Line,
    entry_of,
    join,
    merge_cells,
    read_answers,
    write_answers,
)
from tubelet.bench.answers.settings import (
    KEEPS,
    Recipes,
    Shape,
    Variant,
    check_families,
    make_variants,
)
from tubelet.bench.answers.tables import markdown
from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.fidelity.budgets import check_keep
from tubelet.bench.fidelity.run import PATIENCE, REPORTED, in_words
from tubelet.bench.llm.measure import reason
from tubelet.bench.run import hush_transformers
from tubelet.bench.shards import shard_of
from tubelet.core.errors import NoEffectWarning, TubeletError, UnsupportedError
from tubelet.core.files import check_folder, write_whole
from tubelet.core.grid import TokenGrid
from tubelet.models.catalogue import adapter_for
from tubelet.models.load import checked_device
from tubelet.nn.video_llm import VideoLLM, VideoLLMConfig
from tubelet.nn.weights import load_weights, read_card
from tubelet.train.clips import BACKGROUNDS, TEST_SEED
from tubelet.train.questions import KINDS, words

FILES = ("answers.json", "answers.html", "answers.md")

MODEL = "tubelet-llm"

UNTRAINED = "untrained, made for a smoke test"

QUICK_MODEL = {
    "encoder": "tubelet-vit-small",
    "taps": (0, 2),
    "pooled": True,
    "width": 32,
    "depth": 4,
    "heads": 2,
    "mlp_width": 64,
}
"""A model for smoke tests: large enough for every recipe to act, and without any training."""

QUICK_RECIPES = ("VidCom2", "FastV", "LLaVAScissor", "HoliTom + HoliTomInner", "AShape", "ZipCache")

CALIBRATED = 32
"""Questions about whose clips thresholds are searched, at least one of each kind."""

MOST = {"cuda": 256, "cpu": 32}
"""Questions asked at once, by type of device."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; see the options of `tubelet bench answers`."""

    out: Path
    model: str | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    backgrounds: tuple[str, ...] = REPORTED
    recipes: tuple[str, ...] = ()
    keeps: tuple[float, ...] = KEEPS
    clips: int = 128
    device: str = "cpu"
    shard: tuple[int, int] = (1, 1)
    quick: bool = False
    yes: bool = False


def quick(request: Request) -> Request:
    """The same request cut down to a smoke test of seconds."""
    return replace(
        request,
        kinds=tuple(k for k in request.kinds if k in ("colour", "hit")) or request.kinds[:1],
        backgrounds=request.backgrounds[:2],
        recipes=request.recipes or QUICK_RECIPES,
        keeps=request.keeps[:2],
        clips=min(request.clips, 4),
    )


def run_answers(request: Request, progress: Progress) -> Answers:
    """Ask and write `FILES`.

    Everything that can be wrong with the request is checked before anything is asked. A variant
    that fails is left out with its reason, and the others go on.

    Raises:
        TubeletError: Unknown kind, background, recipe, device or weights, a number out of range,
            weights of another architecture, a model that lacks words, or a folder that cannot be
            written.
    """
    request = quick(request) if request.quick else request
    parts = checked_parts(request)
    check_folder(request.out, FILES)
    device = checked_device(request.device)
    hush_transformers()
    progress("loading the model", 0, 1)
    with _model(request, device) as (llm, about), warnings.catch_warnings():
        # At some threshold of a search nothing happens; what a variant did is in the result.
        warnings.simplefilter("ignore", NoEffectWarning)
        run: Answers | None = None
        for run in measure(request, llm, about, parts, progress):
            # Anew behind every part, so that a run cut off keeps them.
            request.out.mkdir(parents=True, exist_ok=True)
            write_answers(request.out / "answers.json", run)
    # A shard without parts was refused.
    assert run is not None
    write(request.out, run)
    return run


def join_files(paths: Sequence[str | os.PathLike[str]], out: Path) -> Answers:
    """Join shards and write the same files.

    Raises:
        TubeletError: A file cannot be read, or the shards do not belong together.
    """
    check_folder(out, FILES)
    run = join([read_answers(path) for path in paths])
    write(out, run)
    return run


def write(out: Path, run: Answers) -> None:
    """The files of a result."""
    out.mkdir(parents=True, exist_ok=True)
    write_answers(out / "answers.json", run)
    write_whole(out / "answers.html", render(run))
    write_whole(out / "answers.md", markdown(run))


def checked_parts(request: Request) -> list[tuple[str, int]]:
    """(background, part of the questions) of this shard, after checking all that needs no model.

    Raises:
        TubeletError: Naming what is wrong and what is known.
    """
    for what, names, known in (
        ("kind of question", request.kinds, KINDS),
        ("background", request.backgrounds, BACKGROUNDS),
    ):
        for name in names:
            if name not in known:
                raise UnsupportedError(f"unknown {what} {name!r}; there are {', '.join(known)}")
        if not names or len(set(names)) < len(names):
            raise UnsupportedError(f"name each {what} once, and at least one")
    check_families(request.recipes)
    if request.clips < 1:
        raise TubeletError(f"clips must be at least 1, got {request.clips}")
    for keep in request.keeps:
        # The least number of video tokens that tubelet's own models have.
        check_keep(keep, 64)
    if not request.keeps or 1.0 in request.keeps:
        raise TubeletError("--keep takes shares below 1; dense is always measured")
    pairs = [(name, part) for name in request.backgrounds for part in range(_parts(request.clips))]
    return shard_of(pairs, request.shard, f"has nothing to ask; there are {len(pairs)} parts")


def _parts(clips: int) -> int:
    return -(-clips // PART)


@contextmanager
def _model(request: Request, device: torch.device) -> Iterator[tuple[VideoLLM, dict[str, Any]]]:
    """The model on its device, and what is known about it."""
    if request.model is None and request.quick:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            llm = VideoLLM(VideoLLMConfig(words=words(), **QUICK_MODEL))
        name, checksum = UNTRAINED, None
    else:
        name = request.model or MODEL
        llm = load_weights(name, expect="VideoLLM")
        checksum = read_card(name).sha256
    check_words(llm, name)
    about = {
        "name": name,
        "sha256": checksum,
        "parameters": sum(weight.numel() for weight in llm.parameters()),
        "encoder": llm.config.encoder,
        "encoder_sha256": llm.config.encoder_sha256,
    }
    llm = llm.to(device).eval()
    with encoded_once(llm):
        yield llm, about


def shape_of(llm: VideoLLM) -> Shape:
    """What settings depend on."""
    frames = llm.tower.config.num_frames
    side = round((llm.num_video / frames) ** 0.5)
    grid = TokenGrid(frames=frames, height=side, width=side)
    return Shape(depth=len(llm.host.model.language_model.layers), grid=grid)


def measure(
    request: Request,
    llm: VideoLLM,
    about: dict[str, Any],
    parts: Sequence[tuple[str, int]],
    progress: Progress,
) -> Iterator[Answers]:
    """A checked request with a loaded model; yields the result so far behind every part."""
    device = next(llm.parameters()).device
    shape = shape_of(llm)
    lacks = adapter_for(llm.host).lacks(llm.host)
    variants, notes = make_variants(request.keeps, shape, request.recipes, lacks)
    _check_patience(request, llm, variants, parts)
    bench = _Bench(request, llm, variants, device, progress, len(parts))
    bench.calibrate()
    if request.quick:
        notes.insert(0, "a smoke test: too few questions to conclude anything")
    where = environment(device)
    run = Answers(
        environment=where,
        commands=[where["command"]],
        model=about,
        precision=str(next(llm.parameters()).dtype).removeprefix("torch."),
        clips=request.clips,
        parts=_parts(request.clips),
        wanted=list(request.backgrounds),
        kinds=list(request.kinds),
        chances={name: KINDS[name].chance for name in request.kinds},
        first_seed=TEST_SEED,
        num_video=llm.num_video,
        depth=shape.depth,
        quick=request.quick,
        variants={
            v.name: Line(family=v.family, kind=v.kind, keep=v.keep, setting=v.setting)
            for v in bench.variants
        },
        failures=bench.failures,
        notes=notes,
    )
    cells: list[Cell] = []
    for background, part in parts:
        cells.append(bench.cell(background, part))
        yield replace(run, cells=merge_cells(cells))


def _check_patience(
    request: Request,
    llm: VideoLLM,
    variants: Sequence[Variant],
    parts: Sequence[tuple[str, int]],
) -> None:
    """Refuse a run of many minutes on a CPU that nobody confirmed."""
    device = next(llm.parameters()).device
    if device.type == "cuda" or request.quick or request.yes:
        return
    few = draw_quiz(llm, request.kinds[:1], request.backgrounds[0], 0, 2, device)
    each = ask(llm, Prompts(llm, few), ()).seconds
    questions = sum(min(PART, request.clips - part * PART) for _, part in parts)
    total = each * len(variants) * questions * len(request.kinds)
    if total > PATIENCE:
        raise TubeletError(
            f"this would take up to {in_words(total)} on this CPU ({1 / each:.1f} dense questions "
            f"per second, {len(variants)} variants); use --device cuda, --quick, fewer --clips or "
            "--recipes, or confirm with --yes"
        )


class _Bench:
    """The running measurement."""

    def __init__(
        self,
        request: Request,
        llm: VideoLLM,
        variants: Sequence[Variant],
        device: torch.device,
        progress: Progress,
        num_parts: int,
    ) -> None:
        self.request, self.llm, self.device, self.progress = request, llm, device, progress
        self.variants = list(variants)
        self.failures: dict[str, str] = {}
        self.most = MOST.get(device.type, MOST["cpu"])
        self.done, self.total = 0, num_parts * len(variants)

    def calibrate(self) -> None:
        """Search what decides how many tokens stay, on clips of their own on all backgrounds."""
        swept = [v for v in self.variants if v.sweep is not None]
        if not swept:
            return
        wanted = CALIBRATED // 4 if self.request.quick else CALIBRATED
        each = max(1, wanted // len(self.request.kinds) // len(self.request.backgrounds))
        drawn = [
            self._quiz(background, 0, min(each, PART), CALIBRATION_SEED)
            for background in self.request.backgrounds
        ]
        quiz = Quiz(
            pixels=torch.cat([part.pixels for part in drawn]),
            **{
                name: [x for part in drawn for x in getattr(part, name)]
                for name in ("questions", "answers", "kinds")
            },
        )
        prompts = Prompts(self.llm, quiz)
        known: dict[tuple[str, float | None], Recipes] = {}
        for variant in swept:
            self.progress(f"{variant.name}: searching", 0, self.total)
            assert variant.sweep is not None
            assert variant.keep is not None
            key = variant.family.split(" + ")[0], variant.keep
            if key not in known:
                known[key] = search(self.llm, prompts, variant.sweep, variant.keep)
            found = replace(variant, recipes=(*known[key], *variant.sweep.second))
            self.variants[self.variants.index(variant)] = found

    def cell(self, background: str, part: int) -> Cell:
        """Every variant on one part of the questions."""
        each = min(PART, self.request.clips - part * PART)
        batches = self._quiz(background, part, each).split(self.most)
        prompts = [Prompts(self.llm, batch) for batch in batches]
        cell = Cell(background=background, parts=[part])
        for variant in self.variants:
            self.done += 1
            self.progress(f"{background}, part {part + 1}: {variant.name}", self.done, self.total)
            entry = self._entry(variant, prompts)
            if entry is not None:
                cell.entries[variant.name] = entry
        return cell

    def _entry(self, variant: Variant, prompts: Sequence[Prompts]) -> Entry | None:
        """None where the variant fails, now or before."""
        if variant.name in self.failures:
            return None
        try:
            outcomes = [ask(self.llm, batch, variant.recipes) for batch in prompts]
        except Exception as error:
            if not variant.recipes:
                raise
            self.failures[variant.name] = reason(error)
            return None
        sizes = [len(batch) for batch in prompts]
        return entry_of(outcomes, sizes, len(self.request.kinds))

    def _quiz(self, background: str, part: int, each: int, first_seed: int = TEST_SEED) -> Quiz:
        kinds = self.request.kinds
        return draw_quiz(self.llm, kinds, background, part, each, self.device, first_seed)
