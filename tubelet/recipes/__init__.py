"""Published methods, one file per family.

Every concrete recipe class in a module of this package is in the catalogue and importable from
here, as in `from tubelet.recipes import ToMe`; there is no list to keep.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from tubelet.core.recipe import Recipe
from tubelet.core.text import parse_recipe, recipe_from_dict


@cache
def catalogue() -> dict[str, type[Recipe]]:
    """Every recipe by class name, in alphabetical order."""
    found: dict[str, type[Recipe]] = {}
    for module in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module.name}")
        for name, member in inspect.getmembers(family, inspect.isclass):
            own = issubclass(member, Recipe) and member.__module__ == family.__name__
            if own and not inspect.isabstract(member):
                found[name] = member
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def parse(text: str) -> Recipe:
    """A recipe of the catalogue from text such as `ToMe(r=8)`; see `core.text`."""
    return parse_recipe(text, catalogue())


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """A recipe of the catalogue from the result of its `to_dict`."""
    return recipe_from_dict(data, catalogue())


def __getattr__(name: str) -> Any:
    recipes = catalogue()
    if name in recipes:
        return recipes[name]
    raise AttributeError(f"tubelet.recipes has no recipe {name!r}; it has {', '.join(recipes)}")


def __dir__() -> list[str]:
    return ["catalogue", "from_dict", "parse", *catalogue()]
