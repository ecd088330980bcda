"""Checks that every recipe for prompts must pass on every tiny video language model.

    for recipe in settings(host):
        identity_equals_dense(model, recipe, tiny_llm.prompt(host))

A check returns None, or raises AssertionError with what it saw. Models come back as they were.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tubelet import recipes
from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import LayerReduction, PositionPolicy, Recipe
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.testing import tiny_llm
from tubelet.testing.catalogue import (
    assert_untouched,
    difference,
    identity_of,
    snapshot,
    spying,
)

TINY: dict[str, dict[str, Any]] = {
    "AIMPruning": {"layer": 2, "slope": 0.3},
    "DivPrune": {"keep_ratio": 0.3},
    "EVS": {"keep_ratio": 0.4},
    "MustDrop": {"layers": (2, 3), "share": 0.015, "single": 0.05},
    "PyramidDrop": {"layers": (2, 3)},
    "SparseVLM": {"layers": (2, 3), "keep_ratios": (0.6, 0.3)},
    "VAR": {"hugeness": 2.0},
    "VTCCLS": {"num_layers": 1},
    "F2C": {"keep_ratio": 0.15, "clip": 2},
    "FreeVideoLLM": {"slow": 1, "middle": 1, "side": 2},
    "TSLLaVA": {"keep_ratio": 0.4, "thumbnail": 2},
    "FastVID": {"keep_ratio": 0.4, "segments": 2},
    "FlashVID": {"keep_ratio": 0.4, "segments": 2},
    "HoliTom": {"threshold": 0.1, "merged": 0.3},
    "HoliTomInner": {"layer": 2},
    "PruneVid": {"threshold": 0.1},
    "PruneVidInner": {"layer": 2},
    "LLaVAScissor": {"threshold": 0.4},
    "STTM": {"spatial": 0.3, "temporal": 0.3},
}
"""Fields for prompts of 64 video tokens and 4 layers, where the authors' defaults would not act
or would be refused. A recipe that is not named here is tried with its defaults."""

NEW_TOKENS = 3
"""Tokens that a check generates."""


def settings() -> Iterator[Recipe]:
    """Every recipe for prompts, set so that it acts on tiny models."""
    for name, recipe in recipes.catalogue().items():
        if issubclass(recipe, PositionPolicy):
            yield recipe(**TINY.get(name, {}))


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, V] behind each prompt's last token, from one forward pass."""
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def answer(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy answers [B, NEW_TOKENS] to a batch of prompts, and their logits [B, NEW_TOKENS, V]."""
    kept = {"output_logits": True, "return_dict_in_generate": True}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kept, **options}
    result = model.generate(**inputs, **options)
    tokens = result.sequences[:, inputs["input_ids"].shape[1] :]
    return tokens, torch.stack(result.logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], what: str) -> None:
    """Raise AssertionError unless tokens and logits are equal bit for bit."""
    assert torch.equal(found[0], wanted[0]), f"{what}: {found[0].tolist()}, {wanted[0].tolist()}"
    gap = difference(found[1], wanted[1])
    assert gap == 0, f"{what}: logits differ by {gap}"


def decisions(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
    """(context, plan) of every decision during one forward pass."""
    seen: list[tuple[Any, Any]] = []
    with accelerate(model, spying(recipe, lambda ctx, plan: seen.append((ctx, plan)))):
        logits(model, inputs)
    return seen


def acts(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """The recipe shortens the prompt, says so, and moves the output."""
    dense = logits(model, inputs)
    with accelerate(model, recipe) as handle:
        moved = difference(logits(model, inputs), dense)
    assert 0 < moved < float("inf"), f"{recipe} moved the output by {moved}"
    assert handle.report().acted(str(recipe)), f"the report says that {recipe} did nothing"


def identity_equals_dense(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """At its identity point a recipe gives the dense model's logits and answers, bit for bit."""
    dense, wanted = logits(model, inputs), answer(model, inputs)
    with accelerate(model, identity_of(recipe)):
        assert torch.equal(logits(model, inputs), dense), f"{identity_of(recipe)} moved the logits"
        assert_same(answer(model, inputs), wanted, f"{identity_of(recipe)}")


def remove_restores(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """After `remove` the model is what it was, bit for bit."""
    dense = logits(model, inputs)
    before = snapshot(model)
    handle = accelerate(model, recipe)
    answer(model, inputs)
    logits(model, inputs)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, inputs), dense), "outputs changed after remove"
    assert_host_untouched(model, before)


def assert_host_untouched(model: Any, before: dict[str, Any]) -> None:
    """As `assert_untouched`, but for what the host itself remembers of its latest prompt."""
    for name, attributes in before["attributes"].items():
        if "rope_deltas" in attributes:
            attributes["rope_deltas"] = model.get_submodule(name).rope_deltas
    assert_untouched(model, before)


def plans_are_valid(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """Every plan fits its context, ascends, and its weights are finite."""
    seen = decisions(model, recipe, inputs)
    assert seen, f"{recipe} was never asked"
    for ctx, plan in seen:
        if plan is None:
            continue
        plan.check()
        assert (plan.batch, plan.num_in) == (1, ctx.num_tokens), "the plan is for other tokens"
        assert plan.anchor.dtype == plan.index.dtype == torch.int64
        assert bool((plan.matrix().sum(2) > 0).all()), "an output has no weight"


def same_plan_twice(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """The same prompt is decided the same way each time."""
    for (_, one), (_, other) in zip(
        decisions(model, recipe, inputs), decisions(model, recipe, inputs), strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.index, other.index), "another run decided otherwise"
            assert torch.equal(one.weight, other.weight), "another run weighted otherwise"


def dropped_is_never_read(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """NaN in dropped tokens, written right after the decision, never reaches the output."""
    plans: list[TokenAssignment | None] = []
    with accelerate(model, spying(recipe, lambda ctx, plan: plans.append(plan))):
        clean = answer(model, inputs)
    if isinstance(recipe, LayerReduction):
        dirty = _answer_with_poison_inside(model, recipe, inputs, plans)
    else:
        with accelerate(model, spying(recipe, _poison)):
            dirty = answer(model, inputs)
    assert_same(dirty, clean, "NaN in dropped tokens reached the answer")


def _poison(ctx: PromptContext, plan: TokenAssignment | None) -> None:
    if plan is not None:
        ctx.hidden[plan.index < 0] = torch.nan


def _answer_with_poison_inside(
    model: Any,
    recipe: LayerReduction,
    inputs: Mapping[str, Tensor],
    plans: list[TokenAssignment | None],
) -> tuple[Tensor, Tensor]:
    """The answer when what the recipe drops first is NaN as it enters that layer."""
    adapter: Any = adapter_for(model)
    layer = min(site.layer for site in adapter.sites(model) if recipe.acts_on(site))
    found = adapter.placeholders(model, inputs["input_ids"])
    places = adapter.places(model.model, inputs, found)
    replayed, left = dataclasses.replace(recipe), list(plans)
    object.__setattr__(replayed, "plan", lambda ctx: left.pop(0))

    def poison(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        if hidden.shape[1] == found.shape[1]:
            rows = dict.fromkeys(place.sample for place in places)
            for row, plan in zip(rows, plans, strict=False):
                spots = [place.grid_columns for place in places if place.sample == row]
                if plan is not None:
                    hidden[row, torch.cat(spots)[plan.index[0] < 0]] = torch.nan
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    # Registered first, so it runs before the cut.
    hook = (
        adapter.text_model(model).layers[layer].register_forward_pre_hook(poison, with_kwargs=True)
    )
    try:
        with accelerate(model, replayed):
            return answer(model, inputs)
    finally:
        hook.remove()


def state_never_survives(
    model: Any, recipe: Recipe, inputs: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> None:
    """A run on `other` before the run on `inputs` leaves no trace."""
    with accelerate(model, recipe):
        alone = answer(model, inputs)
        logits(model, other)
        assert_same(answer(model, inputs), alone, "after another run")
    with accelerate(model, recipe):
        assert_same(answer(model, inputs), alone, "after another handle")


def batch_equals_singles(
    model: Any,
    recipe: Recipe,
    together: Mapping[str, Tensor],
    alone: list[Mapping[str, Tensor]],
    bound: float = 1e-4,
) -> None:
    """A padded batch gives what its prompts give one by one."""
    with accelerate(model, recipe):
        found = answer(model, together)
        singles = [answer(model, inputs) for inputs in alone]
    tokens, values = (torch.cat(part) for part in zip(*singles, strict=True))
    assert torch.equal(found[0], tokens), f"{found[0].tolist()}, one by one {tokens.tolist()}"
    gap = difference(found[1], values)
    assert gap <= bound, f"a batch differs from its prompts by {gap}, allowed {bound}"


def modes_agree(
    model: Any, recipe: Recipe, inputs: Mapping[str, Tensor], bound: float = 1e-4
) -> None:
    """A static cache, no cache and assisted decoding give the answers of the default cache.

    Assisted decoding takes single prompts only.
    """
    modes: list[dict[str, Any]] = [{"cache_implementation": "static"}, {"use_cache": False}]
    if len(inputs["input_ids"]) == 1:
        modes.append({"prompt_lookup_num_tokens": 2})
    with accelerate(model, recipe):
        wanted = answer(model, inputs)
        for mode in modes:
            found = answer(model, inputs, **mode)
            assert torch.equal(found[0], wanted[0]), f"{mode} gave {found[0].tolist()}"
            gap = difference(found[1], wanted[1])
            assert gap <= bound, f"logits with {mode} differ by {gap}"


def runs_in(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The recipe runs in `dtype`: finite logits in that dtype, and at its identity point dense."""
    model = copy.deepcopy(model).to(dtype)
    with accelerate(model, recipe):
        found = logits(model, inputs)
    assert found.dtype == dtype, f"{dtype} became {found.dtype}"
    assert bool(found.isfinite().all()), f"not finite in {dtype}"
    identity_equals_dense(model, recipe, inputs)


def error_leaves_it_usable(model: Any, recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """An error inside a decision: the next run is right, and `remove` still restores."""
    dense = logits(model, inputs)
    with accelerate(model, recipe):
        wanted = answer(model, inputs)
    before, armed = snapshot(model), True

    def explode(ctx: Any, plan: Any) -> None:
        if armed:
            raise _Boom

    with accelerate(model, spying(recipe, explode)):
        for run in (logits, answer):
            try:
                run(model, inputs)
            except _Boom:
                pass
            else:
                raise AssertionError("the recipe's own error was swallowed")
        armed = False
        assert_same(answer(model, inputs), wanted, "the run after an error")
    assert torch.equal(logits(model, inputs), dense), "outputs changed after an error"
    assert_host_untouched(model, before)


class _Boom(Exception):
    """Raised inside a plan."""


def placed(recipe: Recipe, host: str) -> Recipe:
    """The recipe with its layers moved behind the DeepStack layers of a tiny model."""
    layer, first = getattr(recipe, "layer", None), tiny_llm.HOSTS[host].deepstack
    if not isinstance(layer, int) or layer >= first:
        return recipe
    return dataclasses.replace(recipe, layer=first)
