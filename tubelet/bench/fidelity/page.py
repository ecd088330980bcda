"""The result as one self-contained page: no script, no network."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tubelet.bench.fidelity.advice import advice
from tubelet.bench.fidelity.result import Fidelity
from tubelet.bench.fidelity.summary import (
    DENSE,
    RANKED,
    Point,
    average_points,
    average_standings,
    controls,
    core_tasks,
)
from tubelet.bench.fidelity.svg import Chart, Series, draw
from tubelet.bench.fidelity.tables import heading, percent
from tubelet.core.files import write_whole


def write_page(path: str | os.PathLike[str], runs: Sequence[Fidelity]) -> Path:
    """Write the page; the file appears whole or not at all."""
    return write_whole(path, render(runs))


def render(runs: Sequence[Fidelity]) -> str:
    """HTML text."""
    found = average_points(runs)
    return render_template(
        "fidelity.html.jinja",
        runs=runs,
        first=runs[0],
        heading=heading(runs).replace("`", ""),
        advice=advice(runs),
        panels=[_panel(runs, found, background) for background in runs[0].backgrounds],
        standings=[(share, average_standings(runs, share)) for share in RANKED],
        controls=[(run, row) for run in runs for row in controls(run)],
        percent=percent,
        notes=list(dict.fromkeys(note for run in runs for note in run.notes)),
    )


def render_template(name: str, folder: Path | None = None, **values: Any) -> str:
    """A template of this package, or of another one's folder; the style of all pages lies here."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    own = Path(__file__).parent
    folders = [own] if folder is None else [folder, own]
    templates = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template(name).render(**values)


def _panel(runs: Sequence[Fidelity], found: Sequence[Point], background: str) -> dict[str, Any]:
    here = [point for point in found if point.background == background]
    charts = []
    for regime in ("training-free", "trained"):
        points = [p for p in here if p.regime == regime]
        if not points:
            continue
        charts.append((f"{regime}, tokens", draw(_over_tokens(points, here, regime, background))))
        batches = sorted({batch for point in points for batch in point.seconds}, reverse=True)
        charts += [
            (f"{regime}, batch {batch}", draw(_over_latency(points, regime, background, batch)))
            for batch in batches
        ]
    return {
        "background": background,
        "tasks": core_tasks(runs[0], background),
        "charts": [chart for chart in charts if chart[1]],
    }


def _over_tokens(
    points: Sequence[Point], here: Sequence[Point], regime: str, background: str
) -> Chart:
    dense = next(p for p in points if p.kind == "dense")
    series = _lines(points, regime, lambda p: p.share)
    # A smaller model keeps all tokens; it stands where its cost would put it.
    first = next(p for p in here if p.family == "dense")
    for small in (p for p in points if p.kind == "small"):
        at = (small.macs / first.macs, small.score.value, small.score.low, small.score.high)
        name = f"{small.variant.removeprefix('dense, ')} (MACs)"
        series.append(Series(name=name, style=len(series), points=[at], line="none"))
    return Chart(
        title=f"core score against tokens on {background}, {regime}",
        x_label="mean tokens entering a layer, share of dense (fewer →)",
        y_label="core score",
        series=series,
        levels=[(DENSE[regime], dense.score.value)],
        percent=True,
    )


def _over_latency(points: Sequence[Point], regime: str, background: str, batch: int) -> Chart:
    timed = [p for p in points if batch in p.seconds]
    dense = next(p for p in points if p.kind == "dense")
    series = _lines(timed, regime, lambda p: p.seconds[batch] * 1e3)
    small = [p for p in timed if p.kind == "small"]
    for point in small:
        at = (point.seconds[batch] * 1e3, point.score.value, point.score.low, point.score.high)
        name = point.variant.removeprefix("dense, ")
        series.append(Series(name=name, style=len(series), points=[at], line="none"))
    return Chart(
        title=f"core score against latency on {background}, {regime}, batch {batch}",
        x_label=f"ms per forward pass of {batch} (faster →)",
        y_label="core score",
        series=series,
        levels=[(DENSE[regime], dense.score.value)],
    )


def _lines(points: Sequence[Point], regime: str, x: Any) -> list[Series]:
    """A line per family, from dense on; the style of a family is the same in every chart."""
    dense = next(p for p in points if p.kind == "dense")
    families: dict[str, list[Point]] = {}
    for point in points:
        if point.kind not in ("dense", "small"):
            families.setdefault(point.family, []).append(point)
    return [
        Series(
            name=family,
            style=style,
            points=[
                (x(p), p.score.value, p.score.low, p.score.high)
                for p in (dense, *sorted(members, key=lambda p: -p.share))
            ],
            line="dashed" if regime == "trained" else "solid",
        )
        for style, (family, members) in enumerate(families.items())
    ]
