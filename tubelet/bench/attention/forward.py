"""`tubelet bench forward`: one forward pass of a published transformer, predicted then measured.

The dense pass is taken apart first: each attention call over all tokens is timed inside the
running model. Then a recipe is timed on queries, keys and values that the model just produced, and
its speed-up of the whole pass is predicted and announced. Only then is the accelerated model run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tubelet.bench.amdahl import TimeSplit, flop_share
from tubelet.bench.amdahl import speedup as predicted_speedup
from tubelet.bench.attention.run import policies
from tubelet.bench.attention.timer import take_turns
from tubelet.bench.compare import Progress
from tubelet.bench.environment import environment
from tubelet.bench.measure import interleaved, median, seconds
from tubelet.core.context import AttentionContext, Site
from tubelet.core.errors import TubeletError
from tubelet.core.files import check_folder, write_whole
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import SparseAttention
from tubelet.kernels.attention import attention
from tubelet.kernels.selection import TOOLS
from tubelet.models.accelerate import accelerate
from tubelet.models.generator_presets import GeneratorPreset, generator_preset
from tubelet.models.load import checked_device

FILES = ("forward.json",)
KIND = "tubelet forward"
SCHEMA = 1

NATIVE = "native"
"""The attention backend that diffusers starts with: torch picks the kernel."""

PIECE_REPEATS = 5
"""Timed runs of one attention call; it takes a few hundredths of a forward pass."""

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ForwardRequest:
    """What was asked for; see the options of `tubelet bench forward`."""

    out: Path
    preset: str = "wan2.1-14b"
    recipes: tuple[str, ...] = ("DraftAttention(density=0.2)",)
    layers: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    backend: str | None = None
    repeats: int = 2
    device: str = "cpu"
    dtype: str = "bfloat16"
    seed: int = 0


def run_forward(request: ForwardRequest, progress: Progress, announce: Announce) -> dict[str, Any]:
    """Predict and measure; write `forward.json`.

    Args:
        request: What to run.
        progress: Told what happens.
        announce: Told each prediction before the measurement, and the measurement after it.

    Raises:
        TubeletError: Unknown preset, recipe or device, a clip that is too small, a backend that
            diffusers does not have, a folder that cannot be written, or not one recipe that ran.
    """
    preset = generator_preset(request.preset)
    # One forward pass has no run around it: what is measured is a step behind the warm-up.
    recipes = [replace(recipe, dense_steps=0.0) for recipe in policies(request.recipes)]
    clip = {"frames": request.frames, "height": request.height, "width": request.width}
    grid = preset.grid(**clip)
    device = checked_device(request.device)
    check_folder(request.out, FILES)
    dtype = getattr(torch, request.dtype)
    progress(f"building {preset.name}", 0, 1)
    model = preset.build(layers=request.layers, device=device, dtype=dtype, seed=request.seed)
    backend = _set_backend(model, request.backend, device)
    inputs = preset.inputs(**clip, device=device, dtype=dtype, seed=request.seed)
    parameters = sum(weight.numel() for weight in model.parameters())
    with torch.inference_mode():
        bench = ForwardBench(model, inputs, grid, device, request.repeats, progress)
        split = bench.dense_split()
        share = flop_share(
            grid.num_tokens, preset.heads * preset.head_width, bench.layers, parameters
        )
        announce(_dense_words(preset, grid, bench, share))
        rows = [bench.attempt(recipe, split, share, announce) for recipe in recipes]
    result = {
        "kind": KIND,
        "schema": SCHEMA,
        "environment": environment(device),
        "preset": preset.name,
        "parameters": parameters,
        "layers": bench.layers,
        "grid": grid.to_dict(),
        "tokens": grid.num_tokens,
        "precision": request.dtype,
        "dense_backend": backend,
        "random_weights": True,
        "dense": {
            "seconds": split.dense + split.rest,
            "attention": split.dense,
            "rest": split.rest,
            "attention_share": split.share,
            "attention_share_of_flops": share,
        },
        "recipes": rows,
    }
    request.out.mkdir(parents=True, exist_ok=True)
    write_whole(request.out / FILES[0], json.dumps(result, indent=1, allow_nan=False) + "\n")
    if all("error" in row for row in rows):
        raise TubeletError(f"nothing was measured: {rows[-1]['error']}")
    return result


class ForwardBench:
    """One model and one set of inputs.

    Args:
        model: A transformer in eval mode.
        inputs: Arguments of its forward pass; the output is the first entry of a tuple.
        grid: Geometry of its self-attention.
        device: Where it runs.
        repeats: Timed rounds of the dense and the accelerated pass.
        progress: Told what happens.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        grid: TokenGrid,
        device: torch.device,
        repeats: int,
        progress: Progress,
    ) -> None:
        self.model, self.inputs, self.grid, self.device = model, inputs, grid, device
        self.repeats, self.progress = repeats, progress
        self.calls: list[float] = []
        self.caught: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def layers(self) -> int:
        """Attention calls over all tokens in a forward pass."""
        return len(self.calls)

    def forward(self) -> Tensor:
        """One forward pass."""
        return self.model(**self.inputs)[0]

    def dense_split(self) -> TimeSplit:
        """Run densely and take the time apart; no recipe is part of the result yet.

        Raises:
            TubeletError: The model made no attention call over all tokens, or its output is not
                finite.
        """
        for what in ("warming up, dense", "timing attention inside the dense model"):
            self.progress(what, 0, 1)
            watch = _Watch(self.grid.num_tokens, self.device)
            total = seconds(lambda watch=watch: self._watched(watch), self.device)
        self.calls, self.caught = watch.seconds(), watch.caught
        if not self.calls or self.caught is None:
            raise TubeletError(
                f"{type(self.model).__name__} made no attention call over {self.grid.num_tokens} "
                "tokens that could be timed"
            )
        inside = sum(self.calls)
        each = median(self.calls)
        return TimeSplit(
            rest=total - inside,
            dense=inside,
            call_dense=each,
            call_selection=0.0,
            call_attention=each,
            density=1.0,
        )

    def predict(self, recipe: SparseAttention, split: TimeSplit) -> TimeSplit:
        """Time the recipe on one caught call and put it in place of the dense calls."""
        assert self.caught is not None
        q, k, v = self.caught
        scale = q.shape[-1] ** -0.5
        site = Site(
            name="bench",
            layer=max(self.layers // 2, min(recipe.dense_layers, self.layers - 1)),
            num_layers=self.layers,
            kind="joint",
        )
        context = AttentionContext(
            site=site, grid=self.grid, query=q, key=k, value=v, scale=scale, tools=TOOLS
        )
        plan = recipe.plan(context)
        attention(q, k, v, plan, scale=scale)
        # A forward pass on its own is the first step of a run: nothing is kept from before.
        runs = [
            lambda: recipe.plan(replace(context, state={})),
            lambda: attention(q, k, v, plan, scale=scale),
        ]
        deciding, sparse = (median(x) for x in take_turns(runs, self.device, PIECE_REPEATS))
        return replace(
            split,
            call_selection=deciding,
            call_attention=sparse,
            density=1.0 if plan.mask is None else plan.mask.density,
            dense_calls=min(recipe.dense_layers, self.layers) / self.layers,
        )

    def attempt(
        self, recipe: SparseAttention, split: TimeSplit, flops: float, announce: Announce
    ) -> dict[str, Any]:
        """`predict_and_measure`, or what stopped it: building the model again takes minutes."""
        try:
            return self.predict_and_measure(recipe, split, flops, announce)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            announce(f"{recipe}: not measured: {reason}")
            return {"recipe": recipe.to_dict(), "name": str(recipe), "error": reason}

    def predict_and_measure(
        self, recipe: SparseAttention, split: TimeSplit, flops: float, announce: Announce
    ) -> dict[str, Any]:
        """Announce what the recipe should bring, run it in turns with the dense model, compare."""
        self.progress(f"predicting {recipe}", 0, 1)
        prediction = self.predict(recipe, split)
        by_flops = predicted_speedup(flops, prediction.density, dense_calls=prediction.dense_calls)
        announce(f"{recipe}: predicted: {prediction}")
        self.progress(f"warming up {recipe}", 0, 1)
        with accelerate(self.model, recipe) as handle:
            finite = bool(self.forward().isfinite().all())
        if not finite:
            raise TubeletError(f"the output of {type(self.model).__name__} is not finite")

        def sparse() -> float:
            with accelerate(self.model, recipe):
                return seconds(self.forward, self.device)

        samples = interleaved(
            [lambda: seconds(self.forward, self.device), sparse],
            self.repeats,
            lambda: self.progress(f"timing {recipe}", 0, 1),
        )
        dense, fast = (median(x) for x in samples)
        off = prediction.speedup / (dense / fast) - 1
        announce(
            f"{recipe}: measured: {dense:.3f} s dense, {fast:.3f} s sparse: {dense / fast:.2f}x; "
            f"the prediction is off by {off:+.1%}"
        )
        return {
            "recipe": recipe.to_dict(),
            "name": str(recipe),
            "prediction": prediction.to_dict(),
            "predicted_from_flops": by_flops,
            "predicted_speedup": prediction.speedup,
            "measured_speedup": dense / fast,
            "prediction_off_by": off,
            "dense_samples": samples[0],
            "sparse_samples": samples[1],
            "report": handle.report().to_dict(),
        }

    def _watched(self, watch: "_Watch") -> None:
        with watch:
            finite = self.forward().isfinite().all()
        if not bool(finite):
            raise TubeletError(f"the output of {type(self.model).__name__} is not finite")


class _Watch(TorchFunctionMode):
    """Times every fused attention call over all tokens, and keeps the inputs of the second."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        super().__init__()
        self.tokens, self.cuda = tokens, device.type == "cuda"
        self.caught: tuple[Tensor, Tensor, Tensor] | None = None
        self._marks: list[tuple[Any, Any]] = []
        self._walls: list[float] = []

    def seconds(self) -> list[float]:
        """Of each call, in order."""
        return [a.elapsed_time(b) / 1000 for a, b in self._marks] if self.cuda else self._walls

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = (named[name] for name in ("query", "key", "value"))
        if not q.shape[2] == k.shape[2] == self.tokens:
            return func(*args, **kwargs)
        # The first layer sees little but noise; a one-layer model has no other.
        if len(self._walls) + len(self._marks) < 2:
            self.caught = (q, k, v)
        return self._timed(lambda: func(*args, **kwargs), q.device)

    def _timed(self, run: Callable[[], Any], device: torch.device) -> Any:
        kept: list[Any] = []
        if not self.cuda:
            self._walls.append(seconds(lambda: kept.append(run()), device))
            return kept[0]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        result = run()
        end.record(torch.cuda.current_stream(device))
        self._marks.append((start, end))
        return result


def _set_backend(model: Any, wanted: str | None, device: torch.device) -> str:
    """The attention that diffusers uses in the dense model: by default the fastest torch has."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    masked = type(model).__name__.startswith("HunyuanVideo")
    backend = wanted or ("_native_cudnn" if hopper and not masked else NATIVE)
    if backend == NATIVE:
        return backend
    from diffusers.utils import logging

    before = logging.get_verbosity()
    # It warns that the interface may change, which is no news to a reader of results.
    logging.set_verbosity_error()
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise TubeletError(f"diffusers has no attention backend {backend!r}: {reason}") from None
    finally:
        logging.set_verbosity(before)
    return backend


def _dense_words(
    preset: GeneratorPreset, grid: TokenGrid, bench: ForwardBench, flops: float
) -> str:
    inside = sum(bench.calls)
    return (
        f"{preset.name}, {bench.layers} layers, {grid.num_tokens:,} tokens ({grid}): attention "
        f"takes {inside:.3f} s of the dense pass, {flops:.1%} of its operations"
    )
