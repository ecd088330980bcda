"""Heat maps, curves and bars as inline SVG; colours are classes of the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tubelet.bench.fidelity.svg import spread, ticks
from tubelet.bench.generators.result import GeneratorComparison, Row

CELL = 34
"""Side of a heat map's cell; maps with many columns have narrower ones."""

WIDTH = 660
"""Of curves and bars."""

MOST_NUMBERS = 16
"""Columns up to which the cells of a map carry their number."""

MAP_LEFT, MAP_TOP = 52, 34
"""Room for the axes of a map."""

Table = Sequence[Sequence[float | None]]


def heat_map(table: Table, title: str, columns: str) -> str:
    """Densities in [0, 1]: a row per layer; None is a dense call.

    Args:
        table: Rows of equal length.
        title: For readers who do not see it.
        columns: What the columns are, such as "step".
    """
    across = len(table[0]) if table else 0
    if not across:
        return ""
    wide, tall = _cell_size(len(table), across)
    parts = _map_axes(len(table), across, columns)
    for layer, row in enumerate(table):
        for column, value in enumerate(row):
            x, y = MAP_LEFT + wide * column, MAP_TOP + tall * layer
            told = "dense" if value is None else f"{value:.1%}"
            parts.append(f"<g><title>layer {layer}, {escape(columns)} {column}: {told}</title>")
            parts += [*_cell(x, y, wide, tall, value, across <= MOST_NUMBERS), "</g>"]
    width, height = round(MAP_LEFT + wide * across + 8), round(MAP_TOP + tall * len(table) + 8)
    label = escape(title, quote=True)
    # Its own size, so that a cell is as large in a narrow map as in a wide one.
    head = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{label}">'
    )
    return head + "".join(parts) + "</svg>"


def _cell_size(rows: int, across: int) -> tuple[float, float]:
    wide = CELL if across <= MOST_NUMBERS else max(MOST_NUMBERS * CELL / across, 3)
    return wide, CELL * 0.72 if rows <= MOST_NUMBERS else 10


def _map_axes(rows: int, across: int, columns: str) -> list[str]:
    wide, tall = _cell_size(rows, across)
    middle = MAP_TOP + tall * rows / 2
    parts = [
        f'<text class="axis" x="{MAP_LEFT}" y="12">{escape(columns)}</text>',
        f'<text class="axis" transform="translate(12 {middle:.0f}) rotate(-90)" '
        'text-anchor="middle">layer</text>',
    ]
    parts += [
        f'<text class="tick" x="{MAP_LEFT + wide * (column + 0.5):.1f}" y="{MAP_TOP - 6}" '
        f'text-anchor="middle">{column}</text>'
        for column in range(0, across, -(-across // MOST_NUMBERS))
    ]
    parts += [
        f'<text class="tick" x="{MAP_LEFT - 6}" y="{MAP_TOP + tall * (layer + 0.5) + 4:.1f}" '
        f'text-anchor="end">{layer}</text>'
        for layer in range(0, rows, -(-rows // MOST_NUMBERS))
    ]
    return parts


def _cell(
    x: float, y: float, wide: float, tall: float, value: float | None, numbered: bool
) -> list[str]:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}"'
    if value is None:
        return [f'<rect {place} class="dense"/>']
    parts = [f'<rect {place} class="heat" fill-opacity="{value:.3f}"/>']
    if numbered:
        css = "over" if value > 0.55 else "under"
        parts.append(
            f'<text class="{css}" x="{x + wide / 2 - 0.5:.1f}" y="{y + tall / 2 + 3.5:.1f}" '
            f'text-anchor="middle">{value * 100:.0f}</text>'
        )
    return parts


@dataclass(frozen=True)
class _Plane:
    """Where a step and an error stand in the curves."""

    steps: int
    peak: float
    left: int = 58
    right: int = WIDTH - 34
    top: int = 14
    bottom: int = 286

    def x(self, step: int) -> float:
        return self.left + (self.right - self.left) * step / max(self.steps - 1, 1)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.peak


def error_curves(rows: Sequence[Row]) -> str:
    """Latent error after each step, a line per variant but dense; ends carry its number."""
    peak = max(max(row.latent_error) for row in rows) * 1.04 or 1.0
    plane = _Plane(len(rows[0].latent_error), peak)
    parts = _curve_axes(plane)
    ends = [plane.y(row.latent_error[-1]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: ends[i])
    places = spread([ends[i] for i in order], 16.0, plane.top + 4.0, plane.bottom)
    spots = dict(zip(order, places, strict=True))
    for number, row in enumerate(rows):
        points = [(plane.x(i), plane.y(error)) for i, error in enumerate(row.latent_error)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dots = "".join(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
                       for x, y in points)  # fmt: skip
        parts.append(
            f'<g class="s{_style(number)}"><title>{escape(row.name)}</title>'
            f'<path class="line solid" d="M{path}"/>{dots}'
            f'<text class="name" x="{plane.right + 8}" y="{spots[number] + 4:.1f}">'
            f"{number + 2}</text></g>"
        )
    head = f'<svg viewBox="0 0 {WIDTH} 330" role="img" aria-label="latent error over steps">'
    return head + "".join(parts) + "</svg>"


def _curve_axes(plane: _Plane) -> list[str]:
    parts = []
    for level in ticks(0.0, plane.peak):
        y = plane.y(level)
        parts.append(
            f'<path class="grid" d="M{plane.left} {y:.1f}H{plane.right}"/>'
            f'<text class="tick" x="{plane.left - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{level:.3g}</text>"
        )
    parts += [
        f'<text class="tick" x="{plane.x(step):.1f}" y="{plane.bottom + 18}" '
        f'text-anchor="middle">{step + 1}</text>'
        for step in range(0, plane.steps, -(-plane.steps // 20))
    ]
    across, down = (plane.left + plane.right) / 2, (plane.top + plane.bottom) / 2
    parts.append(
        f'<text class="axis" x="{across:.0f}" y="324" text-anchor="middle">steps done</text>'
        f'<text class="axis" transform="translate(12 {down:.0f}) rotate(-90)" '
        'text-anchor="middle">relative error</text>'
    )
    return parts


def time_bars(found: GeneratorComparison) -> str:
    """Seconds of each variant, attention apart from the rest, beside what was predicted."""
    each, left, right, top = 44, 34, 66, 8
    height = top + each * len(found.rows) + 26
    dense = found.rows[0].seconds
    predicted = [dense / row.prediction["speedup"] if row.prediction else None
                 for row in found.rows]  # fmt: skip
    longest = max([row.seconds for row in found.rows] + [p for p in predicted if p])
    scale = (WIDTH - left - right) / longest
    parts = []
    for number, (row, expected) in enumerate(zip(found.rows, predicted, strict=True)):
        y = top + each * number
        inside, whole = row.attention_seconds * scale, row.seconds * scale
        parts.append(
            f"<g><title>{escape(row.name)}: attention {row.attention_seconds:.1f} s of "
            f'{row.seconds:.1f} s</title><text class="tick" x="{left - 10}" y="{y + 22}" '
            f'text-anchor="end">{number + 1}</text>'
            f'<rect class="inside" x="{left}" y="{y + 4}" width="{inside:.1f}" height="26"/>'
            f'<rect class="rest" x="{left + inside:.1f}" y="{y + 4}" '
            f'width="{max(whole - inside, 0):.1f}" height="26"/>'
        )
        if expected:
            at = left + expected * scale
            parts.append(f'<path class="expected" d="M{at:.1f} {y}V{y + 34}"/>')
        end = max(whole, (expected or 0) * scale)
        parts.append(f'<text x="{left + end + 8:.1f}" y="{y + 22}">{row.seconds:.1f} s</text></g>')
    parts.append(
        f'<text class="axis" x="{left}" y="{height - 6}">filled: attention; light: the rest; '
        "dashed: the total predicted before the run</text>"
    )
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="time of each variant">'
    return head + "".join(parts) + "</svg>"


def _style(number: int) -> int:
    """Colours that are far apart first."""
    return (6, 7, 9, 5, 8, 2, 3, 10, 4, 11)[number % 10]
