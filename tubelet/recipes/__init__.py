"""Published methods, one file per family.

Every concrete recipe class in a module of this package is in the catalogue and importable from
here, as in `from tubelet.recipes import ToMe`; there is no list to keep.
"""

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from tubelet.core.recipe import Recipe


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


def __getattr__(name: str) -> Any:
    recipes = catalogue()
    if name in recipes:
        return recipes[name]
    raise AttributeError(f"tubelet.recipes has no recipe {name!r}; it has {', '.join(recipes)}")


def __dir__() -> list[str]:
    return ["catalogue", *catalogue()]
