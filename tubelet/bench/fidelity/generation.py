"""`tubelet bench generation`: how close other ways of drawing a clip come to the dense run.

Every variant starts from the same noise as the dense reference, and each clip is compared with its
own reference: across different noises these figures mean nothing. What the dense model already
differs by from itself, with another kernel or precision, is the noise floor.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.fidelity.generation_result import FILES, Generation, Outcome, label_of
from tubelet.bench.fidelity.generation_tables import write_generation
from tubelet.bench.fidelity.run import PATIENCE, in_words
from tubelet.bench.generators.combinations import name_of, read_combinations, refuse_early
from tubelet.bench.measure import seconds
from tubelet.bench.quality import fidelity
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

Kind = Literal["reference", "floor", "control", "recipe"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of drawing the clips.

    Args:
        name: Unique in a run.
        kind: The dense reference, its noise floor, a control, or recipes on the model.
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
    pairs: int = 24
    steps: int = 24
    guidance: float = 2.0
    device: str = "cpu"
    quick: bool = False
    yes: bool = False
    recipes: tuple[str, ...] = ()


@dataclass
class _Drawn:
    """Clips of one way, with their last state before clamping."""

    pixels: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    density: float | None = None


def make_variants(
    steps: int, device: torch.device, accelerated: Sequence[tuple[str, tuple[Recipe, ...]]] = ()
) -> list[Way]:
    """The reference first, then the noise floor, the controls and the accelerated ways.

    Args:
        steps: Euler steps of the reference, >= 2.
        device: CUDA runs in bfloat16 and gets float32 as part of the floor.
        accelerated: Name and recipes of each accelerated way.
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
    return ways


def run_generation(request: GenerationRequest, progress: Progress) -> Generation:
    """Measure and write `generation.json`, `generation.html` and `generation.md`.

    Raises:
        TubeletError: Unknown or damaged model or recipe, a number out of range, a folder that
            cannot be written, or a long run on a CPU that was not confirmed.
    """
    for name, value, least in (("pairs", request.pairs, 1), ("steps", request.steps, 2)):
        if value < least:
            raise TubeletError(f"{name} must be at least {least}, got {value}")
    accelerated = [(name_of(recipes), recipes) for recipes in read_combinations(request.recipes)]
    check_folder(request.out, FILES)
    device = checked_device(request.device)
    progress("loading the model", 0, 1)
    model = load_weights(request.model, expect="VideoDiT", device=device)
    if tuple(model.config.attributes) != tuple(len(v) for v in ATTRIBUTES.values()):
        raise TubeletError(f"{request.model} was not trained on the attributes of tubelet's world")
    refuse_early(model, [recipes for _, recipes in accelerated])
    checksum = read_card(request.model).sha256
    ways = make_variants(request.steps, device, accelerated)
    found = measure(request, model, checksum, ways, progress)
    write_generation(request.out, found)
    return found


def measure(
    request: GenerationRequest,
    model: nn.Module,
    checksum: str,
    ways: Sequence[Way],
    progress: Progress,
) -> Generation:
    """Draw all clips in every way and compare them with the reference, `ways[0]`."""
    device = next(model.parameters()).device
    pairs, shape = request.pairs, (model.config.frames, tuple(model.config.size))
    if request.quick:
        pairs, shape = min(pairs, 4), (min(shape[0], 8), tuple(min(n, 32) for n in shape[1]))
    _check_patience(request, model, ways, pairs, shape)
    attributes = complete_attributes(torch.full((pairs, len(ATTRIBUTES)), -1), seed=0)
    reference: _Drawn | None = None
    outcomes: list[Outcome] = []
    for done, way in enumerate(ways):
        progress(way.name, done, len(ways))
        drawn = _draw(model, way, attributes, shape, request.guidance)
        reference = reference or drawn
        outcomes.append(_outcome(way, drawn, reference, attributes))
    floor = [outcome for outcome in outcomes if outcome.kind == "floor"]
    for outcome in outcomes:
        outcome.label = label_of(outcome, floor)
    notes = ["a smoke test on small clips: too few to conclude anything"] if request.quick else []
    return Generation(
        model=request.model,
        sha256=checksum,
        pairs=pairs,
        clip=[shape[0], *shape[1]],
        guidance=request.guidance,
        precision="bfloat16 autocast" if device.type == "cuda" else "float32",
        quick=request.quick,
        environment=environment(device),
        outcomes=outcomes,
        notes=notes,
    )


def _draw(
    model: nn.Module,
    way: Way,
    attributes: Tensor,
    shape: tuple[int, tuple[int, ...]],
    guidance: float,
) -> _Drawn:
    """All clips of one way, in batches; the first batch is drawn once more before, as warm-up."""
    device = next(model.parameters()).device
    batch = 8 if device.type == "cuda" else 2
    drawn = _Drawn()
    last: list[Tensor] = []

    def keep(step: int, x: Tensor, velocity: Tensor) -> None:
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
            callback=keep,
        )

    with _prepared(model, way) as handle:
        draw(0, 1)
        warm_ups = len(handle.report().densities()) if isinstance(handle, Handle) else 0
        for first in range(0, len(attributes), batch):
            start = time.perf_counter()
            pixels = draw(first, way.steps).cpu()
            drawn.seconds += time.perf_counter() - start
            drawn.pixels.append(pixels)
            drawn.state.append(last[0].cpu())
        if isinstance(handle, Handle):
            calls = handle.report().densities()[warm_ups:]
            shares = [share for call in calls for share in call["heads"]]
            drawn.density = sum(shares) / len(shares) if shares else None
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
        density=drawn.density,
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


def _check_patience(
    request: GenerationRequest,
    model: nn.Module,
    ways: Sequence[Way],
    pairs: int,
    shape: tuple[int, tuple[int, ...]],
) -> None:
    """Refuse a run of many minutes on a CPU that nobody confirmed."""
    device = next(model.parameters()).device
    if device.type == "cuda" or request.quick or request.yes:
        return
    blank = torch.zeros(1, shape[0], 3, *shape[1])
    attributes = torch.zeros(1, len(ATTRIBUTES), dtype=torch.int64)
    with torch.inference_mode():
        each = seconds(lambda: model(blank, torch.zeros(1), attributes), device)
    branches = 1 if request.guidance == 1 else 2
    total = each * branches * pairs * sum(way.calls for way in ways)
    if total > PATIENCE:
        raise TubeletError(
            f"this would take about {in_words(total)} on this CPU ({each:.1f} s per model call, "
            f"{len(ways)} ways, {pairs} clips); use --device cuda, --quick, or confirm with --yes"
        )
