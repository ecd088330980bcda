"""`tubelet bench llm`: check everything, then measure recipe by recipe."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.generators.combinations import Combination, read_combinations
from tubelet.bench.llm.inputs import Task, read_frames
from tubelet.bench.llm.measure import Announce, LLMBench
from tubelet.bench.llm.page import render
from tubelet.bench.llm.result import LLMRun, Row, merged, read_runs, write_runs
from tubelet.bench.llm.table import markdown
from tubelet.bench.run import hush_transformers
from tubelet.bench.shards import shard_of
from tubelet.core.errors import NoEffectWarning, TubeletError, UnsupportedError
from tubelet.core.files import check_folder, write_whole
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import PositionPolicy
from tubelet.models.llm_inputs import clip_shape
from tubelet.models.llm_presets import LoadedLLM, llm_setting, load_llm
from tubelet.models.load import checked_device
from tubelet.models.vision_fusion import VisionFusion, fuse_vision
from tubelet.recipes import catalogue

FILES = ("llm.json", "llm.md", "llm.html")

KEEP = 0.25
CONTROLS = ("RandomPrompt", "UniformFrames")
"""What every choice of tokens has to beat; they come first."""

PRECISIONS = ("bfloat16", "float16", "float32")

LEAST_PROMPT = 2
"""Words behind a video without which an answer has nothing to stand on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; see the options of `tubelet bench llm`."""

    out: Path
    preset: str | None = None
    recipes: tuple[str, ...] = ()
    keep: float = KEEP
    grid: tuple[int, int, int] | None = None
    clip: str | None = None
    question: int = 32
    new_tokens: int = 32
    concurrencies: tuple[int, ...] = (1, 8, 32)
    repeats: int | None = None
    layers: int | None = None
    vision: str = "fused"
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    shard: tuple[int, int] = (1, 1)
    quick: bool = False

    @property
    def model(self) -> str:
        """Preset or folder."""
        return self.preset or ("tiny-qwen3-vl" if self.quick else "qwen3-vl-8b")


def run_llm(request: Request, progress: Progress, announce: Announce) -> list[LLMRun]:
    """Measure and write `FILES`, anew after every recipe, so that a run cut off keeps them.

    Everything that can be wrong with the request is checked before the model is built. A recipe
    that the model refuses, or that fails, is recorded with its reason, and the others go on.

    Args:
        request: What to run.
        progress: Told what happens.
        announce: Told each bound before the measurement, and the measurement after it.

    Raises:
        TubeletError: Unknown model, recipe or device, a number out of range, a clip that cannot
            be read, a folder that cannot be written, or not one recipe that ran.
    """
    request = _quick(request) if request.quick else request
    every = _combinations(request)
    combinations = shard_of(every, request.shard, f"has no recipe; there are {len(every)}")
    _check(request)
    device = checked_device(request.device)
    check_folder(request.out, FILES)
    hush_transformers()
    task, decode_video = _task(request)
    progress(f"building {request.model}", 0, 1)
    loaded = load_llm(
        request.model,
        dtype=getattr(torch, request.dtype),
        device=device,
        layers=request.layers,
        seed=request.seed,
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(warnings.catch_warnings())
        # A recipe without effect becomes a note, once.
        warnings.simplefilter("ignore", NoEffectWarning)
        fusion = _fusion(request, loaded)
        if isinstance(fusion, VisionFusion):
            stack.enter_context(fusion)
        bench = LLMBench(
            loaded,
            task,
            device,
            repeats=_repeats(request, device),
            new_tokens=request.new_tokens,
            concurrencies=request.concurrencies,
            progress=progress,
            announce=announce,
        )
        run = _describe(request, bench, decode_video, fusion)
        run.rows.append(bench.dense())
        request.out.mkdir(parents=True, exist_ok=True)
        write(request.out, [run])
        for recipes in combinations:
            row = bench.attempt(recipes)
            run.rows.append(row)
            if _without_effect(row):
                run.notes.append(f"{row.name} never changed anything on this prompt")
            write(request.out, [run])
    if all(row.error is not None for row in run.rows[1:]):
        raise TubeletError(f"no recipe was measured: {run.rows[-1].error}")
    return [run]


def join_files(paths: Sequence[str | os.PathLike[str]], out: Path) -> list[LLMRun]:
    """Put the runs of several files into one, shards of a run together, and write the same files.

    Raises:
        TubeletError: A file cannot be read, or the folder cannot be written.
    """
    check_folder(out, FILES)
    runs = merged([run for path in paths for run in read_runs(path)])
    out.mkdir(parents=True, exist_ok=True)
    write(out, runs)
    return runs


def write(out: Path, runs: Sequence[LLMRun]) -> None:
    """The files of a result."""
    write_runs(out / "llm.json", runs)
    write_whole(out / "llm.md", markdown(runs))
    write_whole(out / "llm.html", render(runs))


def default_combinations(keep: float) -> list[Combination]:
    """Every recipe for prompts with a `keep_ratio`, at that ratio, the controls first."""
    named = {
        name: cls
        for name, cls in catalogue().items()
        if issubclass(cls, PositionPolicy)
        and any(field.name == "keep_ratio" for field in dataclasses.fields(cls))
    }
    order = [*CONTROLS, *(name for name in named if name not in CONTROLS)]
    return [(named[name](keep_ratio=keep),) for name in order]  # type: ignore[call-arg]


def _combinations(request: Request) -> list[Combination]:
    if not 0 < request.keep <= 1:
        raise TubeletError(f"--keep must be in (0, 1], got {request.keep:g}")
    if request.recipes:
        return read_combinations(request.recipes)
    return default_combinations(request.keep)


def _quick(request: Request) -> Request:
    """The same request cut down to a smoke test of seconds."""
    return replace(
        request,
        recipes=request.recipes or tuple(f"{name}(keep_ratio={KEEP})" for name in CONTROLS),
        concurrencies=tuple(n for n in request.concurrencies if n <= 2) or (1,),
        new_tokens=min(request.new_tokens, 4),
        question=min(request.question, 8),
        repeats=request.repeats or 1,
    )


def _check(request: Request) -> None:
    if request.dtype not in PRECISIONS:
        raise TubeletError(f"--dtype must be {', '.join(PRECISIONS)}, got {request.dtype!r}")
    if request.vision not in ("fused", "host"):
        raise TubeletError(f"--vision must be fused or host, got {request.vision!r}")
    if request.question < LEAST_PROMPT or request.new_tokens < 1:
        raise TubeletError(
            f"an answer needs a question of {LEAST_PROMPT} words and a token of its own behind the "
            f"first, got {request.question} and {request.new_tokens}"
        )
    if not request.concurrencies or min(request.concurrencies) < 1:
        raise TubeletError(f"--concurrency takes numbers from 1, got {request.concurrencies}")
    if request.grid is not None and min(request.grid) < 1:
        raise TubeletError(f"--grid takes sizes such as 64x16x16, got {request.grid}")


def _task(request: Request) -> tuple[Task, float | None]:
    """What is answered, and the seconds that reading the clip took."""
    config, grid = llm_setting(request.model, request.layers)
    if request.grid is not None:
        frames, height, width = request.grid
        grid = TokenGrid(frames=frames, height=height, width=width)
    clip_shape(config, grid)
    clip: Tensor | None = None
    spent: float | None = None
    if request.clip is not None:
        clip, spent = read_frames(request.clip, config, grid)
    return Task(grid=grid, question=request.question, seed=request.seed, clip=clip), spent


def _repeats(request: Request, device: torch.device) -> int:
    return request.repeats or (3 if device.type == "cuda" else 2)


def _fusion(request: Request, loaded: LoadedLLM) -> VisionFusion | str | None:
    """The vision tower made faster, for dense and recipes alike; or why it is not, if unasked."""
    if request.vision == "host":
        return None
    try:
        return fuse_vision(loaded.model)
    except UnsupportedError as error:
        return str(error)


def _describe(
    request: Request,
    bench: LLMBench,
    decode_video: float | None,
    fusion: VisionFusion | str | None,
) -> LLMRun:
    model, grid = bench.model, bench.task.grid
    frames, height, width = clip_shape(model.config, grid)
    source = "rendered clips" if request.clip is None else Path(request.clip).name
    text = model.config.get_text_config()._attn_implementation
    tower = model.config.vision_config._attn_implementation
    notes = _notes(request, bench.loaded)
    if isinstance(fusion, VisionFusion):
        tower = f"{tower}; fused: {fusion}"
        notes.append(
            f"the vision tower runs fused, dense or not ({fusion}); `tubelet bench llm --vision "
            "host` measures the host's own"
        )
    elif fusion is not None:
        notes.append(f"the vision tower runs as the host has it: {fusion}")
    return LLMRun(
        environment=environment(bench.device),
        model=bench.loaded.name,
        random_weights=bench.loaded.random_weights,
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=len(bench.text.layers),
        grid=[grid.frames, grid.height, grid.width],
        input=f"{source}, {frames} frames of {height}x{width}",
        video_tokens=grid.num_video,
        prompt_tokens=bench.prompt_tokens,
        new_tokens=request.new_tokens,
        precision=request.dtype,
        attention={"text": text, "vision": tower},
        decode_video=decode_video,
        repeats=bench.repeats,
        seed=request.seed,
        quick=request.quick,
        notes=notes,
    )


def _notes(request: Request, loaded: LoadedLLM) -> list[str]:
    notes = [
        "the bound counts vision tower and language model up to the first token at the tokens that "
        "were kept; deciding, gathering and what `generate` does around them are not in it",
        "batches are timed once each behind a warm-up, the dense ones first; times of single "
        "prompts are taken in turns with dense",
    ]
    if request.quick:
        notes.insert(0, "a smoke test: sizes too small to conclude anything")
    if loaded.random_weights:
        notes.append(
            "random weights: speed, bytes and token counts are real, agreement is no measure of "
            "quality"
        )
    if request.layers is not None:
        notes.append(f"{request.layers} layers of the language model instead of its own")
    return notes


def _without_effect(row: Row) -> bool:
    done = row.report
    shrunk = any(change["after"] < change["before"] for change in done.get("changes", ()))
    return row.error is None and not (shrunk or done["attention"] or done["stored"])
