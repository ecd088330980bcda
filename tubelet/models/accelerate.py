"""`accelerate`: put recipes on a model, in place and reversibly."""

from typing import Any

from tubelet.core.context import Site
from tubelet.core.errors import (
    ConflictError,
    NoMatchingSitesError,
    RecipeError,
    UnsupportedError,
)
from tubelet.core.handle import AttentionOptions, Handle, ModelAdapter
from tubelet.core.recipe import Recipe
from tubelet.core.saved import SavedPlan
from tubelet.models.catalogue import adapter_for, modules_of, refusal
from tubelet.models.interface import OWNER

_MARK = "_tubelet_handle"
"""Attribute of an accelerated model that holds its handle."""


def accelerate(
    model: Any,
    *recipes: Recipe | SavedPlan,
    impl: str = "auto",
    verify: int = 0,
    max_error: float | None = None,
    num_steps: int | None = None,
) -> Handle:
    """Put recipes on a model until the handle is removed.

    The model is changed in place by hooks and setters, and `handle.remove()` (or leaving the
    `with` block) takes every change back exactly. Recipes of different stages compose, as do
    recipes of one stage at different sites.

    Args:
        model: A supported model in eval mode (see `tubelet models`), or a pipeline of diffusers,
            whose video transformers then share runs, steps and one handle.
        recipes: One or more recipes, or a plan from `load_plan`. None at all is allowed only
            where tubelet brings fused attention that the host lacks (TimeSformer).
        impl, verify, max_error, num_steps: See `tubelet.core.handle.AttentionOptions`.

    Returns:
        The handle, also a context manager.

    Raises:
        UnsupportedError: The model is unknown, lacks what a recipe needs, or is not the kind
            that a loaded plan was made for.
        NoMatchingSitesError: A recipe found no place to act.
        ConflictError: Two recipes want the same stage at the same site, or the model is
            accelerated already.
        RecipeError: What was given is not a recipe.
    """
    options = AttentionOptions(impl=impl, verify=verify, max_error=max_error, num_steps=num_steps)
    adapter = adapter_for(model)
    chosen = _unpacked(model, adapter, recipes)
    _check(model, adapter, chosen)
    handle = Handle(model, chosen, adapter.sites(model)[0].num_layers, options)
    try:
        adapter.install(model, chosen, handle)
    except BaseException:
        handle.remove()
        raise
    for module in modules_of(model):
        setattr(module, _MARK, handle)
        handle.on_remove(lambda module=module: delattr(module, _MARK))
    return handle


def is_accelerated(model: Any) -> bool:
    """Whether recipes are on a model or on a part of it."""
    return any(hasattr(part, _MARK) or hasattr(part, OWNER) for part in model.modules())


def _unpacked(
    model: Any, adapter: ModelAdapter, given: tuple[Recipe | SavedPlan, ...]
) -> tuple[Recipe, ...]:
    """The recipes themselves; a plan for another kind of model is refused."""
    recipes: list[Recipe] = []
    for item in given:
        if not isinstance(item, SavedPlan):
            recipes.append(item)
            continue
        host = (type(model).__name__, adapter.sites(model)[0].num_layers)
        if (item.model, item.num_layers) != host:
            raise UnsupportedError(
                f"this plan was made for {item.model} with {item.num_layers} layers, not for "
                f"{host[0]} with {host[1]}"
            )
        recipes.extend(item.recipes)
    return tuple(recipes)


def _check(model: Any, adapter: ModelAdapter, recipes: tuple[Recipe, ...]) -> None:
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise RecipeError(
                f"accelerate takes recipe instances such as ToMe(r=8), got {recipe!r}"
            )
    if not recipes and not adapter.fused_by_tubelet:
        raise RecipeError(f"give at least one recipe to put on {type(model).__name__}")
    hosts = modules_of(model)
    if any(is_accelerated(host) for host in hosts):
        raise ConflictError(
            f"this {type(model).__name__} or a part of it is accelerated already; remove() first"
        )
    if any(weight.is_meta for host in hosts for weight in host.parameters()):
        raise UnsupportedError(f"this {type(model).__name__} has no weights yet (meta device)")
    lacks = adapter.lacks(model)
    for recipe in recipes:
        reason = refusal(recipe, lacks)
        if reason is not None:
            raise UnsupportedError(f"{recipe.name} cannot run on {type(model).__name__}: {reason}")
    _check_sites(adapter.sites(model), recipes)


def _check_sites(sites: list[Site], recipes: tuple[Recipe, ...]) -> None:
    taken: dict[tuple[str, str, str], Recipe] = {}
    for recipe in recipes:
        matched = [site for site in sites if recipe.acts_on(site)]
        if not matched:
            kinds = sorted({site.kind for site in sites})
            depth = max(site.num_layers for site in sites)
            raise NoMatchingSitesError(
                f"{recipe} found no site; the model has {depth} layers with sites of kind "
                f"{', '.join(kinds)}"
            )
        for site in matched:
            place = (recipe.stage, site.name, site.kind)
            if place in taken:
                raise ConflictError(
                    f"{taken[place]} and {recipe} both decide {recipe.stage} at {site.name}; "
                    "keep one, or give them different layers"
                )
            taken[place] = recipe
