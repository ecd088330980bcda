"""From right and wrong answers to figures: paired differences to dense, and to the controls.

Differences are over the same questions. A control is read off its curve at the same mean number
of tokens per layer, question by question, so recipes inside the language model are compared with
what their tokens could have bought in front of it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

from torch import Tensor

from tubelet.bench.answers.ask import Used
from tubelet.bench.answers.result import Answers, Entry, Line
from tubelet.bench.fidelity.stats import Estimate, at_share, difference, score

RANDOM, FRAMES = "RandomPrompt", "UniformFrames"
METHODS = ("prompt", "layers", "two stages")
"""Kinds that are ranked."""

SHOWN = 0.25
"""Budget at which kinds of questions are told apart."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A variant on one background.

    Args:
        name: Of the variant.
        line: What it is.
        background: Where.
        used: What it used.
        score: Mean accuracy over the kinds.
        difference: To dense, paired.
        over_random, over_frames: To random drop and to fewer frames at the same mean tokens per
            layer; None outside of what these were measured at.
        seconds: Per question.
    """

    name: str
    line: Line
    background: str
    used: Used
    score: Estimate
    difference: Estimate
    over_random: Estimate | None
    over_frames: Estimate | None
    seconds: float


def points(run: Answers, background: str) -> list[Point]:
    """Every variant that was measured on a background, dense first."""
    cell = run.cell(background)
    dense = list(cell.entries["dense"].right)
    curves = {family: _curve(run, background, family) for family in (RANDOM, FRAMES)}
    found = []
    for name, entry in cell.entries.items():
        line, ours = run.variants[name], list(entry.right)
        found.append(
            Point(
                name=name,
                line=line,
                background=background,
                used=entry.used,
                score=score(ours),
                difference=difference(ours, dense),
                over_random=_over(entry, line, curves[RANDOM], RANDOM),
                over_frames=_over(entry, line, curves[FRAMES], FRAMES),
                seconds=entry.seconds,
            )
        )
    return found


def _curve(run: Answers, background: str, family: str) -> list[tuple[float, Tensor]]:
    """(mean tokens per layer, answers) of a family and of dense."""
    entries = run.cell(background).entries
    mine = [e for n, e in entries.items() if run.variants[n].family in (family, "dense")]
    return [(entry.used.layers, entry.right) for entry in mine]


def _over(
    entry: Entry, line: Line, curve: Sequence[tuple[float, Tensor]], family: str
) -> Estimate | None:
    if line.kind not in (*METHODS, "control") or line.family == family:
        return None
    there = at_share(curve, entry.used.layers)
    return None if there is None else difference(list(entry.right), list(there))


@dataclass(frozen=True, kw_only=True)
class KindPoint:
    """One kind of question under one variant, over all backgrounds.

    Args:
        right, total: Questions.
        share: Accuracy.
        difference: To dense, paired.
        known: (accuracy - chance) / (that of dense - chance); None where dense is not above chance.
    """

    right: int
    total: int
    share: float
    difference: Estimate
    known: float | None


def by_kind(run: Answers, name: str) -> dict[str, KindPoint] | None:
    """Every kind under a variant; None where it was not measured on some background."""
    cells = run.cells
    if any(name not in cell.entries for cell in cells):
        return None
    found = {}
    for row, kind in enumerate(run.kinds):
        ours = [cell.entries[name].right[row] for cell in cells]
        dense = [cell.entries["dense"].right[row] for cell in cells]
        share, whole = score(ours), score(dense)
        chance = run.chances[kind]
        above = whole.low > chance
        found[kind] = KindPoint(
            right=sum(int(x.sum()) for x in ours),
            total=sum(len(x) for x in ours),
            share=share.value,
            difference=difference(ours, dense),
            known=(share.value - chance) / (whole.value - chance) if above else None,
        )
    return found


def keeps(run: Answers) -> list[float]:
    """Budgets of the run's methods (of its controls, without any), the largest first."""
    lines = [line for line in run.variants.values() if line.keep is not None]
    chosen = [line for line in lines if line.kind in METHODS] or lines
    return sorted({line.keep for line in chosen if line.keep is not None})[::-1]


def shown_keep(run: Answers) -> float | None:
    """The budget nearest to `SHOWN`."""
    return min(keeps(run), key=lambda keep: abs(keep - SHOWN), default=None)


def of_kind(run: Answers, *kinds: str) -> list[str]:
    """Families of some kinds, in order."""
    lines = [line for line in run.variants.values() if line.kind in kinds]
    return list(dict.fromkeys(line.family for line in lines))


def unknown_kinds(run: Answers) -> list[str]:
    """Kinds that dense itself answers no better than a guess, over all backgrounds."""
    dense = by_kind(run, "dense")
    assert dense is not None
    return [kind for kind, point in dense.items() if point.known is None]


def surely(estimate: Estimate | None, tests: int) -> int:
    """1 or -1 where a difference is above or below zero though `tests` of them were looked at.

    Bonferroni's correction of the 95 % interval.
    """
    if estimate is None or estimate.error == 0:
        return 0
    middle = (estimate.low + estimate.high) / 2
    bound = NormalDist().inv_cdf(1 - 0.025 / max(tests, 1)) * estimate.error
    return (middle > bound) - (middle < -bound)


def plain(run: Answers) -> list[dict[str, object]]:
    """The figures of all points, JSON-ready."""
    return [
        {
            "variant": p.name,
            "background": p.background,
            **asdict(p.line),
            "used": asdict(p.used),
            "score": p.score.to_dict(),
            "difference": {**p.difference.to_dict(), "error": p.difference.error},
            "seconds": p.seconds,
        }
        for background in run.backgrounds
        for p in points(run, background)
    ]
