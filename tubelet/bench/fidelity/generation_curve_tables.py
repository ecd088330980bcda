"""Curves, ranking and compensation in words: the same tables for Markdown and for the page."""

from dataclasses import dataclass
from typing import Any

from tubelet.bench.fidelity.generation_plot import Level, draw_curves, make_plane, styles
from tubelet.bench.fidelity.generation_ranking import (
    CONTROL,
    RANKED,
    Curve,
    Point,
    compensations,
    curves,
    mean_of,
    out_of_range,
    ranking,
    whole_run,
)
from tubelet.bench.fidelity.generation_result import Generation, Outcome
from tubelet.bench.quality import PSNR_CAP, Interval
from tubelet.recipes.compensation import DeltaRows, Rettention

WHOLE, SPARSE = "whole run", "sparse calls"
"""The two densities, as columns and axes call them."""


@dataclass(frozen=True)
class Table:
    """Texts of a table.

    Args:
        title: Above it.
        columns: Headers.
        rows: Texts.
        left: Numbers of the columns with words.
        key: Number of the column that names the policy.
        notes: Below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: tuple[int, ...]
    key: int = 0
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Rows and notes, without the title."""
        rule = "".join("|---" if n in self.left else "|---:" for n in range(len(self.columns)))
        lines = ["| " + " | ".join(self.columns) + " |", rule + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n\n".join(["\n".join(lines), *self.notes])


def curves_markdown(found: Generation) -> str:
    """Method, ranking, compensation and every point."""
    parts = [method(found)]
    for table in rankings(found):
        parts += [f"**{table.title}**", table.markdown()]
    compensation = compensation_table(found)
    if compensation.rows:
        parts += [f"**{compensation.title}**", compensation.markdown()]
    points = points_table(found)
    parts.append(f"<details><summary>{points.title}</summary>\n\n{points.markdown()}\n\n</details>")
    parts += [f"- {note}" for note in found.notes]
    return "\n\n".join(parts)


def curves_page(found: Generation) -> dict[str, Any]:
    """What the template shows of the curves."""
    those, levels = curves(found), _levels(found)
    compensation = compensation_table(found)
    return {
        "method": method(found).replace("`", ""),
        "overview": _overview(those, levels),
        "families": _families(those),
        "rankings": rankings(found),
        "compensation": compensation if compensation.rows else None,
        "points": points_table(found),
    }


def method(found: Generation) -> str:
    """How the curves were drawn, in one paragraph."""
    frames, height, width = found.clip
    kernels = sorted({k for o in found.outcomes if o.kind == "curve" for k in o.kernels})
    steps = found.outcomes[0].calls
    dense = round((found.dense_steps or 0.0) * steps)
    return (
        f"`{found.model}`, {found.pairs} pairs of clips of {frames} frames of {height}x{width}, "
        f"{steps} steps, guidance {found.guidance:g}, {found.precision}, "
        f"{found.environment['hardware']}; sparse calls by {', '.join(kernels) or 'no kernel'}. "
        "Every policy has the same warm-up, not that of its authors: "
        f"{dense} of the {steps} steps, from the first, are dense, and no layer stays so. "
        "PSNR is to the dense run of the same noise, mean over pairs; differences are paired, "
        "intervals are at 95 % by bootstrap over pairs. Densities are "
        f"measured shares of the block pairs computed: of the {SPARSE} alone, and of the {WHOLE} "
        "with its dense calls."
    )


def rankings(found: Generation) -> list[Table]:
    """A table for every density of `RANKED` that two policies reach."""
    tables = []
    for density in RANKED:
        places = ranking(found, density)
        if len(places) < 2:
            continue
        computed = whole_run(found, density)
        whole = "" if computed is None else f" ({computed:.0%} of the {WHOLE})"
        rows = [
            (
                str(number),
                place.policy,
                place.family,
                _decibels(place.psnr),
                _difference(place.to_control),
                _difference(place.to_best),
            )
            for number, place in enumerate(places, 1)
        ]
        missing = [_reach(curve) for curve in out_of_range(found, density)]
        tables.append(
            Table(
                title=f"At {density:.0%} of the {SPARSE}{whole}",
                columns=("", "policy", "decides by", "PSNR", f"to {CONTROL}", "to the best"),
                rows=rows,
                left=(1, 2),
                key=1,
                notes=(f"Not measured here: {'; '.join(missing)}.",) if missing else (),
            )
        )
    return tables


def compensation_table(found: Generation) -> Table:
    """Terms beside the same policy alone."""
    rows = [
        (
            row.setting,
            row.term,
            f"{row.density:.1%}",
            f"{row.computed:.1%}",
            _decibels(row.psnr),
            _difference(row.gain),
            _difference(row.gain_at_cost),
        )
        for row in compensations(found)
    ]
    return Table(
        title="Compensation",
        columns=(
            "policy",
            "term",
            SPARSE,
            WHOLE,
            "PSNR",
            "to none, equal density",
            "to none, equal work",
        ),
        rows=rows,
        left=(0, 1),
        notes=(
            "Equal density: the policy alone at the same setting. Equal work: the policy alone "
            "at the density at which its whole run computes as many pairs as the term makes it "
            f"compute, read from its curve. One sparse call in {Rettention().refresh} is done "
            f"densely too by Rettention, one query in {DeltaRows().stride} by DeltaRows; "
            "ZerothOrder adds one mean key per block left out.",
        ),
    )


def points_table(found: Generation) -> Table:
    """Every setting of every policy."""
    by_name = {outcome.name: outcome for outcome in found.outcomes}
    rows = []
    for curve in curves(found):
        for point in reversed(curve.points):
            outcome = by_name[point.name]
            rows.append(
                (
                    point.name,
                    curve.family,
                    f"{point.computed:.1%}",
                    f"{point.density:.1%}",
                    _decibels(mean_of(point.psnr)),
                    *(f"{_mean(outcome, name):.3f}" for name in ("ssim", "latent_error")),
                )
            )
    return Table(
        title="Every setting",
        columns=("policy", "decides by", WHOLE, SPARSE, "PSNR", "SSIM", "latent error"),
        rows=rows,
        left=(0, 1),
    )  # fmt: skip


def _overview(those: list[Curve], levels: list[Level]) -> list[tuple[str, str]]:
    """PSNR over both densities."""
    return [
        (f"Over the density of the {what}", _chart(those, those, what, levels))
        for what in (WHOLE, SPARSE)
        if those
    ]


def _families(those: list[Curve]) -> list[tuple[str, str]]:
    """A chart for each family beside the control, all on the same axes."""
    control = [curve for curve in those if curve.policy == CONTROL]
    charts = []
    for family in dict.fromkeys(curve.family for curve in those):
        members = [c for c in those if c.family == family and c not in control]
        if members:
            charts.append((f"By {family}", _chart(those, [*control, *members], SPARSE, [])))
    return charts


def _chart(those: list[Curve], shown: list[Curve], what: str, levels: list[Level]) -> str:
    """Some of the curves on the axes of all."""
    share = _computed if what == WHOLE else _density
    return draw_curves(
        f"PSNR over the density of the {what}",
        f"block pairs computed in the {what} (sparser →)",
        shown,
        styles(those),
        share,
        make_plane(those, share, levels),
        levels,
    )


def _levels(found: Generation) -> list[Level]:
    """The noise floor, and the dense sampler with fewer steps."""
    floor = [o for o in found.outcomes if o.kind == "floor" and not o.exact]
    steps = found.outcomes[0].calls
    fewer = [o for o in found.outcomes if o.kind == "control" and steps / 4 < o.calls < steps]
    named = [(f"dense, {outcome.name}", outcome) for outcome in [*floor, *fewer]]
    means = [(name, _mean(outcome, "psnr")) for name, outcome in named]
    return [(name, psnr) for name, psnr in means if psnr < PSNR_CAP]


def _mean(outcome: Outcome, figure: str) -> float:
    return sum(outcome.figures[figure]) / len(outcome.figures[figure])


def _density(point: Point) -> float:
    return point.density


def _computed(point: Point) -> float:
    return point.computed


def _reach(curve: Curve) -> str:
    low, high = curve.points[0].density, curve.points[-1].density
    return f"{curve.policy} ({low:.0%} to {high:.0%})"


def _decibels(found: Interval) -> str:
    return f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"


def _difference(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
