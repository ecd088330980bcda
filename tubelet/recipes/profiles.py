"""Profiles: what a search found for each head, in one small JSON file."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tubelet.core.errors import RecipeError
from tubelet.core.files import write_whole


def save_profile(
    path: str | os.PathLike[str], recipe: str, layers: Mapping[int, Sequence[Any]]
) -> Path:
    """Write what `recipe` shall do, one entry per head of each layer.

    Raises:
        TubeletError: The folder cannot be written.
    """
    data = {"recipe": recipe, "layers": {str(n): list(heads) for n, heads in layers.items()}}
    return write_whole(path, json.dumps(data))


@lru_cache(maxsize=8)
def _load(path: str, recipe: str) -> dict[int, list[Any]]:
    try:
        data = json.loads(Path(path).read_text())
        named = data["recipe"]
        layers = {int(layer): list(heads) for layer, heads in data["layers"].items()}
    except OSError as error:
        raise RecipeError(f"cannot read profile {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"{path} is not a profile; save_profile writes them") from None
    if named != recipe:
        raise RecipeError(f"profile {path} is for {named}, not for {recipe}")
    return layers


def profile_of(path: str, recipe: str, layer: int, heads: int) -> list[Any]:
    """The entries of one layer.

    Raises:
        RecipeError: The file cannot be read, is for another recipe, or lacks this layer or has
            another number of heads for it.
    """
    layers = _load(path, recipe)
    if layer not in layers:
        known = ", ".join(map(str, sorted(layers))) or "none"
        raise RecipeError(f"profile {path} has no layer {layer}; it has {known}")
    if len(layers[layer]) != heads:
        raise RecipeError(
            f"profile {path} has {len(layers[layer])} heads in layer {layer}, the model {heads}"
        )
    return layers[layer]
