"""Every recipe for video prompts at every budget, set for a small model, with controls beside it.

A budget is the share of the video tokens that is left behind the last cut (of two stages: behind
the first; of one that drops some in every deep layer: there on average). How many tokens a layer
sees on average is measured, not set: inside the language model it is more than in front of it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from tubelet.bench.fidelity.budgets import OutOfReach
from tubelet.bench.llm.run import CONTROLS
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import (
    KVPolicy,
    LayerReduction,
    PositionPolicy,
    PromptReduction,
    Recipe,
    SparsePrefill,
)
from tubelet.models.catalogue import refusal
from tubelet.recipes import catalogue

Kind = Literal["dense", "control", "prompt", "layers", "two stages", "prefill", "cache"]

Recipes = tuple[Recipe, ...]

KEEPS = (0.5, 0.25, 0.125)

CONTROL_KEEPS = (0.75, 0.0625)
"""Further budgets of the controls: recipes are compared with them at any number of tokens."""

PUBLISHED_DEPTH = {
    "AIMPruning": 28,
    "DyCokeDecoding": 28,
    "FlashVID": 28,
    "HoliTomInner": 28,
    "STTM": 28,
}
"""Layers of the language models whose layer numbers are a recipe's defaults; others had 32."""

LONG_PROMPT = 131072
"""Tokens of the prompts that the defaults of sparse prefill, windows and counts, are meant for."""

LEAST_BLOCK, LEAST_ROWS = 16, 8
"""Smallest blocks that kernels take, and about the words of a question."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What settings depend on.

    Args:
        depth: Layers of the language model.
        grid: Video tokens of a clip.
    """

    depth: int
    grid: TokenGrid


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A recipe whose budget follows from the clip: a number is searched that meets it on average.

    Args:
        make: The recipes at a number; more tokens are left the larger it is.
        low, high: Where it is searched.
        second: What acts behind them at its own settings, and takes no part in the search.
    """

    make: Callable[[float], Recipes]
    low: float
    high: float
    second: Recipes = ()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing to measure.

    Args:
        name: Unique in a run.
        family: What it is a setting of.
        kind: Where it acts.
        keep: Wanted budget; None for dense and for what drops no tokens.
        recipes: What runs; none is dense.
        sweep: How the recipes are found, where their budget follows from the clip.
    """

    name: str
    family: str
    kind: Kind
    keep: float | None = None
    recipes: Recipes = ()
    sweep: Sweep | None = None

    @property
    def setting(self) -> str:
        """The recipes with their fields."""
        return " + ".join(str(recipe) for recipe in self.recipes) or "dense"


DENSE = Variant(name="dense", family="dense", kind="dense")

Rule = Callable[[float, Shape], Recipes | Sweep | OutOfReach]


def families() -> dict[str, Kind]:
    """Every family and where it acts, the controls first."""
    there: dict[str, Kind] = dict.fromkeys(CONTROLS, "control")
    for name, cls in catalogue().items():
        if issubclass(cls, PromptReduction):
            there.setdefault(name, "prompt")
        elif issubclass(cls, LayerReduction):
            there[name] = "layers"
    there |= dict.fromkeys(TWO_STAGES, "two stages")
    for name, cls in catalogue().items():
        if issubclass(cls, SparsePrefill):
            there[name] = "prefill"
        elif issubclass(cls, KVPolicy):
            there[name] = "cache"
    return there


def check_families(names: Iterable[str]) -> None:
    """Refuse an unknown family.

    Raises:
        RecipeError: Listing all.
    """
    known = families()
    for name in names:
        if name not in known:
            raise RecipeError(
                f"no recipe for prompts is called {name!r}; known: {', '.join(known)}"
            )


def make_variants(
    keeps: Sequence[float],
    shape: Shape,
    names: Sequence[str] = (),
    lacks: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Variant], list[str]]:
    """All variants, dense first and then the controls, and a note for what cannot be set so.

    Args:
        keeps: Budgets in (0, 1).
        shape: Of the model.
        names: Families to run beside the controls; none means all.
        lacks: What the model does not offer, with reasons.
    """
    check_families(names)
    variants, notes = [DENSE], []
    for family, kind in families().items():
        if names and family not in names and kind != "control":
            continue
        reason = _refusal(family, lacks)
        if reason is not None:
            notes.append(f"{family} was not run: it {reason}")
            continue
        for keep in _keeps_of(kind, keeps):
            name = family if keep is None else f"{family} {keep:g}"
            made = _made(family, keep, shape)
            if isinstance(made, OutOfReach):
                notes.append(f"{name} was not run: {made.reason}")
                continue
            swept = isinstance(made, Sweep)
            variants.append(
                Variant(
                    name=name,
                    family=family,
                    kind=kind,
                    keep=keep,
                    recipes=() if swept else made,
                    sweep=made if swept else None,
                )
            )
    return variants, notes


def _keeps_of(kind: Kind, keeps: Sequence[float]) -> Sequence[float | None]:
    if kind in ("prefill", "cache"):
        return (None,)
    return sorted({*keeps, *CONTROL_KEEPS})[::-1] if kind == "control" else keeps


def _refusal(family: str, lacks: Mapping[str, str]) -> str | None:
    """Why the model cannot take a family, or nobody can set it."""
    stages = [catalogue()[name] for name in family.split(" + ")]
    for cls in stages:
        if (reason := refusal(cls, dict(lacks))) is not None:
            return reason
    fields = {field.name for cls in stages for field in dataclasses.fields(cls)}
    dropping = issubclass(stages[0], PositionPolicy)
    if dropping and family not in RULES and "keep_ratio" not in fields:
        return "has no keep_ratio, and no rule here says what a budget means for it"
    return None


def _made(family: str, keep: float | None, shape: Shape) -> Recipes | Sweep | OutOfReach:
    if keep is None:
        return (_scaled(family, shape),)
    try:
        return RULES.get(family, _with_keep_ratio(family))(keep, shape)
    except RecipeError as error:
        return OutOfReach(str(error))


# Layers


def at_depth(layer: int, published: int, depth: int) -> int:
    """The layer at the same relative depth, among 1 to depth - 1."""
    return min(max(1, int(layer * depth / published + 0.5)), depth - 1)


def _layer(name: str, shape: Shape, layer: int | None = None) -> int:
    default = _default(name, "layer") if layer is None else layer
    return at_depth(default, PUBLISHED_DEPTH.get(name, 32), shape.depth)


def _layers(name: str, shape: Shape) -> tuple[int, ...]:
    """Several layers at their relative depths, each behind the one before where there is room."""
    found: list[int] = []
    for layer in _default(name, "layers"):
        place = _layer(name, shape, layer)
        found.append(max(place, found[-1] + 1) if found else place)
    return tuple(layer for layer in found if layer < shape.depth)


def _default(name: str, field: str) -> Any:
    return catalogue()[name].__dataclass_fields__[field].default


def _make(name: str, **fields: Any) -> Recipe:
    return catalogue()[name](**fields)


# Budgets


def _short(value: float) -> float:
    """Few digits, so that settings stay readable."""
    return float(f"{value:.4g}")


def _with_keep_ratio(name: str) -> Rule:
    """A recipe whose `keep_ratio` is the budget; a layer keeps its relative depth."""

    def rule(keep: float, shape: Shape) -> Recipes:
        inside = issubclass(catalogue()[name], LayerReduction)
        placed = {"layer": _layer(name, shape)} if inside else {}
        return (_make(name, keep_ratio=keep, **placed),)

    return rule


def _dycoke(keep: float, shape: Shape) -> Recipes | OutOfReach:
    """Every fourth frame stays whole, so the ratio is that of the others."""
    frames, places = shape.grid.frames, shape.grid.per_frame
    whole = -(-frames // 4)
    least = (whole * places + frames - whole) / shape.grid.num_video
    if keep < least - 0.02:
        return OutOfReach(f"DyCoke keeps every fourth frame, {least:.0%} of this video at least")
    ratio = (keep * frames - whole) / max(frames - whole, 1)
    return (_make("DyCoke", keep_ratio=_short(max(ratio, 1 / places))),)


def _holitom(keep: float, shape: Shape) -> Recipes:
    """The authors pair ratios with thresholds."""
    return (_make("HoliTom", keep_ratio=keep, threshold=0.65 if keep < 0.15 else 0.8),)


def _segmented(name: str) -> Rule:
    """At least as many segments per frame as the authors' 8 of 32."""

    def rule(keep: float, shape: Shape) -> Recipes:
        segments = max(1, round(_default(name, "segments") * shape.grid.frames / 32))
        return (_make(name, keep_ratio=keep, segments=segments),)

    return rule


def _f2c(keep: float, shape: Shape) -> Recipes:
    """Pooled by boxes, all frames together take a quarter: above it, frames stay as fine."""
    return (_make("F2C", keep_ratio=keep, box=1 if keep > 0.25 else 2),)


def _kffocus(keep: float, shape: Shape) -> Recipes:
    """Key frames and boxes of the others that come nearest."""
    grid = shape.grid

    def share(keys: int, box: int) -> float:
        coarse = -(-grid.height // box) * -(-grid.width // box)
        return (keys * grid.per_frame + (grid.frames - keys) * coarse) / grid.num_video

    boxes = [box for box in (2, 4, 8) if box <= grid.height]
    keys, box = min(
        itertools.product(range(1, grid.frames + 1), boxes),
        key=lambda pair: abs(share(*pair) - keep),
    )
    return (_make("KFFocus", key_ratio=keys / grid.frames, box=box),)


def _free_video_llm(keep: float, shape: Shape) -> Recipes:
    """Close frames, three by the question to five even ones, and the size of skimmed ones."""
    grid, window, pool = (shape.grid, *(_default("FreeVideoLLM", n) for n in ("window", "pool")))
    tall, wide = (max(1, round(n * window**0.5)) for n in (grid.height, grid.width))
    close = -(-tall // pool) * wide

    def share(frames: int, side: int) -> float:
        return (frames * close + (grid.frames - frames) * side**2) / grid.num_video

    sides = [side for side in (1, 2, 4) if side <= grid.height]
    frames, side = min(
        itertools.product(range(1, grid.frames + 1), sides),
        key=lambda pair: abs(share(*pair) - keep),
    )
    slow = math.ceil(frames * 3 / 8)
    return (_make("FreeVideoLLM", slow=slow, middle=frames - slow, side=side),)


def _tsllava(keep: float, shape: Shape) -> Recipes:
    """A thumbnail of about the authors' share of the frames."""
    return (_make("TSLLaVA", keep_ratio=keep, thumbnail=max(2, round(shape.grid.frames * 0.12))),)


def _aim_pruning(keep: float, shape: Shape) -> Recipes:
    """The slope at which deep layers see the budget on average."""
    layer = _layer("AIMPruning", shape)
    deep = shape.depth - layer
    return (_make("AIMPruning", layer=layer, slope=_short(2 * (1 - keep) / (deep + 1))),)


def _pyramid_drop(keep: float, shape: Shape) -> Recipes:
    """The same share at each cut."""
    layers = _layers("PyramidDrop", shape)
    return (_make("PyramidDrop", layers=layers, keep_ratio=_short(keep ** (1 / len(layers)))),)


def _sparse_vlm(keep: float, shape: Shape) -> Recipes:
    """The authors' counts times a factor."""
    layers, counts = _layers("SparseVLM", shape), _default("SparseVLM", "keep_ratios")
    used = counts[-len(layers) :]
    ratios = tuple(_short(min(1.0, count * keep / used[-1])) for count in used)
    return (_make("SparseVLM", layers=layers, keep_ratios=ratios),)


# Budgets that follow from the clip


def _prune_vid(keep: float, shape: Shape) -> Sweep:
    """Its ratio is of what folding leaves."""
    return Sweep(make=lambda x: (_make("PruneVid", keep_ratio=_short(x)),), low=0.001, high=1.0)


def _cosine(x: float) -> float:
    """From 0 to 1 the finer the nearer to 1, where most tokens of a video lie."""
    return round(1 - 10**-x, 5)


def _scissor(keep: float, shape: Shape) -> Sweep:
    return Sweep(make=lambda x: (_make("LLaVAScissor", threshold=_cosine(x)),), low=0.0, high=4.0)


def _sttm(keep: float, shape: Shape) -> Sweep:
    """Both thresholds, on the line through the ends of the authors' ranges and then on to dense."""

    def make(x: float) -> Recipes:
        spatial = _cosine(x)
        temporal = _short(0.65 + (0.75 if spatial < 0.95 else 7.0) * (spatial - 0.95))
        return (_make("STTM", spatial=spatial, temporal=temporal, layer=_layer("STTM", shape)),)

    return Sweep(make=make, low=0.0, high=4.0)


def _must_drop(keep: float, shape: Shape) -> Sweep:
    """Both thresholds, which are equal by default, on a logarithmic scale."""
    layers = _layers("MustDrop", shape)

    def make(x: float) -> Recipes:
        bound = _short(10**-x)
        return (_make("MustDrop", layers=layers, share=bound, single=bound),)

    return Sweep(make=make, low=1.0, high=5.0)


# Two stages


def _both(first: str, second: Callable[[Shape], Recipe]) -> Rule:
    """The first stage brings the prompt to the budget; the second is the authors'."""

    def rule(keep: float, shape: Shape) -> Recipes | Sweep | OutOfReach:
        made = RULES.get(first, _with_keep_ratio(first))(keep, shape)
        if isinstance(made, Sweep):
            return dataclasses.replace(made, second=(second(shape),))
        return made if isinstance(made, OutOfReach) else (*made, second(shape))

    return rule


def _flashvid(keep: float, shape: Shape) -> Recipes:
    """1.25 times the budget enters, and 0.3 of that goes on at five sevenths of the depth."""
    made = _segmented("FlashVID")(min(1.25 * keep, 1.0), shape)
    assert isinstance(made, tuple)
    layer = _layer("FlashVID", shape, 20)
    return (*made, _make("FastV", layer=layer, keep_ratio=0.3))


def _inner(name: str) -> Callable[[Shape], Recipe]:
    return lambda shape: _make(name, layer=_layer(name, shape))


def _aim_inner(shape: Shape) -> Recipe:
    """The authors' slope for 28 layers, steeper where there are fewer."""
    slope = min(1.0, _default("AIMPruning", "slope") * PUBLISHED_DEPTH["AIMPruning"] / shape.depth)
    return _make("AIMPruning", layer=_layer("AIMPruning", shape), slope=_short(slope))


TWO_STAGES: dict[str, Rule] = {
    "AIMMerging + AIMPruning": _both("AIMMerging", _aim_inner),
    "FlashVID + FastV": _flashvid,
    "HoliTom + HoliTomInner": _both("HoliTom", _inner("HoliTomInner")),
    "PruneVid + PruneVidInner": _both("PruneVid", _inner("PruneVidInner")),
}
"""Methods of two stages, by what they are made of."""

RULES: dict[str, Rule] = {
    **TWO_STAGES,
    "AIMPruning": _aim_pruning,
    "DyCoke": _dycoke,
    "F2C": _f2c,
    "FastVID": _segmented("FastVID"),
    "FlashVID": _segmented("FlashVID"),
    "FreeVideoLLM": _free_video_llm,
    "HoliTom": _holitom,
    "KFFocus": _kffocus,
    "LLaVAScissor": _scissor,
    "MustDrop": _must_drop,
    "PruneVid": _prune_vid,
    "PyramidDrop": _pyramid_drop,
    "SparseVLM": _sparse_vlm,
    "STTM": _sttm,
    "TSLLaVA": _tsllava,
}
"""What a budget means where it is not simply `keep_ratio`."""


# No tokens go


def _scaled(name: str, shape: Shape) -> Recipe:
    """The defaults, with sizes in tokens as parts of a prompt that they are not meant for."""
    rule = SCALED.get(name)
    return _make(name) if rule is None else rule(shape)


def _in_tokens(name: str, *fields: str) -> Callable[[Shape], Recipe]:
    """Sparse prefill with these fields as they would be for a prompt of this length."""

    def rule(shape: Shape) -> Recipe:
        factor = shape.grid.num_video / LONG_PROMPT
        given: dict[str, Any] = {n: max(1, round(_default(name, n) * factor)) for n in fields}
        if "rows" in catalogue()[name].__dataclass_fields__:
            given["rows"] = LEAST_ROWS
        return _make(name, block=(LEAST_BLOCK, LEAST_BLOCK), **given)

    return rule


def _tidal_decode(shape: Shape) -> Recipe:
    """Layers at their relative depths, from the first on, and a quarter of the video's tokens."""
    places = [int(layer * shape.depth / 32 + 0.5) for layer in _default("TidalDecode", "layers")]
    layers = tuple(sorted({min(place, shape.depth - 2) for place in places}))
    return _make("TidalDecode", layers=layers, tokens=max(1, shape.grid.num_video // 4))


SCALED: dict[str, Callable[[Shape], Recipe]] = {
    "AShape": _in_tokens("AShape", "window", "sink"),
    "GridAttention": _in_tokens("GridAttention", "window", "sink"),
    "VerticalSlash": _in_tokens("VerticalSlash", "window", "vertical", "slash", "sink"),
    "DyCokeDecoding": _inner("DyCokeDecoding"),
    "TidalDecode": _tidal_decode,
}


def has_budget(recipes: Recipes) -> bool:
    """Whether any of the recipes drops tokens."""
    return any(isinstance(recipe, PositionPolicy) for recipe in recipes)
