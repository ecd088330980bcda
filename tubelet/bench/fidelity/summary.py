"""From per-clip scores to figures: core scores, paired differences, gaps closed, rankings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from torch import Tensor

from tubelet.bench.fidelity.cells import Cell
from tubelet.bench.fidelity.result import Fidelity
from tubelet.bench.fidelity.stats import (
    Estimate,
    at_share,
    difference,
    gap_closed,
    over_seeds,
    score,
)

RANKED = (0.5, 0.25)
"""Shares of the tokens at which families are ranked."""

RANDOM = {"training-free": "RandomDrop", "trained": "RandomDrop (trained)"}
ORACLE = {"training-free": "oracle", "trained": "oracle (trained)"}
DENSE = {"training-free": "dense", "trained": "dense (trained)"}
"""Floor, ceiling and reference of each regime, by family."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A variant on one background, over the core tasks.

    Args:
        variant, family, kind, regime, keep: See `result.Line`.
        background: Where.
        share: Mean tokens entering a layer, relative to the dense model, mean over tasks.
        macs: Multiply-accumulates per clip, mean over tasks.
        score: Core score.
        difference: To the dense model of its regime, paired.
        gap: Of random to oracle at the same share; None where there is no gap to close.
        seconds: Median latency per forward pass, by clips in it.
    """

    variant: str
    family: str
    kind: str
    regime: str
    keep: float | None
    background: str
    share: float
    macs: float
    score: Estimate
    difference: Estimate
    gap: Estimate | None
    seconds: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A family at one share of the tokens, read off its curve by linear interpolation.

    Args:
        family, kind, regime: See `result.Line`.
        background, share: Where.
        score, difference, gap: As in `Point`.
        over_random: Paired difference to random drop at this share.
    """

    family: str
    kind: str
    regime: str
    background: str
    share: float
    score: Estimate
    difference: Estimate
    gap: Estimate | None
    over_random: Estimate | None


def core_tasks(run: Fidelity, background: str) -> list[str]:
    """Core tasks that were run on a background; without any, all that were run there."""
    there = [cell.task for cell in run.cells if cell.background == background]
    return [task for task in there if task in run.core_tasks] or there


def points(run: Fidelity) -> list[Point]:
    """Every variant on every background, controls left out."""
    found = []
    for background in run.backgrounds:
        cells = _core_cells(run, background)
        for name, line in run.variants.items():
            if line.kind != "control" and all(name in cell.entries for cell in cells):
                found.append(_point(run, cells, background, name))
    return found


def _point(run: Fidelity, cells: Sequence[Cell], background: str, name: str) -> Point:
    line = run.variants[name]
    entries = [cell.entries[name] for cell in cells]
    ours = [entry.scores for entry in entries]
    dense = [cell.entries[DENSE[line.regime]].scores for cell in cells]
    references = [
        _curves_at(run, cells, [entry.share for entry in entries], of[line.regime])
        for of in (RANDOM, ORACLE)
    ]
    low, high = references
    gap = None
    if line.kind not in ("dense", "small") and low is not None and high is not None:
        gap = gap_closed(ours, low, high)
    latencies = [x for x in run.latencies if (x.variant, x.background) == (name, background)]
    return Point(
        variant=name,
        **asdict(line),
        background=background,
        share=_mean(entry.share for entry in entries),
        macs=_mean(float(entry.macs) for entry in entries),
        score=score(ours),
        difference=difference(ours, dense),
        gap=gap,
        seconds={x.batch: x.seconds for x in latencies},
    )


def standings(run: Fidelity, share: float) -> list[Standing]:
    """Families at a share, best first within background and regime; only where measured."""
    found = []
    families = {
        line.family: line for line in run.variants.values() if line.kind not in ("control", "dense")
    }
    for background in run.backgrounds:
        cells = _core_cells(run, background)
        rows = []
        for family, line in families.items():
            if line.kind == "small":
                continue
            ours = _curves_at(run, cells, [share] * len(cells), family)
            if ours is not None:
                rows.append(_standing(run, cells, background, share, family, ours))
        rows.sort(key=lambda row: (row.regime != "training-free", -row.score.value))
        found += rows
    return found


def _standing(
    run: Fidelity,
    cells: Sequence[Cell],
    background: str,
    share: float,
    family: str,
    ours: Sequence[Tensor],
) -> Standing:
    line = next(line for line in run.variants.values() if line.family == family)
    everywhere = [share] * len(cells)
    low = _curves_at(run, cells, everywhere, RANDOM[line.regime])
    high = _curves_at(run, cells, everywhere, ORACLE[line.regime])
    dense = [cell.entries[DENSE[line.regime]].scores for cell in cells]
    return Standing(
        family=family,
        kind=line.kind,
        regime=line.regime,
        background=background,
        share=share,
        score=score(ours),
        difference=difference(ours, dense),
        gap=None if low is None or high is None else gap_closed(ours, low, high),
        over_random=None if low is None else difference(ours, low),
    )


def _curves_at(
    run: Fidelity, cells: Sequence[Cell], shares: Sequence[float], family: str
) -> list[Tensor] | None:
    """Per-clip scores of a family in every cell at that cell's share; None where one is missing."""
    found = []
    for cell, share in zip(cells, shares, strict=True):
        names = [name for name, line in run.variants.items() if line.family == family]
        if not names:
            return None
        dense = DENSE[run.variants[names[0]].regime]
        curve = [(e.share, e.scores) for n in (*names, dense) if (e := cell.entries.get(n))]
        scores = at_share(curve, share)
        if scores is None or not any(name in cell.entries for name in names):
            return None
        found.append(scores)
    return found


def controls(run: Fidelity) -> list[dict[str, Any]]:
    """Score of every control in every cell, its floor and whether it stays below.

    "fine" (None without a stated floor) is whether the score is at most two standard errors above
    the floor. Among many controls some are not by chance; "leak" is whether a score is higher than
    the highest of as many honest controls would be in 19 of 20 runs.
    """
    rows = []
    checks = sum(
        name in cell.floors and name in cell.entries for cell in run.cells for name in run.variants
    )
    strict = NormalDist().inv_cdf(1 - 0.05 / max(checks, 1))
    for cell in run.cells:
        for name, line in run.variants.items():
            if line.kind != "control" or name not in cell.entries:
                continue
            found = score([cell.entries[name].scores])
            floor = cell.floors.get(name)
            above = 0.0
            if floor is not None:
                spread = max(floor * (1 - floor), 1e-9) / len(cell.entries[name].scores)
                above = (found.value - floor) / spread**0.5
            rows.append(
                {
                    "task": cell.task,
                    "background": cell.background,
                    "control": name,
                    "score": found,
                    "floor": floor,
                    "fine": None if floor is None else above <= 2,
                    "leak": above > max(strict, 2),
                }
            )
    return rows


def average_points(runs: Sequence[Fidelity]) -> list[Point]:
    """Points of one run, or their means over seeds with intervals over seeds."""
    grouped = _grouped([points(run) for run in runs], lambda p: (p.variant, p.background))
    return [group[0] if len(runs) == 1 else _mean_point(group) for group in grouped]


def average_standings(runs: Sequence[Fidelity], share: float) -> list[Standing]:
    """Standings of one run, or their means over seeds, best first."""
    grouped = _grouped([standings(run, share) for run in runs], lambda s: (s.family, s.background))
    if len(runs) == 1:
        return [group[0] for group in grouped]
    rows = [
        Standing(
            **{n: getattr(g[0], n) for n in ("family", "kind", "regime", "background", "share")},
            score=_over([x.score for x in g]),
            difference=_over([x.difference for x in g]),
            gap=_over_some([x.gap for x in g]),
            over_random=_over_some([x.over_random for x in g]),
        )
        for g in grouped
    ]
    order = {name: i for i, name in enumerate(runs[0].backgrounds)}
    rows.sort(key=lambda r: (order[r.background], r.regime != "training-free", -r.score.value))
    return rows


def summary(runs: Sequence[Fidelity]) -> dict[str, Any]:
    """All derived figures, JSON-ready."""
    return {
        "seeds": [run.seed_name for run in runs],
        "points": [asdict(point) for point in average_points(runs)],
        "standings": [asdict(row) for share in RANKED for row in average_standings(runs, share)],
        "controls": [
            {**row, "score": asdict(row["score"]), "seed": run.seed_name}
            for run in runs
            for row in controls(run)
        ],
        "cells": [
            {
                "seed": run.seed_name,
                "task": cell.task,
                "background": cell.background,
                "variant": name,
                "share": entry.share,
                "score": asdict(score([entry.scores])),
                "difference": asdict(difference([entry.scores], [cell.entries["dense"].scores])),
            }
            for run in runs
            for cell in run.cells
            for name, entry in cell.entries.items()
        ],
    }


def _mean_point(group: Sequence[Point]) -> Point:
    first = group[0]
    same = ("variant", "family", "kind", "regime", "keep", "background")
    batches = set.intersection(*(set(point.seconds) for point in group))
    return Point(
        **{name: getattr(first, name) for name in same},
        share=_mean(p.share for p in group),
        macs=_mean(p.macs for p in group),
        score=_over([p.score for p in group]),
        difference=_over([p.difference for p in group]),
        gap=_over_some([p.gap for p in group]),
        seconds={b: _mean(p.seconds[b] for p in group) for b in sorted(batches)},
    )


def _over(estimates: Sequence[Estimate]) -> Estimate:
    return over_seeds([estimate.value for estimate in estimates])


def _over_some(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Mean over seeds; None when a seed has no figure."""
    there = [estimate for estimate in estimates if estimate is not None]
    return _over(there) if len(there) == len(estimates) else None


def _grouped(lists: Sequence[Sequence[Any]], key: Callable[[Any], Any]) -> list[list[Any]]:
    """Items of one key together, in the order of the first list; only keys that all lists have."""
    groups: dict[Any, list[Any]] = {}
    for items in lists:
        for item in items:
            groups.setdefault(key(item), []).append(item)
    return [group for group in groups.values() if len(group) == len(lists)]


def _core_cells(run: Fidelity, background: str) -> list[Cell]:
    found = (run.cell(task, background) for task in core_tasks(run, background))
    return [cell for cell in found if cell is not None]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
