"""Plots as inline SVG whose text and axes take the colour of the page."""

import io
import re

from tubelet.bench.result import Comparison

INK = "#010203"
"""Stands for the page's text colour, and is replaced by `currentColor`."""

PALETTE = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2",
    "#72b7b2", "#d6a400", "#9d755d", "#ff7f9e", "#7f7f7f",
)  # fmt: skip


def latency_against_tokens(comparison: Comparison) -> str | None:
    """Latency over mean tokens; hollow marks are the ceilings. None without matplotlib."""

    def draw(axes):
        dense = comparison.dense
        for row, colour in _coloured(comparison):
            axes.plot(row.mean_tokens, row.latency * 1e3, "o", color=colour, ms=8, label=row.name)
            if row.ceiling is not None:
                best = dense.latency / row.ceiling * 1e3
                axes.plot([row.mean_tokens] * 2, [row.latency * 1e3, best], "-", color=colour)
                axes.plot(row.mean_tokens, best, "o", color=colour, ms=8, mfc="none")
        axes.set_xlabel("tokens entering a layer, mean over layers")
        axes.set_ylabel("latency in ms")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return _svg(draw, "latency against tokens")


def tokens_per_layer(comparison: Comparison) -> str | None:
    """Tokens entering each layer. None without matplotlib."""

    def draw(axes):
        for row, colour in _coloured(comparison):
            counts = row.tokens_per_layer
            axes.step(range(len(counts)), counts, where="mid", color=colour, label=row.name, lw=2)
        axes.set_xlabel("layer")
        axes.set_ylabel("tokens")
        axes.set_ylim(bottom=0)

    return _svg(draw, "tokens entering each layer")


def _coloured(comparison: Comparison):
    colours = (INK, *PALETTE)
    return [(row, colours[i % len(colours)]) for i, row in enumerate(comparison.rows)]


def _svg(draw, title: str) -> str | None:
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tubelet",
        "font.family": "sans-serif",
        "font.size": 11,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(color="#888888", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    svg = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page scales it; a fixed size in points would overflow a phone.
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
