"""`tubelet bench generation`: how close other ways of drawing a clip come to the dense run.

Every variant starts from the same noise as the dense reference, and each clip is compared with its
own reference: across different noises these figures mean nothing. What the dense model already
differs by from itself, with another kernel or precision, is the noise floor.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.fidelity import generation_curves
from tubelet.bench.fidelity.generation_curves import Named, Work, curve_recipes, work_of
from tubelet.bench.fidelity.generation_result import (
    FILES,
    Generation,
    Kind,
    Outcome,
    join,
    label_all,
    read_generation,
)
from tubelet.bench.fidelity.generation_tables import write_generation
from tubelet.bench.fidelity.run import PATIENCE, in_words
from tubelet.bench.generators.combinations import name_of, read_combinations, refuse_early
from tubelet.bench.generators.prediction import at_once, sites_of
from tubelet.bench.measure import seconds
from tubelet.bench.quality import fidelity
from tubelet.bench.shards import shard_of
from tubelet.core.errors import TubeletError
from tubelet.core.files import check_folder
from tubelet.core.handle import Handle
from tubelet.core.recipe import Recipe
from tubelet.kernels.attention import attention
from tubelet.models.accelerate import accelerate
from tubelet.models.load import checked_device
from tubelet.nn.flow import METHODS, generate
from tubelet.nn.weights import load_weights, read_card
from tubelet.train.detector import detect
from tubelet.train.world import ATTRIBUTES, complete_attributes

FEWER = (2, 3, 4, 6)
"""The steps of the reference are divided by these for the controls."""

PAIRS = 24
"""Clips of every way unless asked otherwise."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of drawing the clips.

    Args:
        name: Unique in a run.
        kind: What it is for.
        steps, method: Of the sampler.
        dtype: Autocast; None is float32.
        kernel: Attention implementation instead of the fastest one.
        recipes: Put on the model while it runs.
    """

    name: str
    kind: Kind
    steps: int
    method: str = "euler"
    dtype: torch.dtype | None = None
    kernel: str | None = None
    recipes: tuple[Recipe, ...] = ()

    @property
    def calls(self) -> int:
        """Velocities per clip."""
        return self.steps * METHODS[self.method]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What was asked for; see the options of `tubelet bench generation`."""

    out: Path
    model: str = "tubelet-dit"
    pairs: int | None = None
    steps: int = 24
    guidance: float = 2.0
    device: str = "cpu"
    quick: bool = False
    yes: bool = False
    recipes: tuple[str, ...] = ()
    curves: str | None = None
    dense_steps: float = generation_curves.DENSE_STEPS
    shard: tuple[int, int] = (1, 1)

    @property
    def clips(self) -> int:
        """Pairs, by default fewer for the many ways of curves."""
        if self.pairs is not None:
            return self.pairs
        return PAIRS if self.curves is None else generation_curves.PAIRS


@dataclass
class _Drawn:
    """Clips of one way, with their last state before clamping."""

    pixels: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    work: Work = field(default_factory=Work)


def make_variants(
    steps: int,
    device: torch.device,
    accelerated: Sequence[Named] = (),
    curves: Sequence[Named] = (),
) -> list[Way]:
    """The reference first, then the noise floor, the controls and the accelerated ways.

    Args:
        steps: Euler steps of the reference, >= 2.
        device: CUDA runs in bfloat16 and gets float32 as part of the floor.
        accelerated: Name and recipes of each accelerated way.
        curves: The same of points of curves, and of what compensates them.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else None
    kernel = "flex" if cuda else "reference"
    ways = [
        Way(name=f"dense, {steps} steps", kind="reference", steps=steps, dtype=dtype),
        Way(name="dense again", kind="floor", steps=steps, dtype=dtype),
        Way(name=f"{kernel} attention", kind="floor", steps=steps, dtype=dtype, kernel=kernel),
    ]
    if cuda:
        ways.append(Way(name="float32", kind="floor", steps=steps))
    ways += [
        Way(name=f"{fewer} steps", kind="control", steps=fewer, dtype=dtype)
        for fewer in dict.fromkeys(max(steps // part, 1) for part in FEWER)
    ]
    ways.append(
        Way(
            name=f"midpoint, {steps // 2} steps",
            kind="control",
            steps=steps // 2,
            method="midpoint",
            dtype=dtype,
        )
    )
    for name, recipes in accelerated:
        ways.append(Way(name=name, kind="recipe", steps=steps, dtype=dtype, recipes=recipes))
    for name, recipes in curves:
        kind: Kind = "curve" if len(recipes) == 1 else "compensated"
        ways.append(Way(name=name, kind=kind, steps=steps, dtype=dtype, recipes=recipes))
    return ways


def share_of(ways: Sequence[Way], shard: tuple[int, int]) -> list[Way]:
    """The reference, which all need, and every n-th of the other ways from the i-th.

    Raises:
        TubeletError: Not a shard, or one without a way.
    """
    first, *others = ways
    return [first, *shard_of(others, shard, f"has nothing to draw: {len(others)} ways")]


def run_generation(
    request: GenerationRequest,
    progress: Progress,
    announce: Callable[[str], None] = lambda words: None,
) -> Generation:
    """Measure and write `generation.json`, `generation.html` and `generation.md`.

    The first of them is written after every way, so that a run that is cut off keeps what it has.

    Args:
        request: What to do.
        progress: Told what is drawn.
        announce: Told before the start how long it will take.

    Raises:
        TubeletError: Unknown or damaged model or recipe, a number out of range, a folder that
            cannot be written, or a long run on a CPU that was not confirmed.
    """
    if request.quick and request.curves is not None:
        request = replace(request, pairs=min(request.clips, 2), steps=min(request.steps, 4))
    for name, value, least in (("pairs", request.clips, 1), ("steps", request.steps, 2)):
        if value < least:
            raise TubeletError(f"{name} must be at least {least}, got {value}")
    accelerated = [(name_of(recipes), recipes) for recipes in read_combinations(request.recipes)]
    curves = _curves(request)
    check_folder(request.out, FILES)
    device = checked_device(request.device)
    ways = share_of(make_variants(request.steps, device, accelerated, curves), request.shard)
    progress("loading the model", 0, 1)
    model = load_weights(request.model, expect="VideoDiT", device=device)
    if tuple(model.config.attributes) != tuple(len(v) for v in ATTRIBUTES.values()):
        raise TubeletError(f"{request.model} was not trained on the attributes of tubelet's world")
    refuse_early(model, [way.recipes for way in ways if way.recipes])
    checksum = read_card(request.model).sha256

    def keep(found: Generation) -> None:
        request.out.mkdir(parents=True, exist_ok=True)
        found.to_json(request.out / FILES[0])

    found = measure(request, model, checksum, ways, progress, keep, announce)
    write_generation(request.out, found)
    return found


def _curves(request: GenerationRequest) -> list[Named]:
    if request.curves is None:
        return []
    if request.recipes:
        raise TubeletError("--curves has its own recipes; give --recipe in another run")
    if not 0 <= request.dense_steps < 1:
        raise TubeletError(f"--dense-steps must be in [0, 1), got {request.dense_steps:g}")
    if round(request.dense_steps * request.steps) >= request.steps:
        raise TubeletError(f"--dense-steps {request.dense_steps:g} leaves no sparse step")
    return curve_recipes(request.curves, request.dense_steps, request.quick)


def join_files(paths: Sequence[str | os.PathLike[str]], out: Path) -> Generation:
    """Join the results of shards, and write the same three files.

    Raises:
        TubeletError: A file cannot be read, or the results do not belong together.
    """
    check_folder(out, FILES)
    found = join([read_generation(path) for path in paths])
    write_generation(out, found)
    return found


def measure(
    request: GenerationRequest,
    model: nn.Module,
    checksum: str,
    ways: Sequence[Way],
    progress: Progress,
    keep: Callable[[Generation], None] = lambda found: None,
    announce: Callable[[str], None] = lambda words: None,
) -> Generation:
    """Draw all clips in every way and compare them with the reference, `ways[0]`.

    A point of a curve that fails becomes a note, and the others go on. `keep` is given what there
    is after every way.
    """
    device = next(model.parameters()).device
    pairs, shape = request.clips, (model.config.frames, tuple(model.config.size))
    if request.quick:
        pairs, shape = min(pairs, 4), (min(shape[0], 8), tuple(min(n, 32) for n in shape[1]))
    _tell_cost(request, model, ways, pairs, shape, announce)
    attributes = complete_attributes(torch.full((pairs, len(ATTRIBUTES)), -1), seed=0)
    found = Generation(
        model=request.model,
        sha256=checksum,
        pairs=pairs,
        clip=[shape[0], *shape[1]],
        guidance=request.guidance,
        precision="bfloat16 autocast" if device.type == "cuda" else "float32",
        quick=request.quick,
        environment=environment(device),
        outcomes=[],
        dense_steps=None if request.curves is None else request.dense_steps,
    )
    if request.quick:
        found.notes.append("a smoke test on small clips: too few to conclude anything")
    reference: _Drawn | None = None
    for done, way in enumerate(ways):
        progress(way.name, done, len(ways))
        drawn = _attempt(model, way, attributes, shape, request.guidance, found.notes)
        if drawn is None:
            continue
        reference = reference or drawn
        found.outcomes.append(_outcome(way, drawn, reference, attributes))
        label_all(found.outcomes)
        left = len(ways) - 1 - done
        if left:
            keep(replace(found, notes=[*found.notes, f"cut off: {left} ways are missing"]))
    return found


def _attempt(
    model: nn.Module,
    way: Way,
    attributes: Tensor,
    shape: tuple[int, tuple[int, ...]],
    guidance: float,
    notes: list[str],
) -> _Drawn | None:
    """`_draw`, where only what was asked for by name may end the run."""
    if way.kind not in ("curve", "compensated"):
        return _draw(model, way, attributes, shape, guidance)
    try:
        return _draw(model, way, attributes, shape, guidance)
    except Exception as error:
        # Out of memory, a failing compiler: the others go on.
        words = " ".join(str(error).split()) or type(error).__name__
        notes.append(f"{way.name} was not drawn: {type(error).__name__}: {words[:300]}")
        return None


def _batch(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 2


def _draw(
    model: nn.Module,
    way: Way,
    attributes: Tensor,
    shape: tuple[int, tuple[int, ...]],
    guidance: float,
) -> _Drawn:
    """All clips of one way, in batches, behind a short warm-up that meets every kernel."""
    batch = _batch(next(model.parameters()).device)
    drawn = _Drawn()
    last: list[Tensor] = []

    def remember(step: int, x: Tensor, velocity: Tensor) -> None:
        last[:] = [x]

    def draw(first: int, steps: int) -> Tensor:
        return generate(
            model,
            attributes[first : first + batch],
            seed=first,
            steps=steps,
            method=way.method,
            guidance=guidance,
            frames=shape[0],
            size=shape[1],
            dtype=way.dtype,
            callback=remember,
        )

    # Terms that compare with a dense call act from the second sparse step on.
    warm_up = replace(way, steps=2 if way.recipes else 1, recipes=tuple(map(at_once, way.recipes)))
    with _prepared(model, warm_up):
        draw(0, warm_up.steps)
    with _prepared(model, way) as handle:
        for first in range(0, len(attributes), batch):
            start = time.perf_counter()
            pixels = draw(first, way.steps).cpu()
            drawn.seconds += time.perf_counter() - start
            drawn.pixels.append(pixels)
            drawn.state.append(last[0].cpu())
        if isinstance(handle, Handle):
            drawn.work = work_of(handle.report(), way.recipes, len(sites_of(model)))
    return drawn


def _prepared(model: nn.Module, way: Way) -> AbstractContextManager[Any]:
    """The model with the way's kernel or recipes on it."""
    if way.recipes:
        return accelerate(model, *way.recipes, num_steps=way.steps)
    if way.kernel is None:
        return nullcontext()
    stack, kernel = ExitStack(), _Kernel(way.kernel)
    for module in model.modules():
        if getattr(module, "runtime", kernel) is None:
            module.runtime = kernel  # type: ignore[assignment]
            stack.callback(setattr, module, "runtime", None)
    return stack


class _Kernel:
    """Stands where an adapter's runtime does, and computes every call with one implementation."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        host: Callable[[], Tensor],
    ) -> Tensor:
        return attention(q, k, v, scale=scale, impl=self.impl)[0].transpose(1, 2)


def _outcome(way: Way, drawn: _Drawn, reference: _Drawn, attributes: Tensor) -> Outcome:
    """Figures of every pair."""
    ours, dense = torch.cat(drawn.pixels), torch.cat(reference.pixels)
    state, dense_state = torch.cat(drawn.state), torch.cat(reference.state)
    measured = fidelity(ours, dense)
    hits = (detect(ours) == attributes).double().mean(1)
    apart = (state - dense_state).double().flatten(1).norm(dim=1)
    return Outcome(
        name=way.name,
        kind=way.kind,
        calls=way.calls,
        seconds=drawn.seconds / len(ours),
        exact=bool(torch.equal(state, dense_state)),
        density=drawn.work.density,
        computed=drawn.work.computed,
        recipes=[recipe.to_dict() for recipe in way.recipes],
        kernels=list(drawn.work.kernels),
        figures={
            "psnr": measured.psnr.tolist(),
            "ssim": measured.ssim.tolist(),
            "latent_error": (apart / dense_state.double().flatten(1).norm(dim=1)).tolist(),
            "flicker": measured.flicker.tolist(),
            "motion_ratio": measured.motion_ratio.tolist(),
            "sharpness_ratio": measured.sharpness_ratio.tolist(),
            "attributes": hits.tolist(),
            "attributes_to_dense": (hits - (detect(dense) == attributes).double().mean(1)).tolist(),
        },
    )


def _tell_cost(
    request: GenerationRequest,
    model: nn.Module,
    ways: Sequence[Way],
    pairs: int,
    shape: tuple[int, tuple[int, ...]],
    announce: Callable[[str], None],
) -> None:
    """Say how long it will take, and refuse many minutes on a CPU that nobody confirmed."""
    if request.quick:
        return
    device = next(model.parameters()).device
    cuda, branches = device.type == "cuda", 1 if request.guidance == 1 else 2
    batch = branches * min(pairs, _batch(device)) if cuda else 1
    blank = torch.zeros(batch, shape[0], 3, *shape[1], device=device)
    times = torch.zeros(batch, device=device)
    attributes = torch.zeros(batch, len(ATTRIBUTES), dtype=torch.int64, device=device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=cuda)
    with torch.inference_mode(), precision:
        # The first call on a GPU loads and compiles.
        each = [seconds(lambda: model(blank, times, attributes), device) for _ in range(1 + cuda)]
    batches = math.ceil(pairs / _batch(device)) if cuda else branches * pairs
    total = each[-1] * batches * sum(way.calls for way in ways)
    words = f"about {in_words(total)}"
    told = f"{each[-1]:.2g} s per dense model call, {len(ways)} ways, {pairs} clips"
    if total > PATIENCE and not cuda and not request.yes:
        raise TubeletError(
            f"this would take {words} on this CPU ({told}); use --device cuda, --quick, fewer "
            "--pairs or --steps, or confirm with --yes"
        )
    announce(f"{words} if sparse calls take as long as dense ones ({told}), and compiling")
