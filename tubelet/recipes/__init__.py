"""Published methods, one file per family.

Every concrete recipe class in a module of this package is in the catalogue and importable from
here, as in `from tubelet.recipes import ToMe`; there is no list to keep.
"""

import importlib
import inspect
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from tubelet.core.recipe import Recipe
from tubelet.core.saved import SavedPlan
from tubelet.core.text import parse_recipe, recipe_from_dict


@cache
def catalogue() -> dict[str, type[Recipe]]:
    """Every recipe by class name, in alphabetical order."""
    found: dict[str, type[Recipe]] = {}
    for module in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module.name}")
        for name, member in inspect.getmembers(family, inspect.isclass):
            if member.__module__ != family.__name__ or inspect.isabstract(member):
                continue
            if issubclass(member, Recipe):
                found[name] = member
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def parse(text: str) -> Recipe:
    """A recipe of the catalogue from text such as `ToMe(r=8)`; see `core.text`."""
    return parse_recipe(text, catalogue())


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """A recipe of the catalogue from the result of its `to_dict`."""
    return recipe_from_dict(data, catalogue())


def load_plan(path: str | os.PathLike[str]) -> SavedPlan:
    """A plan that `Handle.save` wrote, for `tubelet.accelerate(model, plan)`.

    Raises:
        RecipeError: The file is missing, is not a plan, or names unknown recipes or fields.
    """
    return SavedPlan.load(path, catalogue())


def __getattr__(name: str) -> Any:
    recipes = catalogue()
    if name in recipes:
        return recipes[name]
    raise AttributeError(f"tubelet.recipes has no recipe {name!r}; it has {', '.join(recipes)}")


def __dir__() -> list[str]:
    return ["catalogue", "from_dict", "load_plan", "parse", *catalogue()]
