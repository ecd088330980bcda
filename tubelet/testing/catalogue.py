"""Checks that every recipe must pass on every host: call them on your own recipe or model.

    for recipe in settings():
        identity_equals_dense(model, recipe, pixels)

A check returns None, or raises AssertionError with what it saw. Models come back as they were.
Generic checks catch broken plumbing; whether a method does what its paper says needs a
behavioural test of its own.
"""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tubelet import recipes
from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import AttentionContext, TokenContext
from tubelet.core.errors import UnsupportedError
from tubelet.core.handle import CAPABILITIES
from tubelet.core.learned import LearnedPlan
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import (
    AttentionCompensation,
    AttentionReuse,
    KVPolicy,
    PositionPolicy,
    RaggedReduction,
    Recipe,
    SparsePrefill,
    TokenRecipe,
)
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for, refusal
from tubelet.testing import tolerances

TINY: dict[str, dict[str, Any]] = {
    "ATS": {"first_layer": 1, "samples": 0.5},
    **{name: {"layer": 1} for name in ("HoT", "LookupViT", "STViT", "TokenSlimming", "VTM")},
    **{name: {"block": (16, 16)} for name in ("AdaSpa", "RadialAttention", "RandomBlocks")},
    **{name: {"block": (16, 16)} for name in ("SolAttn", "SparseVDiT", "SubBlock")},
    "DraftAttention": {"block": (16, 16), "tile": (1, 4, 4)},
    "EfficientVDiT": {"block": (16, 16), "references": 1},
    "NABLA": {"block": (16, 16), "tile": (1, 4, 4), "window": (1, 1, 1), "mass": 0.4},
    "NeighborhoodAttention": {"block": (16, 16), "tile": (1, 4, 4), "window": (1, 4, 4)},
    "SlidingTile": {"block": (16, 16), "tile": (1, 4, 4), "window": (2, 1, 1)},
    "SpargeAttention": {"block": (16, 16), "similarity": -1.0, "mass": 0.4},
    "SVG": {"block": (4, 4), "sink": False},
    "VMoBA": {"block": (16, 16), "slab": 1, "window": (2, 2), "box": (1, 4, 4)},
    "XAttention": {"block": (16, 16), "mass": 0.4},
    "EVAD": {"keep_ratio": 0.6, "keyframe_weight": 4.0},
    "GumbelKeep": {"keep_ratio": 0.5, "layers": (0, 2), "context": 0.1},
    "TESTA": {"frames": 1, "patches": 3},
    "ToMe": {"r": 6},
    "VidTLDR": {"share": (0.2, 0.1)},
}
"""Fields for hosts of 64 to 128 tokens and 4 layers, where the authors' defaults would not act or
would leave next to nothing. A recipe that is not named here is tried with its defaults."""


def settings() -> Iterator[Recipe]:
    """Every recipe of the catalogue that acts on its own, set so that it does on tiny hosts.

    Those for prompts are in `tubelet.testing.catalogue_llm`; tests/models/test_prefill.py has
    those for sparse prefill, and test_kv_runtime.py those for caches.
    """
    for name, recipe in recipes.catalogue().items():
        company = AttentionReuse | AttentionCompensation | PositionPolicy | SparsePrefill | KVPolicy
        if not issubclass(recipe, company):
            yield recipe(**TINY.get(name, {}))


def identity_of(recipe: Recipe) -> Recipe:
    """The recipe at its identity point, other fields kept."""
    return dataclasses.replace(recipe, **recipe.identity)


def why_refused(model: Any, recipe: Recipe) -> str | None:
    """Why this model does not take this recipe, from what the adapter states; None if it does."""
    return refusal(recipe, adapter_for(model).lacks(model))


def spying(recipe: Recipe, watch: Callable[[Any, Any], None]) -> Recipe:
    """A copy of `recipe` that shows each context and its plan to `watch`.

    A ragged recipe is shown sample by sample.
    """
    copied, name = dataclasses.replace(recipe), method_of(recipe)

    def decide(ctx: Any) -> Any:
        decided = getattr(type(recipe), name)(copied, ctx)
        if isinstance(recipe, RaggedReduction) and decided is not None:
            for sample, plan in enumerate(TokenAssignment.keep_where(decided)):
                watch(_sample(ctx, sample), plan)
        else:
            watch(ctx, decided)
        return decided

    # Recipes are frozen; a copy is shadowed so that the original stays as it is.
    object.__setattr__(copied, name, decide)
    return copied


def method_of(recipe: Recipe) -> str:
    """Name of the method by which a recipe decides."""
    return getattr(recipe, "decides", "plan")


def _sample(ctx: Any, sample: int) -> Any:
    rows = slice(sample, sample + 1)
    names = ("hidden", "size", "anchor", "pixels")
    parts = {n: getattr(ctx, n)[rows] for n in names if getattr(ctx, n) is not None}
    stats = ctx.stats
    if stats is not None:
        tensors = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
        cut = {n: x[rows] for n, x in tensors.items() if isinstance(x, Tensor)}
        stats = dataclasses.replace(stats, **cut)
    return dataclasses.replace(ctx, **parts, stats=stats)


def record(model: Any, recipe: Recipe, pixels: Tensor) -> list[tuple[Any, Any]]:
    """(context, plan) of every decision during one forward pass."""
    seen: list[tuple[Any, Any]] = []
    with accelerate(model, spying(recipe, lambda ctx, plan: seen.append((ctx, plan)))):
        logits(model, pixels)
    return seen


def logits(model: Any, pixels: Tensor) -> Tensor:
    """Output of a classification host, without gradients."""
    with torch.no_grad():
        return model(pixels).logits


def stir(model: nn.Module, seed: int = 0) -> Any:
    """Noise on parameters that start at a constant: position embeddings, biases, norms.

    Freshly built hosts have zeros there, so that a forgotten bias does not show and standing
    patches give exactly equal tokens, whose matching rounding decides.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if bool((value == value.flatten()[0]).all()):
                value.add_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite when one of them is not finite."""
    gap = (one.detach().double() - other.detach().double()).abs()
    return float(gap.max()) if bool(gap.isfinite().all()) else float("inf")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a model consists of: parameters, configs, instance attributes and hooks."""
    modules = dict(model.named_modules())
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "config": {
            name: (copy.deepcopy(vars(m.config)), m.config.to_dict())
            for name, m in modules.items()
            if hasattr(m, "config")
        },
        "attributes": {name: _attributes(m) for name, m in modules.items()},
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    # Hook tables change in place, so their contents are copied.
    return {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules", "config")
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """Raise AssertionError unless `model` is bit for bit what `snapshot` saw."""
    after = snapshot(model)
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), f"parameter {name} changed"
    assert before["state"].keys() == after["state"].keys(), "parameters appeared or vanished"
    assert before["config"] == after["config"], "a config changed"
    for name, attributes in before["attributes"].items():
        assert attributes == after["attributes"][name], f"attributes or hooks of {name!r} changed"


# Checks of a recipe alone


def survives_serialisation(recipe: Recipe) -> None:
    """JSON, text and pickle give the same recipe back."""
    data = json.loads(json.dumps(recipe.to_dict()))
    assert recipes.from_dict(data) == recipe, "JSON changed the recipe"
    assert recipes.parse(str(recipe)) == recipe, "text changed the recipe"
    assert pickle.loads(pickle.dumps(recipe)) == recipe, "pickle changed the recipe"


# Checks of a recipe on a model


def runs_or_is_refused(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """The recipe changes the output, or is refused with the reason and nothing was touched."""
    reason, before = why_refused(model, recipe), snapshot(model)
    dense = logits(model, pixels)
    if reason is None:
        with accelerate(model, recipe) as handle:
            moved = difference(logits(model, pixels), dense)
        assert 0 < moved < float("inf"), f"{recipe} moved the output by {moved}"
        assert handle.report().acted(str(recipe)), f"the report says that {recipe} did nothing"
        return
    said = _refusal_of(model, recipe)
    assert said is not None, f"{recipe} ran although the adapter states: {reason}"
    assert reason in said, f"the refusal {said!r} hides its reason: {reason}"
    assert recipe.name in said, f"the refusal {said!r} does not name the recipe"
    assert_untouched(model, before)
    assert torch.equal(logits(model, pixels), dense), "a refused recipe changed the output"


def _refusal_of(model: Any, recipe: Recipe) -> str | None:
    try:
        accelerate(model, recipe).remove()
    except UnsupportedError as error:
        return str(error)
    return None


def identity_equals_dense(
    model: Any, recipe: Recipe, pixels: Tensor, bound: float = tolerances.EXACT
) -> None:
    """At its identity point a recipe leaves the output within `bound`."""
    dense = logits(model, pixels)
    with accelerate(model, identity_of(recipe)):
        gap = difference(logits(model, pixels), dense)
    assert gap <= bound, f"{identity_of(recipe)} differs from dense by {gap}, allowed {bound}"


def remove_restores(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """After `remove` weights, configs, attributes, hooks and outputs are as before, bit for bit."""
    before, dense = snapshot(model), logits(model, pixels)
    handle = accelerate(model, recipe)
    logits(model, pixels)
    handle.remove()
    handle.remove()
    assert_untouched(model, before)
    assert torch.equal(logits(model, pixels), dense), "outputs changed after remove"


def plans_are_valid(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """Every plan fits its context, keeps a non-empty row and protected tokens, conserves mass."""
    seen = record(model, recipe, pixels)
    assert seen, f"{recipe} was never asked"
    for ctx, plan in seen:
        if isinstance(plan, LearnedPlan):
            _check_learned(ctx, plan)
        elif isinstance(plan, TokenAssignment):
            _check_assignment(ctx, plan)
        elif isinstance(plan, AttentionPlan) and plan.mask is not None:
            assert bool((plan.mask.counts > 0).all()), "a query block attends to nothing"


def _check_assignment(ctx: TokenContext, plan: TokenAssignment) -> None:
    plan.check()
    assert (plan.batch, plan.num_in) == tuple(ctx.hidden.shape[:2]), "the plan is for other tokens"
    assert plan.anchor.dtype == plan.index.dtype == torch.int64
    lead = torch.arange(ctx.protected).expand(plan.batch, -1)
    assert torch.equal(plan.anchor[:, : ctx.protected].cpu(), lead), "a class token moved"
    assert bool((plan.size[:, : ctx.protected] == 1).all()), "a class token was merged"
    live = (plan.index >= 0).float()
    assert torch.equal(plan.size.sum(1), live.sum(1)), "sizes do not add up to the tokens kept"
    # Weights within a row are shares: at most 1 in sum, and 1 where nothing is scaled down.
    sums = plan.matrix().sum(2)
    assert bool((sums <= 1 + 1e-5).all()), f"a row adds up to {float(sums.max())}"
    assert bool((sums > 0).all()), "an output has no weight"


def _check_learned(ctx: TokenContext, plan: LearnedPlan) -> None:
    _check_assignment(ctx, plan.assignment)
    lead = ctx.protected
    assert torch.equal(plan.hidden[:, :lead], ctx.hidden[:, :lead]), "a class token changed"
    assert bool(plan.hidden.isfinite().all()), "the new tokens are not finite"
    if plan.recover is None:
        return
    back = plan.recover(plan.hidden)
    assert back.shape == ctx.hidden.shape, f"{tuple(ctx.hidden.shape)} became {tuple(back.shape)}"
    assert torch.equal(back[:, :lead], plan.hidden[:, :lead]), "a class token changed on its way"


def plan_traces(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """The decision compiles to one graph and decides the same there."""
    for ctx, plan in record(model, recipe, pixels)[:2]:
        torch._dynamo.reset()
        decide = getattr(recipe, method_of(recipe))
        tensors = torch.compile(lambda c: _tensors(decide(c)), fullgraph=True, backend="eager")  # noqa: B023
        expected = [plan.index >= 0] if method_of(recipe) == "keep" and plan else _tensors(plan)
        for found, wanted in zip(tensors(ctx), expected, strict=True):
            assert difference(found, wanted) <= tolerances.COMPILED, "the traced plan differs"


def _tensors(
    plan: TokenAssignment | LearnedPlan | AttentionPlan | Tensor | None,
) -> list[Tensor]:
    if isinstance(plan, LearnedPlan):
        back = [] if plan.recover is None else [plan.recover(plan.hidden)]
        return [*_tensors(plan.assignment), plan.hidden, *back]
    if isinstance(plan, Tensor):
        return [plan]
    if isinstance(plan, TokenAssignment):
        return [plan.index, plan.weight, plan.anchor, plan.size]
    if plan is None:
        return []
    lists = [] if plan.mask is None else [plan.mask.counts, plan.mask.indices]
    return lists + [x for x in (plan.order, plan.bias) if x is not None]


def dropped_is_never_read(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """NaN in the rows of dropped tokens, written right after the decision, changes nothing."""
    with accelerate(model, recipe):
        clean = logits(model, pixels)
    poisoned = 0

    def poison(ctx: Any, plan: Any) -> None:
        nonlocal poisoned
        plan = plan.assignment if isinstance(plan, LearnedPlan) else plan
        if isinstance(plan, TokenAssignment):
            ctx.hidden[plan.index < 0] = torch.nan
            poisoned += int((plan.index < 0).sum())

    with accelerate(model, spying(recipe, poison)):
        dirty = logits(model, pixels)
    assert torch.equal(clean, dirty), f"NaN in {poisoned} dropped tokens reached the output"


def state_never_survives(model: Any, recipe: Recipe, pixels: Tensor, other: Tensor) -> None:
    """A run on `other` before the run on `pixels` leaves no trace, whatever their batch sizes."""
    with accelerate(model, recipe):
        alone = logits(model, pixels)
    with accelerate(model, recipe):
        logits(model, other)
        after = logits(model, pixels)
    assert torch.equal(alone, after), f"differs by {difference(alone, after)} after another run"


def batch_equals_singles(
    model: Any, recipe: Recipe, pixels: Tensor, bound: float = tolerances.SPLIT_BATCH
) -> None:
    """A batch gives what its samples give one by one."""
    with accelerate(model, recipe):
        together = logits(model, pixels)
        singles = torch.cat([logits(model, clip[None]) for clip in pixels])
    gap = difference(together, singles)
    assert gap <= bound, f"a batch differs from its samples by {gap}, allowed {bound}"


def length_is_kept(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """Behind the last layer there are as many tokens as before, in as many values as survived.

    A learned way back may give every token a value of its own. Needs a model without exact ties;
    see `stir`.
    """
    base = adapter_for(model).base_model(model)  # type: ignore[attr-defined]
    dense = _last_hidden(base, pixels)
    with accelerate(base, recipe) as handle:
        reduced = _last_hidden(base, pixels)
    assert reduced.shape == dense.shape, f"{tuple(dense.shape)} became {tuple(reduced.shape)}"
    assert bool(reduced.isfinite().all()), "the output is not finite"
    if not isinstance(recipe, TokenRecipe) or getattr(recipe, "recover", False):
        return
    assert handle.assignment is not None
    outputs = torch.tensor([a.num_out for a in handle.assignment for _ in range(a.batch)])
    distinct = torch.tensor([len(sample.unique(dim=0)) for sample in reduced])
    # Dropped tokens share one filler value.
    dropped = torch.cat([(a.index < 0).any(1) for a in handle.assignment])
    assert torch.equal(distinct, outputs + dropped), f"{outputs} outputs, {distinct} values"


def _last_hidden(base: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return base(pixels).last_hidden_state


def runs_in(model: Any, recipe: Recipe, pixels: Tensor, dtype: torch.dtype) -> None:
    """The recipe runs in `dtype`: same dtype out, finite, and at the identity point as dense."""
    model = copy.deepcopy(model).to(dtype)
    pixels = pixels.to(dtype)
    dense = logits(model, pixels)
    with accelerate(model, recipe):
        out = logits(model, pixels)
    assert out.dtype == dtype, f"{dtype} became {out.dtype}"
    assert bool(out.isfinite().all()), f"not finite in {dtype}"
    with accelerate(model, identity_of(recipe)):
        gap = difference(logits(model, pixels), dense)
    assert gap <= tolerances.BY_DTYPE[dtype], f"identity differs by {gap} in {dtype}"


def error_leaves_it_usable(model: Any, recipe: Recipe, pixels: Tensor) -> None:
    """An error inside a forward pass: the next run is right, and `remove` still restores."""
    before, dense = snapshot(model), logits(model, pixels)
    with accelerate(model, recipe):
        wanted = logits(model, pixels)
    countdown: list[int] = []

    def explode(ctx: TokenContext | AttentionContext, plan: Any) -> None:
        if countdown and countdown.pop() == 0:
            raise _Boom

    decisions = len(record(model, recipe, pixels))
    with accelerate(model, spying(recipe, explode)):
        for late in range(min(decisions, 3)):
            countdown[:] = range(late + 1)
            try:
                logits(model, pixels)
            except _Boom:
                pass
            else:
                raise AssertionError("the recipe's own error was swallowed")
            countdown.clear()
            assert torch.equal(logits(model, pixels), wanted), "the run after an error differs"
    assert_untouched(model, before)
    assert torch.equal(logits(model, pixels), dense), "outputs changed after an error"


class _Boom(Exception):
    """Raised inside a plan."""


def known_requirements(recipe: Recipe) -> None:
    """What the recipe requires is among the capabilities that adapters can lack."""
    unknown = recipe.requires - CAPABILITIES.keys()
    assert not unknown, f"{recipe.name} requires {sorted(unknown)}, known: {sorted(CAPABILITIES)}"
