"""The result as one self-contained page: no script, no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tubelet.bench.answers.advice import advice, families_of
from tubelet.bench.answers.result import Answers
from tubelet.bench.answers.summary import FRAMES, RANDOM, Point, of_kind, points, shown_keep
from tubelet.bench.answers.tables import (
    LEGEND,
    budget_table,
    cells_of,
    dense_table,
    heading,
    kind_table,
    remarks,
    settings_table,
    whole_table,
)
from tubelet.bench.fidelity.page import render_template
from tubelet.bench.fidelity.svg import MARKS, Chart, Series, draw

MOST_LINES = len(MARKS) - 2
"""Families of a chart, beside the two controls."""


def render(run: Answers) -> str:
    """HTML text."""
    keep = shown_keep(run)
    return render_template(
        "answers.html.jinja",
        folder=Path(__file__).parent,
        run=run,
        plain=plain_cell,
        heading=heading(run).replace("`", "").replace("**", ""),
        advice=advice(run),
        dense=cells_of(dense_table(run)),
        legend=LEGEND,
        panels=[
            {
                "background": background,
                "charts": _charts(run, background),
                "table": cells_of(budget_table(run, background)),
            }
            for background in run.backgrounds
        ],
        whole=cells_of(whole_table(run)) if of_kind(run, "prefill", "cache") else None,
        keep=keep,
        kinds=None if keep is None else cells_of(kind_table(run, keep)),
        settings=cells_of(settings_table(run)),
        notes=remarks(run),
    )


def _charts(run: Answers, background: str) -> list[tuple[str, str]]:
    """Accuracy over tokens, a few families at a time."""
    found = points(run, background)
    drawn = []
    for title, names in families_of(run).items():
        there = [name for name in names if any(p.line.family == name for p in found)]
        count = -(-len(there) // MOST_LINES)
        for number in range(count):
            some = there[number::count]
            caption = title if count == 1 else f"{title}, {number + 1} of {count}"
            drawn.append((caption, draw(_chart(found, some, f"{background}, {caption}"))))
    return drawn


def _chart(found: Sequence[Point], families: Sequence[str], title: str) -> Chart:
    dense = next(point for point in found if point.line.kind == "dense")
    series = []
    for style, family in enumerate((RANDOM, FRAMES, *families)):
        mine = [point for point in found if point.line.family == family]
        mine.sort(key=lambda point: -point.used.layers)
        if mine:
            line = "dashed" if family in (RANDOM, FRAMES) else "solid"
            places = [_place(point) for point in (dense, *mine)]
            series.append(Series(name=family, style=style, points=places, line=line))
    return Chart(
        title=f"accuracy against tokens on {title}",
        x_label="mean video tokens entering a layer, share of dense (fewer →)",
        y_label="mean accuracy over kinds",
        series=series,
        levels=[("dense", dense.score.value)],
        percent=True,
    )


def _place(point: Point) -> tuple[float, float, float, float]:
    return point.used.layers, point.score.value, point.score.low, point.score.high


def plain_cell(text: str) -> dict[str, Any]:
    """A table's text without marks of Markdown, and whether it was bold."""
    return {"text": text.replace("**", "").replace("`", "").strip("*"), "bold": "**" in text}
