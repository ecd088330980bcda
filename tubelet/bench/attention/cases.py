"""Kernels and policies as cases: tried, probed, then timed in turns with the dense calls."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.attention.density import causal_density
from tubelet.bench.attention.inputs import Inputs, random_lists
from tubelet.bench.attention.probe import Probe, probe
from tubelet.bench.attention.result import BASELINES, Measured, Skipped
from tubelet.bench.attention.shapes import Shape
from tubelet.bench.attention.timer import take_turns
from tubelet.bench.measure import median
from tubelet.core.context import AttentionContext, Site, StepContext
from tubelet.core.errors import UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.core.recipe import SparseAttention, SparsePrefill
from tubelet.kernels.attention import IMPLEMENTATIONS, attention, choose, why_not
from tubelet.kernels.attention.order import inverse, permuted
from tubelet.kernels.selection import TOOLS

LARGEST_MAP = 2**27
"""Entries of an attention map that an implementation may materialise on a CPU."""

SITE = Site(name="bench", layer=20, num_layers=40, kind="joint")
"""Policies are asked for a layer in the middle, behind any dense first layers."""

LAYER = Site(name="bench", layer=18, num_layers=36, kind="llm")
"""The same for policies of a prompt."""

BY_PROMPT = ("triton", "fa4")
"""Implementations that layers of a prompt are measured with, where they were chosen; first the
one that `impl="auto"` takes."""

STEPS = 50
"""Denoising steps of the run that a policy believes in; it is timed past its warm-up."""

Result = tuple[Tensor, Tensor]
Policy = SparseAttention | SparsePrefill


@dataclass
class Case:
    """One thing to measure on one shape.

    Args:
        row: What is known before it is timed.
        runs: Timed calls by name; "whole" is the one compared with dense attention.
    """

    row: Measured
    runs: dict[str, Callable[[], Any]]


class Attempts:
    """Cases of a shape that run, and the reasons of those that do not."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cases: list[Case] = []
        self.skipped: list[Skipped] = []

    def attempt(self, name: str, build: Callable[[], Case]) -> None:
        """Add the case that `build` makes and tries; an error of its own only skips it."""
        try:
            self.cases.append(build())
        except Exception as error:
            # Out of memory, a failing compiler, a wrong result: the others go on.
            words = " ".join(str(error).split()) or type(error).__name__
            self.skip(name, f"{type(error).__name__}: {words[:300]}")
            error.__traceback__ = None
            if torch.cuda.is_available():
                # A broken context fails here too, and at every later case.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()

    def skip(self, name: str, reason: str) -> None:
        """Record why a case is not measured."""
        self.skipped.append(Skipped(shape=self.shape.name, name=name, reason=reason))


def add_dense(attempts: Attempts, inputs: Inputs, impls: Sequence[str]) -> None:
    """The dense call of each implementation."""
    for impl in impls:
        reason = _refusal(impl, inputs, None, attempts.shape.causal)
        if reason is not None:
            attempts.skip(f"{impl} dense", reason)
            continue
        attempts.attempt(
            f"{impl} dense", lambda impl=impl: _kernel_case(attempts.shape, inputs, impl, None)
        )


def add_lists(
    attempts: Attempts,
    inputs: Inputs,
    impls: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    densities: Sequence[float],
    seed: int,
) -> None:
    """Random block lists for each implementation, block size and density."""
    shape, device = attempts.shape, inputs[0].device
    for block in blocks:
        for density in densities:
            mask = random_lists(shape, block, density, seed=seed, device=device)
            plan = AttentionPlan(mask=mask)
            for impl in impls:
                name = f"{impl} {block[0]}x{block[1]} at {density:g}"
                reason = _refusal(impl, inputs, plan, shape.causal)
                if reason is not None:
                    attempts.skip(name, reason)
                    continue
                attempts.attempt(
                    name, lambda impl=impl, plan=plan: _kernel_case(shape, inputs, impl, plan)
                )


def add_policies(
    attempts: Attempts,
    inputs: Inputs,
    field: str,
    recipes: Sequence[Policy],
    impls: Sequence[str] = ("auto",),
) -> None:
    """The whole layer of each recipe: of SparsePrefill on prompts, of SparseAttention elsewhere.

    Each is measured with each implementation of `impls` that takes its plan, "auto" being the one
    that users get.
    """
    for recipe in recipes:
        for impl in impls:
            by = "" if impl == "auto" else f" by {impl}"
            attempts.attempt(
                f"{recipe}{by} on {field} inputs",
                lambda recipe=recipe, impl=impl: _policy_case(
                    attempts.shape, inputs, field, recipe, impl
                ),
            )


def measure(
    attempts: Attempts, device: torch.device, repeats: int, tick: Callable[[], None]
) -> list[Measured]:
    """Time all cases of a shape in turns; ratios are to the dense calls among them."""
    runs = [run for case in attempts.cases for run in case.runs.values()]
    samples = iter(take_turns(runs, device, repeats, tick) if runs else [])
    timed = [(case, {name: next(samples) for name in case.runs}) for case in attempts.cases]
    dense = {
        case.row.impl: median(seen["whole"])
        for case, seen in timed
        if case.row.kind == "dense" and case.row.impl in BASELINES
    }
    return [_row(case.row, seen, attempts.shape, dense) for case, seen in timed]


def _row(
    row: Measured, seen: dict[str, list[float]], shape: Shape, dense: dict[str, float]
) -> Measured:
    whole = median(seen["whole"])
    parts = {name: median(times) for name, times in seen.items() if name != "whole"}
    return replace(
        row,
        seconds=whole,
        samples=seen["whole"],
        tflops=row.density * shape.flops / parts.get("attention", whole) / 1e12,
        over={name: time / whole for name, time in dense.items()},
        **parts,
    )


def _kernel_case(shape: Shape, inputs: Inputs, impl: str, plan: AttentionPlan | None) -> Case:
    def run() -> Result:
        return attention(*inputs, plan, causal=shape.causal, impl=impl)

    mask = None if plan is None else plan.mask
    checked = _checked(inputs, plan or AttentionPlan(), run(), shape.causal)
    row = Measured(
        kind="dense" if mask is None else "lists",
        shape=shape.name,
        name=impl,
        impl=impl,
        block=None if mask is None else mask.block,
        density=_density(plan or AttentionPlan(), shape),
        seconds=0.0,
        samples=[],
        tflops=0.0,
        over={},
        kernel_error=checked.kernel_error,
        lse_error=checked.lse_error,
    )
    return Case(row, {"whole": run})


def _policy_case(shape: Shape, inputs: Inputs, field: str, recipe: Policy, impl: str) -> Case:
    decisions = _prompt_decisions if isinstance(recipe, SparsePrefill) else _step_decisions
    decide, first = decisions(shape, inputs, recipe)

    plan = decide()
    name = choose(*inputs, plan, causal=shape.causal, impl="auto" if plan.mask is None else impl)

    def whole() -> Result:
        return attention(*inputs, decide(), causal=shape.causal, impl=name)

    checked = _checked(inputs, plan, whole(), shape.causal)
    row = Measured(
        kind="policy",
        shape=shape.name,
        name=str(recipe),
        impl=name,
        block=None if plan.mask is None else plan.mask.block,
        density=_density(plan, shape),
        seconds=0.0,
        samples=[],
        tflops=0.0,
        over={},
        field=field,
        **vars(checked),
    )
    runs: dict[str, Callable[[], Any]] = {
        "whole": whole,
        "attention": lambda: attention(*inputs, plan, causal=shape.causal, impl=name),
        "selection": decide,
    }
    if first is not None:
        runs["first"] = first
    if plan.order is not None and plan.mask is not None:
        order = plan.order

        def reorder() -> Tensor:
            q, _, _ = (permuted(x, order) for x in inputs)
            return permuted(q, inverse(order))

        runs["reordering"] = reorder
    return Case(row, runs)


Decide = Callable[[], AttentionPlan]


def _step_decisions(shape: Shape, inputs: Inputs, recipe: Any) -> tuple[Decide, Decide | None]:
    """Deciding late in a run of a generator, and at its first sparse step."""
    if shape.causal or not isinstance(recipe, SparseAttention):
        raise UnsupportedError("a prompt is thinned out by recipes of the stage 'prefill'")
    kept: dict[str, Any] = {}

    def decide(step: int, state: dict[str, Any]) -> AttentionPlan:
        q, k, v = inputs
        return recipe.plan(
            AttentionContext(
                site=SITE,
                grid=shape.grid,
                query=q,
                key=k,
                value=v,
                scale=shape.width**-0.5,
                step=StepContext(step=step, num_steps=STEPS),
                state=state,
                tools=TOOLS,
            )
        )

    first = min(STEPS - 1, round(recipe.dense_steps * STEPS))
    decide(first, kept)
    return lambda: decide(STEPS - 1, kept), lambda: decide(first, {})


def _prompt_decisions(shape: Shape, inputs: Inputs, recipe: Any) -> tuple[Decide, Decide | None]:
    """Deciding on a prompt, as the runtime of the models asks for it."""
    if not shape.causal or not isinstance(recipe, SparsePrefill):
        raise UnsupportedError(f"{recipe.name} thins out prompts, and {shape.name} is none")
    q, k, v = inputs
    video, place = shape.layout(q.device)
    grid = replace(shape.grid, before=0, after=0)
    ctx = PrefillContext(
        site=LAYER,
        grids=(grid,),
        query=q,
        key=k,
        value=v,
        scale=shape.width**-0.5,
        video=video,
        place=place,
        tools=TOOLS,
    )
    return lambda: recipe.plan(ctx), None


def _density(plan: AttentionPlan, shape: Shape) -> float:
    if plan.mask is None:
        return 1.0
    return causal_density(plan.mask, plan.order) if shape.causal else plan.mask.density


def _checked(inputs: Inputs, plan: AttentionPlan, result: Result, causal: bool) -> Probe:
    found = probe(inputs, plan, *result, causal=causal)
    numbers = torch.tensor([x for x in vars(found).values() if x is not None])
    if not bool(numbers.isfinite().all()):
        raise FloatingPointError(f"the result is not finite: {found}")
    return found


def _refusal(impl: str, inputs: Inputs, plan: AttentionPlan | None, causal: bool) -> str | None:
    """Why a case cannot run, or None."""
    q = inputs[0]
    entries = q.shape[1] * q.shape[2] ** 2
    if impl == "flex" and q.device.type == "cpu" and entries > LARGEST_MAP:
        return "FlexAttention materialises the attention map on a CPU"
    return why_not(impl, *inputs, plan, causal=causal)


def of_prompts(impls: Sequence[str]) -> list[str]:
    """Those of `impls` that are worth measuring on whole layers of a prompt, or the usual one."""
    return [impl for impl in BY_PROMPT if impl in impls] or ["auto"]


def implementations(names: Sequence[str]) -> list[str]:
    """The implementations of these names, or all but the slow reference."""
    return list(dict.fromkeys(names)) or [name for name in IMPLEMENTATIONS if name != "reference"]
