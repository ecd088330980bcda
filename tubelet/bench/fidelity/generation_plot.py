"""PSNR over density as inline SVG; colours are classes of the page, which knows light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tubelet.bench.fidelity.generation_ranking import CONTROL, FAMILIES, Curve, Point, mean_of
from tubelet.bench.fidelity.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MARKS,
    RIGHT,
    TOP,
    WIDTH,
    mark,
    spread,
    ticks,
)
from tubelet.bench.quality import PSNR_CAP

COLOURS = (6, 7, 9, 5, 8, 2, 3, 10, 4, 11)
"""Colours of the page, far apart first."""

SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
"""Where the axis of densities may be marked."""

SPARSE, HEADROOM = 0.7, 10.0
"""Points up to this density set the axis, with so many dB for lines above them."""

APART = 0.09
"""Least distance of two such marks, as a share of the axis."""

Level = tuple[str, float]
"""Name and PSNR of a line across the chart."""


@dataclass(frozen=True)
class Style:
    """Number of a colour, a mark, and how the line is drawn."""

    colour: int
    mark: str
    line: str


def styles(curves: Sequence[Curve]) -> dict[str, Style]:
    """The look of each policy, the same in every chart.

    Policies of geometry alone share the colours of the others and are dashed.
    """
    found, solid, dashed = {}, 0, 0
    for curve in curves:
        if curve.policy == CONTROL:
            found[curve.policy] = Style(1, "circle", "heavy")
        elif curve.family == FAMILIES["windows"]:
            found[curve.policy] = Style(COLOURS[dashed % 10], MARKS[dashed % 12], "dashed")
            dashed += 1
        else:
            found[curve.policy] = Style(COLOURS[solid % 10], MARKS[(solid + 2) % 12], "solid")
            solid += 1
    return found


@dataclass(frozen=True)
class Plane:
    """Where a density, by its logarithm, and a PSNR stand.

    Args:
        dense, sparse: Densities at the left and the right end.
        low, high: dB at the ends.
    """

    dense: float
    sparse: float
    low: float
    high: float

    def x(self, share: float) -> float:
        """Pixels from the left."""
        along = math.log(self.dense / share) / math.log(self.dense / self.sparse)
        return LEFT + along * (WIDTH - LEFT - RIGHT)

    def y(self, psnr: float) -> float:
        """Pixels from the top; what equals the dense run stands at the top."""
        return TOP + (self.high - min(psnr, self.high)) / (self.high - self.low) * (
            HEIGHT - TOP - BOTTOM
        )


def make_plane(
    curves: Sequence[Curve], share: Callable[[Point], float], levels: Sequence[Level]
) -> Plane:
    """One that shows sparse points large; what is far closer to dense stands at the top edge."""
    points = [point for curve in curves for point in curve.points]
    shares = [share(point) for point in points]
    psnr = [float(p.psnr.mean()) for p in points if share(p) <= SPARSE] or [PSNR_CAP]
    reach = max(psnr) + HEADROOM
    psnr += [y for _, y in levels if y <= reach]
    low, high = math.floor(min(psnr)) - 1, math.ceil(max(psnr)) + 1
    return Plane(max(shares) * 1.08, min(shares) * 0.93, low, high)


def draw_curves(
    title: str,
    x_label: str,
    curves: Sequence[Curve],
    looks: dict[str, Style],
    share: Callable[[Point], float],
    plane: Plane,
    levels: Sequence[Level] = (),
) -> str:
    """SVG text: dense on the left, sparse on the right, names where the lines end."""
    parts = _axes(plane, x_label)
    parts += [
        f'<path class="level" d="M{LEFT} {plane.y(y):.1f}H{WIDTH - RIGHT}"/>' for _, y in levels
    ]
    ends = [(plane.y(float(curve.points[0].psnr.mean())), curve) for curve in curves]
    lines = [(plane.y(y), name) for name, y in levels]
    wanted: list[tuple[float, Curve | str]] = sorted([*ends, *lines], key=lambda item: item[0])
    spots = spread([y for y, _ in wanted], 16.0, TOP + 4.0, HEIGHT - BOTTOM)
    for (y, what), spot in zip(wanted, spots, strict=True):
        if isinstance(what, str):
            parts.append(_name(what, WIDTH - RIGHT, y, spot))
        else:
            parts.append(_curve(what, looks[what.policy], share, plane, spot))
    label = escape(title, quote=True)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return head + "".join(parts) + "</svg>"


def _curve(
    curve: Curve, look: Style, share: Callable[[Point], float], plane: Plane, spot: float
) -> str:
    places = [(plane.x(share(p)), plane.y(float(p.psnr.mean()))) for p in reversed(curve.points)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [
        f'<g class="curve s{look.colour}"><path class="hit" d="M{path}"/>'
        f'<path class="line {look.line}" d="M{path}"/>'
    ]
    for point, (x, y) in zip(reversed(curve.points), places, strict=True):
        parts.append(f"<g><title>{escape(told(point))}</title>{mark(look.mark, x, y)}</g>")
    x, y = places[-1]
    return "".join([*parts, _name(curve.policy, x + 6, y, spot, look.mark), "</g>"])


def told(point: Point) -> str:
    """A point in words."""
    psnr = mean_of(point.psnr)
    return (
        f"{point.name}: {psnr.value:.1f} dB ({psnr.low:.1f} to {psnr.high:.1f}) at "
        f"{point.density:.1%} of the sparse calls, {point.computed:.1%} of the whole run"
    )


def _name(name: str, x: float, y: float, spot: float, shape: str | None = None) -> str:
    """A name on the right, joined to the end of its line."""
    edge = WIDTH - RIGHT + 16
    lead = f'<path class="lead" d="M{x:.1f} {y:.1f}L{edge - 4} {spot:.1f}"/>'
    sign = "" if shape is None else mark(shape, edge + 3, spot, 3.6)
    css = "tick" if shape is None else "name"
    return (
        f'{lead}{sign}<text class="{css}" x="{edge + 12}" y="{spot + 4:.1f}">{escape(name)}</text>'
    )


def _axes(plane: Plane, x_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<path class="grid" d="M{LEFT} {plane.y(level):.1f}H{right}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{plane.y(level) + 4:.1f}" text-anchor="end">'
        f"{level:g}</text>"
        for level in ticks(plane.low, plane.high, 8)
    ]
    parts += [
        f'<path class="grid" d="M{plane.x(share):.1f} {TOP}V{bottom}"/>'
        f'<text class="tick" x="{plane.x(share):.1f}" y="{bottom + 16}" text-anchor="middle">'
        f"{share:.0%}</text>"
        for share in _shares(plane)
    ]
    parts.append(
        f'<text class="axis" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f'{escape(x_label)}</text><text class="axis" transform="translate(12 '
        f'{(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">PSNR to the dense run, dB'
        "</text>"
    )
    return parts


def _shares(plane: Plane) -> list[float]:
    inside = [share for share in SHARES if plane.sparse <= share <= plane.dense]
    apart = APART * math.log(plane.dense / plane.sparse)
    kept: list[float] = []
    for share in inside:
        if not kept or math.log(kept[-1] / share) >= apart:
            kept.append(share)
    return kept
