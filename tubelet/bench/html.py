"""The comparison as one self-contained page: no script, no network."""

from collections.abc import Sequence
from pathlib import Path

from tubelet.bench.pictures import Strip
from tubelet.bench.plots import latency_against_tokens, tokens_per_layer
from tubelet.bench.result import Comparison
from tubelet.bench.table import COLUMNS, cells


def render_page(comparison: Comparison, strips: Sequence[Strip] | None = None) -> str:
    """HTML text.

    Args:
        comparison: The figures.
        strips: Pictures from `pictures.strips`, or None.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("report.html.jinja")
    return page.render(
        comparison=comparison,
        columns=COLUMNS,
        table=[(row, cells(row, comparison.dense)) for row in comparison.rows],
        plots=[latency_against_tokens(comparison), tokens_per_layer(comparison)],
        strips=strips or [],
    )
