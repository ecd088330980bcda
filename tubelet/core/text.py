"""Recipes from and to text: `ToMe(r=8)` is parsed against the fields, never evaluated."""

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from tubelet.core.errors import RecipeError
from tubelet.core.recipe import Recipe


def parse_recipe(text: str, known: Mapping[str, type[Recipe]]) -> Recipe:
    """A recipe from text such as `ToMe`, `ToMe(r=8)` or `UniformPool(factor=(1, 2, 2))`.

    Raises:
        RecipeError: Not of that form, an unknown recipe or field, or a value out of range; the
            message names what is allowed.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        name, arguments = _name_and_arguments(tree)
        values = {key: ast.literal_eval(value) for key, value in arguments.items()}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        # Literals can fail in all of these ways; none of them is the caller's business.
        raise RecipeError(
            f"cannot read recipe {text!r}; write a name and fields, such as ToMe(r=8)"
        ) from None
    return build_recipe(name, values, known)


def build_recipe(name: str, values: Mapping[str, Any], known: Mapping[str, type[Recipe]]) -> Recipe:
    """A recipe from its name and fields.

    Raises:
        RecipeError: An unknown recipe or field, or a value out of range.
    """
    if not isinstance(name, str) or name not in known:
        raise RecipeError(f"unknown recipe {name!r}{_nearest(name, list(known))}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    for key in values:
        if key not in fields:
            raise RecipeError(f"{name} has no field {key!r}{_nearest(key, fields)}")
    return known[name](**values)


def recipe_from_dict(data: Mapping[str, Any], known: Mapping[str, type[Recipe]]) -> Recipe:
    """Inverse of `Recipe.to_dict`."""
    values = {key: value for key, value in data.items() if key != "recipe"}
    if "recipe" not in data:
        raise RecipeError(f"a recipe needs a 'recipe' entry with its name, got {dict(data)!r}")
    return build_recipe(data["recipe"], values, known)


def _name_and_arguments(tree: ast.expr) -> tuple[str, dict[str, ast.expr]]:
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)) or tree.args:
        raise ValueError
    arguments = {keyword.arg: keyword.value for keyword in tree.keywords}
    if None in arguments or len(arguments) < len(tree.keywords):
        raise ValueError
    return tree.func.id, {str(key): value for key, value in arguments.items()}


def _nearest(word: str, known: list[str]) -> str:
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(word).lower(), list(lowered), n=1)
    hint = f"; did you mean {lowered[close[0]]}?" if close else ""
    return f"{hint or ';'} known: {', '.join(known)}"
