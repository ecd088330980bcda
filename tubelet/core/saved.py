"""A plan on disk: which recipes, and the model and geometry they were made for."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.core.errors import RecipeError
from tubelet.core.files import write_whole
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Recipe
from tubelet.core.text import recipe_from_dict

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedPlan:
    """Recipes with what they were made for.

    Args:
        recipes: In the order they were given.
        model: Class name of the host.
        num_layers: Layers of the host.
        grid: Token geometry of the clip; None if the model never ran.
    """

    recipes: tuple[Recipe, ...]
    model: str
    num_layers: int
    grid: TokenGrid | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one small JSON file, whole or not at all."""
        data = {
            "format": FORMAT,
            "model": self.model,
            "num_layers": self.num_layers,
            "grid": None if self.grid is None else self.grid.to_dict(),
            "recipes": [recipe.to_dict() for recipe in self.recipes],
        }
        return write_whole(path, json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], known: Mapping[str, type[Recipe]]) -> "SavedPlan":
        """Read a plan.

        Raises:
            RecipeError: The file is missing, is not a plan, or names unknown recipes or fields.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise RecipeError(f"{path} has plan format {data['format']}, not {FORMAT}")
            grid = None if data["grid"] is None else TokenGrid.from_dict(data["grid"])
            recipes = tuple(recipe_from_dict(entry, known) for entry in data["recipes"])
            return cls(
                recipes=recipes, model=data["model"], num_layers=data["num_layers"], grid=grid
            )
        except RecipeError:
            raise
        except OSError as error:
            raise RecipeError(f"cannot read plan {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise RecipeError(f"{path} is not a tubelet plan") from None
