"""Curves of quality over density, the ranking they give, and what compensation brings.

Everything is a mean over pairs. Pairs share their noise, so policies are compared pair by pair,
and intervals are at 95 % by bootstrap over pairs. Nothing is read outside of what was measured.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.bench.fidelity.generation_result import Generation, Outcome
from tubelet.bench.quality import Interval, bootstrap
from tubelet.core.recipe import Recipe
from tubelet.recipes import catalogue, from_dict

RANKED = (0.3, 0.2, 0.1)
"""Densities of the sparse calls at which policies are ranked."""

CONTROL = "RandomBlocks"
"""The policy that decides nothing."""

CHANCE = "chance: the control"

FAMILIES = {
    "windows": "geometry alone",
    "head_patterns": "a search per head",
    "pooled": "means of blocks",
    "estimated": "finer estimates",
}
"""What policies decide by, by the module they live in."""


@dataclass(frozen=True)
class Point:
    """One setting of a policy.

    Args:
        name: Of the way that drew it.
        density: Mean share of the block pairs, of the sparse calls alone.
        computed: The same of the whole run.
        psnr: dB of every pair.
    """

    name: str
    density: float
    computed: float
    psnr: Tensor


@dataclass(frozen=True)
class Curve:
    """A policy.

    Args:
        policy: Its name.
        family: What it decides by.
        points: From sparse to dense; at least one.
    """

    policy: str
    family: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A policy's place at one density.

    Args:
        policy, family: As in its curve.
        psnr: Mean over pairs.
        to_control, to_best: Paired differences; None for the control or the best itself.
    """

    policy: str
    family: str
    psnr: Interval
    to_control: Interval | None
    to_best: Interval | None


@dataclass(frozen=True, kw_only=True)
class Compensated:
    """A policy with a term for what it leaves out.

    Args:
        setting: The policy.
        term: The compensation.
        density, computed: Of the sparse calls, and of the whole run, dense calls of the term
            included.
        psnr: Mean over pairs.
        gain: Paired difference to the policy alone at the same setting.
        gain_at_cost: Paired difference to the policy alone at the density at which its whole run
            computes as much; None beyond what was measured.
    """

    setting: str
    term: str
    density: float
    computed: float
    psnr: Interval
    gain: Interval
    gain_at_cost: Interval | None


def curves(found: Generation) -> list[Curve]:
    """The policies of a result, by what they decide by; the control first."""
    points: dict[str, list[Point]] = {}
    for outcome in found.outcomes:
        if outcome.kind == "curve" and outcome.density is not None:
            points.setdefault(outcome.recipes[0]["recipe"], []).append(_point(outcome))
    whole = [
        Curve(policy, _family(policy), tuple(sorted(those, key=lambda point: point.density)))
        for policy, those in points.items()
    ]
    order = list(FAMILIES.values())
    return sorted(
        whole,
        key=lambda c: (c.policy != CONTROL, order.index(c.family) if c.family in order else 99,
                       c.policy.lower()),
    )  # fmt: skip


def at_density(
    curve: Curve, where: float, share: Callable[[Point], float] = lambda point: point.density
) -> Tensor | None:
    """PSNR of every pair at a density, linear in its logarithm between the nearest settings.

    Args:
        curve: Its points in any order of `share`.
        where: The density, in (0, 1].
        share: What is meant by density.

    Returns:
        None outside of the measured range.
    """
    points = sorted(curve.points, key=share)
    for point in points:
        if math.isclose(share(point), where, rel_tol=1e-6):
            return point.psnr
    for left, right in itertools.pairwise(points):
        low, high = share(left), share(right)
        if low < where < high:
            along = math.log(where / low) / math.log(high / low)
            return left.psnr * (1 - along) + right.psnr * along
    return None


def ranking(found: Generation, density: float) -> list[Place]:
    """Policies whose settings reach below and above a density of the sparse calls, best first."""
    read = [(curve, at_density(curve, density)) for curve in curves(found)]
    there = [(curve, psnr) for curve, psnr in read if psnr is not None]
    there.sort(key=lambda item: -float(item[1].mean()))
    control = next((psnr for curve, psnr in there if curve.policy == CONTROL), None)
    return [
        Place(
            policy=curve.policy,
            family=curve.family,
            psnr=mean_of(psnr),
            to_control=None if control is None or psnr is control else mean_of(psnr - control),
            to_best=mean_of(psnr - there[0][1]) if number else None,
        )
        for number, (curve, psnr) in enumerate(there)
    ]


def out_of_range(found: Generation, density: float) -> list[Curve]:
    """Curves that do not reach a density."""
    return [curve for curve in curves(found) if at_density(curve, density) is None]


def whole_run(found: Generation, density: float) -> float | None:
    """What a run computes whose sparse calls have a density, read from the control."""
    for curve in curves(found):
        pairs = [(p.density, p.computed) for p in curve.points if p.density < 1]
        if curve.policy == CONTROL and pairs:
            sparse, computed = pairs[0]
            # All sparse calls of the control have one density, the others are dense.
            dense = (computed - sparse) / (1 - sparse)
            return dense + (1 - dense) * density
    return None


def compensations(found: Generation) -> list[Compensated]:
    """Terms beside the same policy without any, by policy, from dense to sparse."""
    alone = {curve.policy: curve for curve in curves(found)}
    rows = []
    for outcome in found.outcomes:
        if outcome.kind != "compensated" or outcome.density is None:
            continue
        policy, term = (from_dict(recipe) for recipe in outcome.recipes)
        curve = alone.get(policy.name)
        bare = next((p for p in curve.points if p.name == setting(policy)), None) if curve else None
        if curve is None or bare is None:
            continue
        point = _point(outcome)
        same_cost = at_density(curve, point.computed, lambda p: p.computed)
        rows.append(
            Compensated(
                setting=bare.name,
                term=str(term),
                density=point.density,
                computed=point.computed,
                psnr=mean_of(point.psnr),
                gain=mean_of(point.psnr - bare.psnr),
                gain_at_cost=None if same_cost is None else mean_of(point.psnr - same_cost),
            )
        )
    return sorted(rows, key=lambda row: (row.setting.split("(")[0], -row.density, row.setting))


def setting(policy: Recipe) -> str:
    """A policy as text, its warm-up left out: all curves of a run have the same."""
    fields = type(policy).__dataclass_fields__
    warm_up = {name: fields[name].default for name in ("dense_steps", "dense_layers")}
    return str(from_dict({**policy.to_dict(), **warm_up}))


def mean_of(values: Tensor) -> Interval:
    """Mean over pairs with its bootstrap interval."""
    return bootstrap(values, lambda x: x.mean(-1), seed=0, resamples=1000)


def _point(outcome: Outcome) -> Point:
    assert outcome.density is not None
    assert outcome.computed is not None
    psnr = torch.tensor(outcome.figures["psnr"], dtype=torch.float64)
    return Point(outcome.name, outcome.density, outcome.computed, psnr)


def _family(policy: str) -> str:
    if policy == CONTROL:
        return CHANCE
    module = catalogue()[policy].__module__.rsplit(".", 1)[-1]
    return FAMILIES.get(module, module.replace("_", " "))
