"""Everything that is put beside the dense model: methods, baselines, ceiling, controls.

Two regimes are never mixed. "training-free" puts recipes on a dense model that never saw them;
"trained" uses a model that was trained with the reducers it carries, with controls of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tubelet.bench.fidelity.budgets import Geometry, OutOfReach, at_budget, thresholds
from tubelet.bench.fidelity.hosts import Host
from tubelet.bench.fidelity.oracle import KeepFrames, Oracle
from tubelet.bench.fidelity.transforms import (
    Transform,
    fewer_frames,
    lower_resolution,
    shuffled_frames,
    single_frame,
)
from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.core.recipe import RaggedReduction, Recipe
from tubelet.models.accelerate import accelerate
from tubelet.recipes import catalogue
from tubelet.recipes.learned import learned_recipes

Kind = Literal["dense", "random", "baseline", "small", "oracle", "method", "control"]
Regime = Literal["training-free", "trained"]

METHODS = ("ToMe", "VidTLDR", "EVAD", "ATS", "RLT")
"""Training-free methods that run unless others are named."""

TRAINED = tuple(learned_recipes())
"""Methods whose modules are trained together with the model."""

Plan = Callable[[Geometry], Recipe | OutOfReach | None]
Change = Callable[[Geometry], Transform]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing to measure.

    Args:
        name: Unique in a run.
        family: Line of the plot that it belongs to.
        kind: Its part in the comparison.
        regime: Training-free or trained.
        host: Model that runs.
        keep: Wanted budget; None for dense, for controls and for what has no budget.
        plan: The recipe for a geometry, a reason why there is none, or None for dense.
        change: What is done to the clip first.
        shuffled_labels: Score against the labels of other clips.
    """

    name: str
    family: str
    kind: Kind
    regime: Regime = "training-free"
    host: Host
    keep: float | None = None
    plan: Plan | None = None
    change: Change | None = None
    shuffled_labels: bool = False

    def recipe(self, geometry: Geometry) -> Recipe | OutOfReach | None:
        """What runs on the model for clips of that geometry."""
        return None if self.plan is None else self.plan(geometry)

    def setting(self, geometry: Geometry) -> str:
        """The recipe with its fields, or the family's name."""
        recipe = self.recipe(geometry)
        return self.family if recipe is None else str(recipe)

    def ragged(self, geometry: Geometry) -> bool:
        """Whether its cost depends on what the clip shows."""
        return isinstance(self.recipe(geometry), RaggedReduction)


def known_recipes() -> list[str]:
    """Methods that can be named."""
    there = catalogue()
    return [n for n in (*METHODS, "RandomDrop", "UniformPool", *TRAINED) if n in there]


def check_recipes(names: Sequence[str]) -> None:
    """Refuse a name without a budget rule.

    Raises:
        RecipeError: Listing those that have one.
    """
    for name in names:
        if name not in known_recipes():
            raise RecipeError(
                f"no budget rule for recipe {name!r}; the bench has {', '.join(known_recipes())}"
            )


def make_variants(
    hosts: Sequence[Host], keeps: Sequence[float], recipes: Sequence[str] = ()
) -> list[Variant]:
    """All variants, the dense model first.

    Args:
        hosts: One "dense", any number of "small", at most one "trained".
        keeps: Budgets in (0, 1]; 1 is the dense model.
        recipes: Methods to run; none means all.
    """
    check_recipes(recipes)
    wanted = tuple(recipes) or (*METHODS, *TRAINED)
    small_keeps = [keep for keep in keeps if keep < 1]
    dense = next(host for host in hosts if host.role == "dense")
    variants = [Variant(name="dense", family="dense", kind="dense", host=dense)]
    variants += _references(dense, "training-free", small_keeps)
    variants += _input_baselines(dense, small_keeps)
    for name in wanted:
        if name == "RLT":
            variants += _thresholds(dense, len(small_keeps))
        elif name in METHODS:
            variants += [_budgeted(name, keep, dense) for keep in small_keeps]
    for host in hosts:
        if host.role == "small":
            name = f"dense, {host.name}"
            variants.append(Variant(name=name, family="smaller dense", kind="small", host=host))
        elif host.role == "trained":
            variants += _trained(host, small_keeps, wanted)
    return variants + _controls(dense)


def drop_unsupported(
    variants: Sequence[Variant], geometries: Sequence[Geometry]
) -> tuple[list[Variant], list[str]]:
    """Variants that run at some geometry, and a note for every one that does not."""
    kept, notes = [], []
    for variant in variants:
        reasons = [_refusal(variant, geometry) for geometry in geometries]
        if None in reasons:
            kept.append(variant)
        else:
            notes.append(f"{variant.name} was not run: {reasons[0]}")
    return kept, notes


def _refusal(variant: Variant, geometry: Geometry) -> str | None:
    recipe = variant.recipe(geometry)
    if isinstance(recipe, OutOfReach):
        return recipe.reason
    if recipe is None:
        return None
    try:
        accelerate(variant.host.model, recipe).remove()
    except UnsupportedError as error:
        return str(error)
    return None


def _references(host: Host, regime: Regime, keeps: Sequence[float]) -> list[Variant]:
    """Floor and ceiling of every budget."""
    tag = "" if regime == "training-free" else " (trained)"
    made = []
    for keep in keeps:
        made.append(
            Variant(
                name=f"RandomDrop{tag} {keep:g}",
                family=f"RandomDrop{tag}",
                kind="random",
                regime=regime,
                host=host,
                keep=keep,
                plan=lambda geometry, k=keep: at_budget("RandomDrop", k, geometry),
            )
        )
        oracle = Oracle(keep_ratio=keep)
        made.append(
            Variant(
                name=f"oracle{tag} {keep:g}",
                family=f"oracle{tag}",
                kind="oracle",
                regime=regime,
                host=host,
                keep=keep,
                plan=lambda geometry, o=oracle: o,
            )
        )
    return made


def _input_baselines(host: Host, keeps: Sequence[float]) -> list[Variant]:
    tubelet = host.tubelet
    made = [_budgeted("UniformPool", keep, host, "baseline") for keep in keeps]
    for keep in keeps:
        at = {"kind": "baseline", "host": host, "keep": keep}
        made += [
            Variant(
                name=f"fewer frames {keep:g}",
                family="fewer frames",
                change=lambda geometry, k=keep: fewer_frames(k, tubelet),
                **at,
            ),
            Variant(
                name=f"fewer frames, own times {keep:g}",
                family="fewer frames, own times",
                plan=lambda geometry, k=keep: KeepFrames(keep_ratio=k),
                **at,
            ),
            Variant(
                name=f"lower resolution {keep:g}",
                family="lower resolution",
                change=lambda geometry, k=keep: lower_resolution(k, tubelet, geometry.grid),
                **at,
            ),
        ]
    return made


def _budgeted(
    name: str, keep: float, host: Host, kind: Kind = "method", regime: Regime = "training-free"
) -> Variant:
    return Variant(
        name=f"{name} {keep:g}",
        family=name,
        kind=kind,
        regime=regime,
        host=host,
        keep=keep,
        plan=lambda geometry: at_budget(name, keep, geometry),
    )


def _thresholds(host: Host, count: int) -> list[Variant]:
    """RLT's budget follows from the clip, so its threshold is swept instead."""
    return [
        Variant(
            name=f"RLT at {threshold:g}",
            family="RLT",
            kind="method",
            host=host,
            plan=lambda geometry, t=threshold: catalogue()["RLT"](threshold=t / geometry.std),
        )
        for threshold in thresholds(count)
    ]


def _trained(host: Host, keeps: Sequence[float], wanted: Sequence[str]) -> list[Variant]:
    made = [
        Variant(
            name="dense (trained)",
            family="dense (trained)",
            kind="dense",
            regime="trained",
            host=host,
        ),
        *_references(host, "trained", keeps),
    ]
    for name in TRAINED:
        if name in wanted:
            made += [_budgeted(name, keep, host, regime="trained") for keep in keeps]
    return made


def _controls(host: Host) -> list[Variant]:
    def control(name: str, **how: object) -> Variant:
        return Variant(name=name, family=name, kind="control", host=host, **how)  # type: ignore

    return [
        control("shuffled frames", change=lambda geometry: shuffled_frames),
        control("single frame", change=lambda geometry: single_frame),
        control("shuffled labels", shuffled_labels=True),
    ]
