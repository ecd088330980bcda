"""Line charts as inline SVG; colours are classes of the page, which knows light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 660, 430
LEFT, RIGHT, TOP, BOTTOM = 50, 204, 14, 46
"""Room around the plotted area; lines are labelled on the right."""

MARKS = (
    "plus", "ring", "square", "up", "down", "wide",
    "circle", "diamond", "left", "right", "cross", "bar",
)  # fmt: skip
"""A mark and a colour of the page for every family, by its number."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Args:
        name: Its label.
        style: Number of its colour and mark.
        points: (x, y, low, high) in the order they are joined; the name stands at the last.
        line: "solid", "dashed" or "none".
    """

    name: str
    style: int
    points: list[tuple[float, float, float, float]]
    line: str = "solid"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart whose x axis falls to the right: dense on the left, cheaper on the right.

    Args:
        title: For readers who do not see it.
        x_label, y_label: With units.
        series: Lines.
        levels: (name, y) of horizontal lines across the chart.
        percent: Write x as a percentage.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()
    percent: bool = False


def draw(chart: Chart) -> str:
    """SVG text."""
    xs = [x for series in chart.series for x, *_ in series.points]
    ys = [y for series in chart.series for _, _, *ends in series.points for y in ends]
    ys += [y for _, y in chart.levels]
    if not xs:
        return ""
    low, high = _span(ys)
    # Shares of tokens are read against zero; latencies crowd far from it.
    least = 0.0 if chart.percent else min(xs) * 0.9
    plane = _Plane(least, max(xs) * 1.02, low, high)
    parts = [*_axes(chart, plane), *_levels(chart, plane)]
    for series in chart.series:
        parts += _series(series, plane)
    parts += _labels(chart, plane)
    label = escape(chart.title, quote=True)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return head + "".join(parts) + "</svg>"


@dataclass(frozen=True)
class _Plane:
    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (self.right - value) / (self.right - self.left or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (self.high - value) / (self.high - self.low or 1)
        return TOP + share * (HEIGHT - TOP - BOTTOM)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits on tenths, within [0, 1] where the values are."""
    low = int(max(min(values), 0) * 10) / 10
    high = -(-max(values) * 10 // 1) / 10
    return low, max(high, low + 0.1)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / about or 1.0
    size = 10.0 ** _floor_log10(raw)
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.85)
    first = -(-low / step // 1)
    count = int((high - first * step) / step + 1e-9) + 1
    return [(first + i) * step for i in range(count)]


def _floor_log10(value: float) -> int:
    power = 0
    while value < 1:
        value, power = value * 10, power - 1
    while value >= 10:
        value, power = value / 10, power + 1
    return power


def _axes(chart: Chart, plane: _Plane) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in ticks(plane.low, plane.high):
        y = plane.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                     f"{value:.0%}</text>")  # fmt: skip
    for value in ticks(plane.left, plane.right):
        x = plane.x(value)
        text = f"{value:.0%}" if chart.percent else f"{value:.3g}"
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
                     f"{text}</text>")  # fmt: skip
    middle = (LEFT + right) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
                 f"{escape(chart.x_label)}</text>")  # fmt: skip
    parts.append(f'<text class="axis" transform="translate(12 {(TOP + bottom) / 2:.0f}) '
                 f'rotate(-90)" text-anchor="middle">{escape(chart.y_label)}</text>')  # fmt: skip
    return parts


def _levels(chart: Chart, plane: _Plane) -> list[str]:
    return [
        f'<path class="level" d="M{LEFT} {plane.y(y):.1f}H{WIDTH - RIGHT}"/>'
        for _, y in chart.levels
    ]


def _series(series: Series, plane: _Plane) -> list[str]:
    places = [(plane.x(x), plane.y(y)) for x, y, *_ in series.points]
    kind = f"s{series.style % len(MARKS)}"
    parts = [f'<g class="{kind}">', f"<title>{escape(series.name)}</title>"]
    for (x, _), (_, _, low, high) in zip(places, series.points, strict=True):
        parts.append(f'<path class="spread" d="M{x:.1f} {plane.y(low):.1f}V{plane.y(high):.1f}"/>')
    if series.line != "none" and len(places) > 1:
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {series.line}" d="M{steps}"/>')
    parts += [mark(MARKS[series.style % len(MARKS)], x, y) for x, y in places]
    return [*parts, "</g>"]


def mark(kind: str, x: float, y: float, r: float = 4.4) -> str:
    """One of `MARKS` around a place."""
    if kind in ("circle", "ring"):
        css = "mark hollow" if kind == "ring" else "mark"
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    shapes = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "up": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "down": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        "left": [(-1.2, 0), (0.9, -1.1), (0.9, 1.1)],
        "right": [(1.2, 0), (-0.9, 1.1), (-0.9, -1.1)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "bar": [(-0.5, -1.3), (0.5, -1.3), (0.5, 1.3), (-0.5, 1.3)],
        "wide": [(-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)],
    }
    if kind in shapes:
        corners = "L".join(f"{x + a * r:.1f} {y + b * r:.1f}" for a, b in shapes[kind])
        return f'<path class="mark" d="M{corners}Z"/>'
    a = r * 1.1 if kind == "plus" else 0.0
    b = 0.0 if kind == "plus" else r * 0.9
    return (
        f'<path class="stroke" d="M{x - a - b:.1f} {y - b:.1f}L{x + a + b:.1f} {y + b:.1f}'
        f'M{x - b:.1f} {y + a + b:.1f}L{x + b:.1f} {y - a - b:.1f}"/>'
    )


def _labels(chart: Chart, plane: _Plane) -> list[str]:
    """Names on the right, pushed apart, each joined to the end of its line."""
    wanted = [("ref", name, WIDTH - RIGHT, plane.y(y), -1) for name, y in chart.levels]
    for series in chart.series:
        x, y, *_ = series.points[-1]
        style = series.style % len(MARKS)
        wanted.append((f"s{style}", series.name, plane.x(x), plane.y(y), style))
    wanted.sort(key=lambda item: item[3])
    spots = spread([item[3] for item in wanted], 16.0, TOP + 4.0, HEIGHT - BOTTOM)
    edge, parts = WIDTH - RIGHT + 16, []
    for (css, name, x, y, style), spot in zip(wanted, spots, strict=True):
        parts.append(
            f'<path class="lead" d="M{x + 6:.1f} {y:.1f}L{edge - 4} {spot:.1f}"/><g class="{css}">'
        )
        if style >= 0:
            parts.append(mark(MARKS[style], edge + 3, spot, 3.6))
        shown = escape(name if len(name) <= 30 else name[:29] + "…")
        parts.append(f'<text class="name" x="{edge + 12}" y="{spot + 4:.1f}">{shown}</text></g>')
    return parts


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least `gap` apart within [low, high], near the ascending wanted ones."""
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else low))
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places
