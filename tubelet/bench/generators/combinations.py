"""Recipes for generators from the command line: read, refused and named before anything runs."""

from collections.abc import Sequence

from torch import nn

from tubelet.bench.run import combination
from tubelet.core.errors import RecipeError
from tubelet.core.recipe import Recipe
from tubelet.models.accelerate import accelerate

Combination = tuple[Recipe, ...]


def read_combinations(texts: Sequence[str]) -> list[Combination]:
    """Recipes from texts such as `SubBlock(density=0.3) + ZerothOrder`.

    Raises:
        RecipeError: A text cannot be read, or two mean the same.
    """
    found: list[Combination] = []
    for text in texts:
        recipes = tuple(combination(text))
        if recipes in found:
            raise RecipeError(f"{name_of(recipes)} was given twice")
        found.append(recipes)
    return found


def name_of(recipes: Combination) -> str:
    """What a reader sees; "dense" without recipes."""
    return " + ".join(str(recipe) for recipe in recipes) or "dense"


def refuse_early(model: nn.Module, combinations: Sequence[Combination]) -> None:
    """Put each combination on the model and take it off again, so that refusals come first.

    Raises:
        UnsupportedError, NoMatchingSitesError, ConflictError: It cannot run on this model.
    """
    for recipes in combinations:
        accelerate(model, *recipes).remove()
