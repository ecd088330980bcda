"""What `tubelet bench generation --curves` draws: every block policy, from dense to very sparse.

Densities in the comments are those of the sparse calls on `tubelet-dit`, 8 x 32 x 32 tokens, as
measured on a few calls; the run measures its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tubelet.bench.fidelity.generation_ranking import setting
from tubelet.core.errors import RecipeError
from tubelet.core.recipe import AttentionCompensation, Recipe
from tubelet.core.report import Report
from tubelet.recipes import catalogue
from tubelet.recipes.block_policy import BlockPolicy
from tubelet.recipes.compensation import DeltaRows, Rettention, ZerothOrder

PAIRS = 8
"""Clips of every way unless asked otherwise: one batch on a GPU."""

DENSE_STEPS = 0.2
"""Warm-up of all policies alike: the share of the steps that stay dense."""

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Of every policy with a density and no settings of its own below."""

Fields = Mapping[str, Any]

SETTINGS: dict[str, tuple[Fields, ...]] = {
    # Tiles that divide the grid and are whole blocks: 42, 25, 13 and 6 %.
    "SlidingTile": tuple(
        {"tile": (2, 8, 8), "window": window}
        for window in ((3, 3, 3), (4, 2, 2), (2, 2, 2), (1, 2, 2))
    ),
    # 42, 24, 10 and 5 %; the default is dense on so small a grid.
    "NeighborhoodAttention": (
        {"window": (5, 17, 17)},
        {"window": (3, 9, 9)},
        {"window": (1, 9, 9)},
        {"window": (1, 5, 5), "tile": (2, 4, 8), "block": (64, 64)},
    ),
    # 60, 44 and 34 %: adjacent frames see each other whole, which is 34 % of eight frames.
    "RadialAttention": ({"decay": 0.2}, {"decay": 0.05}, {"decay": 0.05, "sink": False}),
    # 81, 53 and 34 %: one reference is the least.
    "EfficientVDiT": ({"references": 4}, {"references": 2}, {"references": 1}),
    # 59, 41, 13 and 6 %; the first frame alone is 12 %.
    "SVG": (
        {"density": 0.5},
        {"density": 0.25},
        {"density": 0.15, "sink": False},
        {"density": 0.05, "sink": False, "block": (64, 64)},
    ),
    # 39, 20, 12 and 5 %: the search steers it, not the width of a band alone.
    "SparseVDiT": ({"density": 0.5, "weight": 0.1}, {"weight": 0.25}, {}, {"weight": 2.0}),
    # 81, 46, 22 and 8 %; the default window is most of this grid.
    "NABLA": (
        {},
        {"mass": 0.7, "window": (3, 3, 3)},
        {"mass": 0.5, "window": (1, 1, 1)},
        {"mass": 0.2, "window": (1, 1, 1)},
    ),
    # 95, 35, 22 and 7 %; at the default almost every block is doubtful, at -1 none.
    "SpargeAttention": (
        {},
        {"mass": 0.7, "similarity": -1.0},
        {"mass": 0.5, "similarity": -1.0},
        {"mass": 0.2, "similarity": -1.0},
    ),
    # 49, 34, 21 and 6 %.
    "SolAttn": tuple({"deviations": n} for n in (0.0, 0.5, 1.0, 2.0)),
    # 46, 26, 14 and 9 %.
    "VMoBA": tuple({"mass": mass} for mass in (0.5, 0.25, 0.1, 0.02)),
    # 60, 36, 23 and 8 %.
    "XAttention": tuple({"mass": mass} for mass in (0.9, 0.7, 0.5, 0.2)),
}
"""Fields of policies that are steered by something else than a density, from dense to sparse."""

COMPENSATED: dict[str, tuple[Fields, ...]] = {
    "SubBlock": ({"density": 0.2}, {"density": 0.1}),
    "RandomBlocks": ({"density": 0.2}, {"density": 0.1}),
    "SlidingTile": (SETTINGS["SlidingTile"][1], SETTINGS["SlidingTile"][2]),
}
"""Policies that are drawn with each term too, at two settings of their curve."""

TERMS = (ZerothOrder(), DeltaRows(), Rettention())

Named = tuple[str, tuple[Recipe, ...]]
"""A name and the recipes that run together."""


def curve_policies() -> dict[str, type[Recipe]]:
    """The block policies of the catalogue."""
    return {n: cls for n, cls in catalogue().items() if issubclass(cls, BlockPolicy)}


def settings_of(policy: type[Recipe]) -> tuple[Fields, ...]:
    """Fields of a policy at every point of its curve.

    Raises:
        RecipeError: It has neither a density nor settings here.
    """
    name = policy.__name__
    if name in SETTINGS:
        return SETTINGS[name]
    if "density" not in policy.__dataclass_fields__:
        raise RecipeError(f"{name} has no density; its settings belong into SETTINGS of {__name__}")
    return tuple({"density": density} for density in DENSITIES)


def curve_recipes(text: str, dense_steps: float, quick: bool = False) -> list[Named]:
    """What is drawn: all settings of the policies, then terms beside some of them.

    Args:
        text: "all", or names of policies, comma-separated.
        dense_steps: Warm-up of all of them, in [0, 1); no layer stays dense.
        quick: Only the ends of each curve, and one compensated setting.

    Raises:
        RecipeError: A name is unknown.
    """
    known = curve_policies()
    names = list(known) if text == "all" else [word.strip() for word in text.split(",")]
    for name in names:
        if name not in known:
            raise RecipeError(f"--curves takes all, or some of {', '.join(known)}; got {name!r}")
    names = list(dict.fromkeys(names))
    drawn, compensated = [], []
    for name in names:
        points, terms = settings_of(known[name]), COMPENSATED.get(name, ())
        if quick:
            points = tuple({str(p): p for p in (points[0], *terms[:1], points[-1])}.values())
            terms = terms[:1]
        drawn += [(_policy(known[name], fields, dense_steps),) for fields in points]
        compensated += [
            (_policy(known[name], fields, dense_steps), term) for fields in terms for term in TERMS
        ]
    return [(_name(recipes), recipes) for recipes in (*drawn, *compensated)]


def _policy(policy: type[Recipe], fields: Fields, dense_steps: float) -> Recipe:
    return policy(**fields, dense_steps=dense_steps, dense_layers=0)  # type: ignore[call-arg]


def _name(recipes: tuple[Recipe, ...]) -> str:
    return " + ".join([setting(recipes[0]), *map(str, recipes[1:])])


@dataclasses.dataclass(frozen=True)
class Work:
    """What sparse attention computed, as shares of all block pairs.

    Args:
        density: Mean over the sparse calls; None without any.
        computed: Of the whole run: dense calls count whole, and so does what terms add.
        kernels: Implementations that computed the sparse calls.
    """

    density: float | None = None
    computed: float | None = None
    kernels: tuple[str, ...] = ()


def work_of(report: Report, recipes: Sequence[Recipe], sites: int) -> Work:
    """Read from the report of a run of a model with so many attention calls per forward pass."""
    shares = [sum(call["heads"]) / len(call["heads"]) for call in report.densities()]
    if not shares:
        return Work()
    density = sum(shares) / len(shares)
    calls = report.calls * sites
    terms = [recipe for recipe in recipes if isinstance(recipe, AttentionCompensation)]
    # Calls that a term does densely to compare with are computed twice.
    twice = sum(report.fallbacks[f"{term.name}: dense to compare with"] for term in terms)
    added = _added(recipes, density) * len(shares)
    computed = (calls - len(shares) + sum(shares) + twice + added) / calls
    return Work(density, computed, _kernels(report, recipes))


def _added(recipes: Sequence[Recipe], density: float) -> float:
    """Pairs of query and key that terms add to a sparse call, as a share of all of its pairs."""
    added = 0.0
    for recipe in recipes:
        if isinstance(recipe, DeltaRows) and recipe.stride is not None:
            added += 1 / recipe.stride
        if isinstance(recipe, ZerothOrder) or getattr(recipe, "approximate", False):
            # One mean key stands for every block that is left out.
            policy = next(r for r in recipes if isinstance(r, BlockPolicy))
            added += (1 - density) / policy.block[1]
    return added


def _kernels(report: Report, recipes: Sequence[Recipe]) -> tuple[str, ...]:
    heads = [f"{recipe}: " for recipe in recipes if isinstance(recipe, BlockPolicy)]
    return tuple(
        what.removeprefix(head)
        for what in report.attention
        for head in heads
        if what.startswith(head)
    )
