"""Loss curves: a short summary without dependencies, and plots with matplotlib."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tubelet.core.errors import TubeletError, UnsupportedError
from tubelet.train.log import read_log

POINTS = 60


def curve_summary(
    records: Sequence[Mapping[str, Any]], points: int = POINTS
) -> dict[str, list[float | None]]:
    """A curve short enough to lie in a JSON file.

    Args:
        records: Lines of a log; those without a loss (notes, warnings, evaluations) are skipped.
        points: Most points to keep, >= 1. Neighbouring lines are averaged.

    Returns:
        Equally long lists: "step" and "seconds" at the end of each stretch, then "loss" and each
        metric as means over it, to five digits; None where a metric was not recorded.
    """
    lines = [record for record in records if "loss" in record]
    count = min(points, len(lines))
    stretches = [
        lines[i * len(lines) // count : (i + 1) * len(lines) // count] for i in range(count)
    ]
    names = sorted({name for line in lines for name in line.get("metrics", {})} - {"loss"})
    return {
        "step": [stretch[-1]["step"] for stretch in stretches],
        "seconds": [round(stretch[-1].get("seconds") or 0.0, 1) for stretch in stretches],
        "loss": [_mean([line["loss"] for line in stretch]) for stretch in stretches],
        **{
            name: [_mean([line.get("metrics", {}).get(name) for line in s]) for s in stretches]
            for name in names
        },
    }


def plot_curves(
    logs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], points: int = 400
) -> Path:
    """Draw loss and metrics of one or more runs over their steps.

    Args:
        logs: Files written by a run; each curve carries the name of its folder.
        out: A .png or .svg file.
        points: Most points of a curve; more are averaged.

    Returns:
        Path of the picture.

    Raises:
        UnsupportedError: matplotlib is not installed.
        TubeletError: No log was given, one cannot be read or has no loss, or `out` is neither
            .png nor .svg or cannot be written.
    """
    target = Path(out)
    if target.suffix not in (".png", ".svg"):
        raise TubeletError(f"cannot draw {target.name}; give a file that ends in .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install 'tubelet[plot]'") from None
    curves = {_label(path, logs): curve_summary(read_log(path), points) for path in logs}
    empty = [name for name, curve in curves.items() if not curve["step"]]
    if not curves or empty:
        raise TubeletError(f"nothing to draw: {', '.join(empty) or 'no log'} has no losses yet")
    panels = list(dict.fromkeys(n for c in curves.values() for n in c if n not in _AXES))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    style = {"svg.fonttype": "none", "svg.hashsalt": "tubelet", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
        for index, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(rows, columns, index), panel, curves)
        if len(curves) > 1:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        picture = io.BytesIO()
        plain = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(picture, format=target.suffix[1:], dpi=150, metadata=plain)
    try:
        target.write_bytes(picture.getvalue())
    except OSError as error:
        raise TubeletError(f"cannot write {target}: {error.strerror or error}") from None
    return target


_AXES = ("step", "seconds")


def _draw(axes: Any, panel: str, curves: Mapping[str, Mapping[str, list[Any]]]) -> None:
    for name, curve in curves.items():
        values = curve.get(panel)
        # An empty line keeps the colour and the legend entry of each run the same in all panels.
        pairs = zip(curve["step"], values, strict=True) if values else ()
        seen = [(step, value) for step, value in pairs if value is not None]
        axes.plot([s for s, _ in seen], [v for _, v in seen], label=name, lw=1.5)
    axes.set_title(panel)
    axes.set_xlabel("step")
    axes.grid(color="#888888", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _label(path: str | os.PathLike[str], logs: Sequence[str | os.PathLike[str]]) -> str:
    folder = Path(path).absolute().parent
    alike = sum(Path(other).absolute().parent.name == folder.name for other in logs)
    return folder.name if alike == 1 else str(path)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.5g}") if known else None
