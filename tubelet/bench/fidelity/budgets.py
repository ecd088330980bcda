"""From a budget to a recipe: the mean over layers of the tokens entering them, as a share.

A recipe acts between a layer's attention and its MLP, so a layer that reduces is still entered by
all of its tokens, and nothing that acts inside the layers gets below 1 / depth.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Recipe
from tubelet.ops.merge import pooled_shape
from tubelet.ops.select import budget
from tubelet.recipes import catalogue
from tubelet.recipes.learned import LEARNED_KEEPS, LEARNED_LAYERS, at_layer, learned_recipes

KEEPS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
"""Shares of the dense tokens that the protocol asks for."""

THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""RLT's sweep, in intensities of [0, 1]; its budget follows from the clip."""

TOLERANCE = 0.02
"""A recipe that cannot come closer to a budget than this is not run there."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a budget is solved for.

    Args:
        layers: Depth of the model.
        grid: Tokens of the clip.
        std: Pixel normalisation of the model, for thresholds in its units.
    """

    layers: int
    grid: TokenGrid
    std: float = 0.225

    def share(self, entering: Sequence[int]) -> float:
        """Mean over layers of the tokens entering them, relative to dense."""
        return sum(entering) / len(entering) / self.grid.num_tokens


@dataclass(frozen=True)
class OutOfReach:
    """Why a recipe is not run at a budget."""

    reason: str


def check_keep(keep: float, tokens: int) -> None:
    """Refuse a budget outside (0, 1], or one that keeps no token.

    Raises:
        RecipeError: With the least budget for that many tokens.
    """
    if not 0 < keep <= 1:
        raise RecipeError(f"keep must lie in (0, 1], got {keep}")
    if round(keep * tokens) < 1:
        raise RecipeError(
            f"keep={keep:g} of {tokens} tokens rounds to none; the least is {1 / tokens:.2g}"
        )


@cache
def at_budget(name: str, keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """The recipe whose mean tokens per layer come nearest to `keep` times dense.

    Args:
        name: A recipe of `SOLVERS`.
        keep: Wanted share in (0, 1).
        geometry: Of model and clip.

    Raises:
        RecipeError: No rule for that recipe, or the budget keeps no token.
    """
    check_keep(keep, geometry.grid.num_video)
    if name not in SOLVERS:
        raise RecipeError(f"no budget rule for {name!r}; there are {', '.join(SOLVERS)}")
    return SOLVERS[name](keep, geometry)


def removing(removed: Sequence[float], geometry: Geometry) -> list[int]:
    """Tokens entering each layer when layer i removes `removed[i]`, at most half of what it has."""
    entering, now = [], geometry.grid.num_tokens
    for layer in range(geometry.layers):
        entering.append(now)
        wanted = removed[layer] if layer < len(removed) else 0
        now -= min(round(wanted), (now - geometry.grid.before) // 2)
    return entering


def solve(
    share_of: Callable[[float], float], low: float, high: float, target: float, whole: bool = False
) -> float:
    """Argument in [low, high] whose share is nearest to `target`; the share never rises with it."""
    for _ in range(50):
        if whole and high - low <= 1:
            break
        middle = (low + high) // 2 if whole else (low + high) / 2
        low, high = (middle, high) if share_of(middle) > target else (low, middle)
    return min(low, high, key=lambda x: abs(share_of(x) - target))


def _make(name: str, **fields: Any) -> Recipe:
    return catalogue()[name](**fields)


def _reached(recipe: Recipe, share: float, keep: float) -> Recipe | OutOfReach:
    if abs(share - keep) <= TOLERANCE:
        return recipe
    return OutOfReach(f"{recipe.name} comes no nearer to a budget of {keep:g} than {share:.3f}")


def _random_drop(keep: float, geometry: Geometry) -> Recipe:
    return _make("RandomDrop", keep_ratio=keep)


def _tome(keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """Constant r as in the paper, a falling r, or halving at once.

    The first of these that ends with at least a quarter of the mean budget is taken: at small
    budgets a constant r would leave a handful of tokens to the last layers.
    """
    grid, layers = geometry.grid, geometry.layers

    def falling(r: float, inflection: float) -> list[int]:
        steps = max(layers - 1, 1)
        slope = [1 - inflection + 2 * inflection * i / steps for i in range(layers)]
        return removing([r * s if layers > 1 else r for s in slope], geometry)

    for inflection in (0.0, -1.0):
        r = solve(
            lambda x, i=inflection: geometry.share(falling(x, i)), 0, grid.num_video, keep, True
        )
        entering = falling(r, inflection)
        close = abs(geometry.share(entering) - keep) <= TOLERANCE / 2
        if close and entering[-1] >= keep * grid.num_tokens / 4:
            return _make("ToMe", r=int(r), inflection=inflection)
    removed = _halving(keep, geometry)
    share = geometry.share(removing(removed, geometry))
    return _reached(_make("ToMe", r=removed), share, keep)


def _halving(keep: float, geometry: Geometry) -> tuple[int, ...]:
    """Removals of the first layers: half each time, less in the last of them."""
    removed: tuple[int, ...] = ()
    for _ in range(geometry.layers - 1):
        now = removing((*removed, 0), geometry)[len(removed)]
        most = (now - geometry.grid.before) // 2
        if geometry.share(removing((*removed, most), geometry)) > keep:
            removed = (*removed, most)
            continue

        def share_of(r: float, before: tuple[int, ...] = removed) -> float:
            return geometry.share(removing((*before, r), geometry))

        return (*removed, int(solve(share_of, 0, most, keep, True)))
    return removed


def _vid_tldr(keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """The authors' shares times a factor; where three layers are too few, more of the last."""
    profile = list(catalogue()["VidTLDR"]().share)
    num = geometry.grid.num_video

    def shares(factor: float) -> tuple[float, ...]:
        entering = removing([factor * p * num for p in profile], geometry)
        after = [*entering[1:], entering[-1]]
        return tuple((a - b) / num for a, b in zip(entering, after, strict=True))[: len(profile)]

    def share_of(factor: float) -> float:
        return geometry.share(removing([factor * p * num for p in profile], geometry))

    while share_of(num) > keep and len(profile) < geometry.layers - 1:
        profile.append(profile[-1])
    factor = solve(share_of, 0.0, float(num), keep)
    return _reached(_make("VidTLDR", share=shares(factor)), share_of(factor), keep)


def _evad(keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """The authors' depths where they reach the budget, else earlier ones."""
    grid, layers = geometry.grid, geometry.layers

    def entering(ratio: float, depths: tuple[float, ...]) -> list[int]:
        acting = {int(depth * layers) for depth in depths}
        counts, now = [], grid.num_tokens
        for layer in range(layers):
            counts.append(now)
            if layer in acting:
                now = budget(now, ratio, min(now, grid.before + grid.per_frame))
        return counts

    best: tuple[float, Recipe] | None = None
    for depths in (catalogue()["EVAD"]().depths, (0.0, 0.25, 0.5), (0.0,)):
        ratio = 1 - solve(
            lambda x, d=depths: geometry.share(entering(1 - x, d)), 0.0, 1 - 1e-6, keep
        )
        share = geometry.share(entering(ratio, depths))
        if best is None or abs(share - keep) < abs(best[0] - keep) - TOLERANCE / 4:
            best = (share, _make("EVAD", keep_ratio=ratio, depths=depths))
    assert best is not None
    return _reached(best[1], best[0], keep)


def _ats(keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """Sampling levels as if every level picked a token of its own; fewer tokens stay."""
    grid, layers = geometry.grid, geometry.layers

    def share_of(samples: float, first: int) -> float:
        kept = grid.before + budget(grid.num_video, samples)
        return geometry.share([grid.num_tokens if i <= first else kept for i in range(layers)])

    for first in (layers // 4, 0):
        samples = 1 - solve(lambda x, f=first: share_of(1 - x, f), 0.0, 1 - 1e-6, keep)
        if abs(share_of(samples, first) - keep) <= TOLERANCE and samples >= keep / 4:
            return _make("ATS", first_layer=first, samples=samples)
    return OutOfReach(f"ATS keeps its first layer whole; a budget of {keep:g} is out of reach")


def _pool(keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """The nearest box; between equal ones the least in time, then the squarest."""
    grid = geometry.grid

    def rank(factor: tuple[int, int, int]) -> tuple[float, int, int]:
        num = math.prod(pooled_shape(grid, factor))
        apart = round(abs(num / grid.num_video - keep), 6)
        return apart, factor[0], max(factor[1:]) - min(factor[1:])

    sides = [range(1, min(n, 4) + 1) for n in (grid.frames, grid.height, grid.width)]
    factor = min(itertools.product(*sides), key=rank)
    if factor == (1, 1, 1):
        return OutOfReach(f"UniformPool has no box near a budget of {keep:g}")
    return _make("UniformPool", factor=factor)


def _learned(name: str, keep: float, geometry: Geometry) -> Recipe | OutOfReach:
    """The last layer that does not have to keep much less than the budget afterwards.

    A later layer sees more before it chooses, but an extreme keep ratio costs more than that.
    """
    layers = geometry.layers
    for layer in sorted(LEARNED_LAYERS, reverse=True):
        ratio = (keep * layers - layer - 1) / max(layers - layer - 1, 1)
        if ratio >= max(keep / 2, LEARNED_KEEPS[0]):
            return at_layer(name, layer, min(ratio, 1.0))
    return OutOfReach(f"{name} was not trained to keep so little as a budget of {keep:g} needs")


def thresholds(count: int) -> tuple[float, ...]:
    """`count` of RLT's thresholds, evenly over the sweep."""
    if count >= len(THRESHOLDS):
        return THRESHOLDS
    last = len(THRESHOLDS) - 1
    return tuple(THRESHOLDS[round((i + 1) * last / count)] for i in range(count))


SOLVERS: dict[str, Callable[[float, Geometry], Recipe | OutOfReach]] = {
    "RandomDrop": _random_drop,
    "UniformPool": _pool,
    "ToMe": _tome,
    "VidTLDR": _vid_tldr,
    "EVAD": _evad,
    "ATS": _ats,
    **{name: partial(_learned, name) for name in learned_recipes()},
}
"""Recipes that are set by a budget."""
