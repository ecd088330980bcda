"""A run as one self-contained page: no script, no network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tubelet.bench.fidelity.page import render_template
from tubelet.bench.llm.result import LLMRun, Row
from tubelet.bench.llm.table import PARTS, cells, failures, headers, heading

WIDTH, EACH, LEFT, RIGHT, TOP = 660, 44, 34, 90, 8
"""Of the bars, in pixels."""

LABELS = {
    "vision": "vision tower",
    "plan": "deciding",
    "prompt": "all else outside",
    "llm": "language model",
}


def render(runs: Sequence[LLMRun]) -> str:
    """HTML text."""
    parts = [
        {
            "run": run,
            "heading": heading(run),
            "columns": headers(run),
            "table": [cells(row, run) for row in run.rows],
            "bars": first_token_bars(run),
            "failures": failures(run),
        }
        for run in runs
    ]
    return render_template(
        "llm.html.jinja", folder=Path(__file__).parent, parts=parts, labels=LABELS
    )


def first_token_bars(run: LLMRun) -> str:
    """Time to the first token of each measured variant in its parts, and where the bound lies."""
    rows = [(number, row) for number, row in enumerate(run.rows, 1) if row.first is not None]
    height = TOP + EACH * len(rows) + 26
    longest = max(row.split["total"] for _, row in rows)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [_bar(number, row, TOP + EACH * i, scale) for i, (number, row) in enumerate(rows)]
    parts.append(
        f'<text class="axis" x="{LEFT}" y="{height - 6}">dashed: the least time that the counted '
        "operations allow at the speed of dense</text>"
    )
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="time to the first token">'
    return head + "".join(parts) + "</svg>"


def _bar(number: int, row: Row, y: int, scale: float) -> str:
    told = ", ".join(f"{LABELS[name]} {row.split[name] * 1e3:.4g} ms" for name in PARTS)
    drawn = [
        f"<g><title>{escape(row.name)}: {told}</title>"
        f'<text class="tick" x="{LEFT - 10}" y="{y + 22}" text-anchor="end">{number}</text>'
    ]
    x = float(LEFT)
    for name in PARTS:
        wide = max(row.split[name], 0.0) * scale
        drawn.append(
            f'<rect class="{name}" x="{x:.1f}" y="{y + 4}" width="{wide:.1f}" height="26"/>'
        )
        x += wide
    if row.bound is not None and row.speedup is not None and row.dense_split:
        at = LEFT + row.dense_split["total"] / row.bound * scale
        if row.bound > 1:
            drawn.append(f'<path class="expected" d="M{at:.1f} {y}V{y + 34}"/>')
            x = max(x, at)
    drawn.append(f'<text x="{x + 8:.1f}" y="{y + 22}">{row.split["total"] * 1e3:.4g} ms</text></g>')
    return "".join(drawn)
