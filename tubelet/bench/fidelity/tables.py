"""The result as Markdown: rankings, controls, advice in words."""

from collections.abc import Sequence

from tubelet.bench.fidelity.advice import advice
from tubelet.bench.fidelity.result import Fidelity
from tubelet.bench.fidelity.stats import Estimate
from tubelet.bench.fidelity.summary import (
    RANKED,
    Point,
    Standing,
    average_points,
    average_standings,
    controls,
    core_tasks,
)


def docs_table(runs: Fidelity | Sequence[Fidelity]) -> str:
    """Rankings per background, controls and advice, as Markdown.

    Args:
        runs: One run, or several over training seeds; figures are then means over seeds and
            intervals are over seeds.
    """
    runs = [runs] if isinstance(runs, Fidelity) else list(runs)
    parts = [heading(runs)]
    dense = [point for point in average_points(runs) if point.kind in ("dense", "small")]
    for background in runs[0].backgrounds:
        parts.append(f"#### On {background}\n")
        tasks = core_tasks(runs[0], background)
        parts.append(f"Mean over {', '.join(tasks)}.\n")
        parts.append(_models([point for point in dense if point.background == background]))
        for share in RANKED:
            rows = [r for r in average_standings(runs, share) if r.background == background]
            if rows:
                parts.append(f"At {share:.0%} of the tokens:\n")
                parts.append(ranking(rows))
    parts += ["#### Controls\n", control_table(runs)]
    parts += ["#### Which recipe when\n", "\n".join(f"- {line}" for line in advice(runs))]
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    if notes:
        parts += ["", "#### Notes\n", "\n".join(f"- {note}" for note in notes)]
    return "\n".join(parts)


def heading(runs: Sequence[Fidelity]) -> str:
    """What was measured, in one paragraph."""
    first = runs[0]
    models = ", ".join(
        f"`{m['name']}` ({m['role']}, {m['parameters'] / 1e6:.1f} M)" for m in first.models
    )
    seeds = f", {len(runs)} training seeds" if len(runs) > 1 else ""
    text = f"{models}; {first.clips} test clips per cell{seeds}, {first.precision}, "
    text += f"{first.environment['hardware']}. Intervals are at 95 %"
    text += ", over seeds" if len(runs) > 1 else ", differences are paired over clips"
    missing = [task for task in first.core_tasks if task not in first.tasks]
    if missing:
        text += f". Without {', '.join(missing)}, so this is not the whole core score"
    return text + ".\n"


def percent(estimate: Estimate | None, signed: bool = False) -> str:
    """Value and half-width in points."""
    if estimate is None:
        return "-"
    half = (estimate.high - estimate.low) / 2 * 100
    sign = "+" if signed else ""
    return f"{estimate.value * 100:{sign}.1f} ±{half:.1f}"


def _models(dense: Sequence[Point]) -> str:
    lines = ["| model | core score | GMAC per clip |", "|---|---:|---:|"]
    lines += [f"| {p.variant} | {percent(p.score)} | {p.macs / 1e9:.2f} |" for p in dense]
    return "\n".join(lines) + "\n"


def ranking(rows: Sequence[Standing]) -> str:
    """Families of one background and share, best first."""
    lines = [
        "| | recipe | regime | core score | to dense | to random drop | gap closed |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    places: dict[str, int] = {}
    for row in rows:
        ranked = row.kind not in ("oracle",)
        places[row.regime] = places.get(row.regime, 0) + ranked
        place = str(places[row.regime]) if ranked else "ceiling"
        beside = "-" if row.kind == "random" else percent(row.over_random, True)
        lines.append(
            f"| {place} | {row.family} | {row.regime} | {percent(row.score)} | "
            f"{percent(row.difference, True)} | {beside} | {_gap(row)} |"
        )
    return "\n".join(lines) + "\n"


def _gap(row: Standing) -> str:
    if row.kind in ("oracle", "random"):
        return "1" if row.kind == "oracle" else "0"
    if row.gap is None:
        return "no gap"
    return f"{row.gap.value:.2f} ±{(row.gap.high - row.gap.low) / 2:.2f}"


def control_table(runs: Sequence[Fidelity]) -> str:
    """Every control in every cell; with several seeds all of them must stay below."""
    lines = [
        "| task | background | control | score | floor | |",
        "|---|---|---|---:|---:|---|",
    ]
    for run in runs:
        for row in controls(run):
            floor = "-" if row["floor"] is None else f"{row['floor'] * 100:.1f}"
            verdict = {None: "", True: "fine", False: "above 2 s.e."}[row["fine"]]
            verdict = "**leak**" if row["leak"] else verdict
            lines.append(
                f"| {row['task']} | {row['background']} | {row['control']} | "
                f"{percent(row['score'])} | {floor} | {verdict} |"
            )
    return "\n".join(lines) + "\n"
