"""The comparison as columns, shared by terminal, text and page."""

import io
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from rich.console import Console
from rich.table import Table

from tubelet.bench.result import Comparison, Row


@dataclass(frozen=True)
class Column:
    """Header, explanation and the shown text of one figure."""

    header: str
    meaning: str


COLUMNS = (
    Column("recipe", "what ran"),
    Column("latency", "median of interleaved runs, with the spread of the middle half"),
    Column("speed-up", "dense latency / this latency"),
    Column("ceiling", "speed-up when the same token counts are merely sliced off"),
    Column("of ceiling", "measured speed-up as a share of the ceiling"),
    Column("overhead", "scoring and merging, as a share of the dense latency"),
    Column("tokens", "tokens entering a layer, mean over the layers"),
    Column("GMAC", "multiply-accumulates of one forward pass"),
    Column("memory", "peak of live tensors in MB"),
    Column("cosine", "cosine similarity of the output with the dense output"),
    Column("top-1", "share of clips with the dense prediction"),
    Column("accuracy", "share of clips answered rightly, where the answer is known"),
    Column("error", "relative error of the output"),
)


def cells(row: Row, dense: Row) -> list[str]:
    """The texts of one row, in the order of `COLUMNS`."""
    ordered = sorted(row.samples)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2
    tokens = f"{row.mean_tokens:.0f} ({row.mean_tokens / dense.mean_tokens:.0%})"
    return [
        row.name,
        f"{row.latency * 1e3:.0f} ±{spread * 1e3:.0f} ms",
        f"{row.speedup:.2f}x",
        "-" if row.ceiling is None else f"{row.ceiling:.2f}x",
        "-" if row.of_ceiling is None else f"{row.of_ceiling:.0%}",
        "-" if row.overhead is None else f"{row.overhead:.1%}",
        tokens,
        f"{row.macs / 1e9:.1f}",
        f"{row.memory / 1e6:.0f}",
        f"{row.cosine:.4f}",
        "-" if row.top1 is None else f"{row.top1:.0%}",
        "-" if row.accuracy is None else f"{row.accuracy:.0%}",
        f"{row.error:.2%}",
    ]


def rich_table(comparison: Comparison) -> Table:
    """For the terminal."""
    weights = " [random weights]" if comparison.random_weights else ""
    title = f"{comparison.model}{weights.replace('[', chr(92) + '[')}, {comparison.input}"
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        left = column.header == "recipe"
        table.add_column(column.header, justify="left" if left else "right", overflow="fold")
    for row in comparison.rows:
        table.add_row(*cells(row, comparison.dense))
    return table


def text_table(comparison: Comparison) -> str:
    """The same, as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=180, force_terminal=False)
    console.print(rich_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {note}")
    return out.getvalue().rstrip()


def wide_table(
    title: str, headers: Iterable[str], rows: Iterable[Sequence[str]], hidden: Container[str]
) -> Table:
    """For the terminal: variants by name, and figures without those it is too narrow for.

    Args:
        title: In rich's markup.
        headers: Of all columns.
        rows: Texts of all columns.
        hidden: Headers that are left out.
    """
    names = list(headers)
    shown = [name not in hidden for name in names]
    table = Table(title=title, title_justify="left")
    for name in compress(names, shown):
        left = name == "variant"
        table.add_column(
            name,
            justify="left" if left else "right",
            overflow="fold",
            min_width=24 if left else None,
        )
    for row in rows:
        table.add_row(*compress(row, shown))
    return table
