"""Which recipe to use when, said in words by rules over the figures."""

from collections.abc import Sequence

from tubelet.bench.fidelity.result import Fidelity
from tubelet.bench.fidelity.summary import (
    RANKED,
    Point,
    Standing,
    average_points,
    average_standings,
    controls,
)

SLOWER = 1.02
"""A variant whose latency is above this times dense saves no time."""

UNEVEN = 0.1
"""Difference to dense that varies by more than this over backgrounds is worth a warning."""


def advice(runs: Sequence[Fidelity]) -> list[str]:
    """Sentences, each following from the figures by one rule."""
    if runs[0].quick:
        return ["This was a smoke test; run it without --quick before following any advice."]
    found = []
    if any(row["leak"] for run in runs for row in controls(run)):
        found.append(
            "A control is above its floor: the tasks marked in the controls can be answered "
            "without their skill, so read scores on them with care."
        )
    everywhere = [row for share in RANKED for row in average_standings(runs, share)]
    every_point = average_points(runs)
    for background in runs[0].backgrounds:
        for share in RANKED:
            rows = [r for r in everywhere if (r.background, r.share) == (background, share)]
            found += _best(rows, background, share)
        found += _smaller([p for p in every_point if p.background == background], background)
    found += _robust(everywhere)
    found += _uneven(everywhere)
    found += _behind_random(everywhere)
    found += _slow(every_point)
    return found


def _contenders(rows: Sequence[Standing], regime: str) -> list[Standing]:
    return [r for r in rows if r.regime == regime and r.kind in ("method", "baseline", "random")]


def _best(rows: Sequence[Standing], background: str, share: float) -> list[str]:
    """The best of each regime, and whether it beats random drop."""
    found = []
    for regime in ("training-free", "trained"):
        ranked = _contenders(rows, regime)
        if not ranked:
            continue
        best = max(ranked, key=lambda row: row.score.value)
        where = f"On {background} at {share:.0%} of the tokens, {regime}"
        loss = f"{best.difference.value * 100:+.1f} points to dense"
        if not best.difference.significant:
            loss += ", within noise"
        if best.kind == "random" or best.over_random is None or best.over_random.low <= 0:
            found.append(
                f"{where}: nothing beats random drop for certain ({loss}); use RandomDrop."
            )
        else:
            gain = f"{best.over_random.value * 100:+.1f} to random drop"
            found.append(f"{where}: use {best.family} ({loss}, {gain}).")
    return found


def _smaller(points: Sequence[Point], background: str) -> list[str]:
    """A smaller dense model that beats the best recipe costing as much or more."""
    found = []
    for small in (p for p in points if p.kind == "small"):
        rivals = [p for p in points if p.kind == "method" and p.regime == "training-free"]
        as_cheap = [p for p in rivals if p.macs <= small.macs]
        if not as_cheap:
            continue
        best = max(as_cheap, key=lambda p: p.score.value)
        if small.score.low > best.score.high:
            found.append(
                f"On {background} the smaller model {small.variant.removeprefix('dense, ')} beats "
                f"every training-free recipe at its cost of {small.macs / 1e9:.1f} GMAC; the best "
                f"there is {best.variant}."
            )
    return found


def _robust(rows: Sequence[Standing]) -> list[str]:
    """The family whose worst background is best."""
    found = []
    backgrounds = {row.background for row in rows}
    for share in RANKED:
        by_family: dict[str, list[Standing]] = {}
        for row in _contenders([r for r in rows if r.share == share], "training-free"):
            by_family.setdefault(row.family, []).append(row)
        full = {f: group for f, group in by_family.items() if len(group) == len(backgrounds)}
        if len(backgrounds) < 2 or not full:
            continue
        worst = {f: min(group, key=lambda r: r.difference.value) for f, group in full.items()}
        family = max(worst, key=lambda f: worst[f].difference.value)
        row = worst[family]
        found.append(
            f"If you do not know your videos, at {share:.0%} of the tokens {family} has the best "
            f"worst case: {row.difference.value * 100:+.1f} points to dense on {row.background}."
        )
    return found


def _uneven(rows: Sequence[Standing]) -> list[str]:
    """Methods whose loss hangs on the background."""
    found = []
    methods = {row.family for row in rows if row.kind == "method"}
    for family in sorted(methods):
        group = [r for r in rows if r.family == family and r.share == RANKED[0]]
        if len(group) < 2:
            continue
        best = max(group, key=lambda r: r.difference.value)
        worst = min(group, key=lambda r: r.difference.value)
        if best.difference.value - worst.difference.value > UNEVEN:
            found.append(
                f"{family} depends on the background: {best.difference.value * 100:+.1f} points to "
                f"dense on {best.background}, {worst.difference.value * 100:+.1f} on "
                f"{worst.background}, at {RANKED[0]:.0%} of the tokens."
            )
    return found


def _behind_random(rows: Sequence[Standing]) -> list[str]:
    """Methods that lose to random drop somewhere for certain."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.kind == "method" and row.over_random is not None and row.over_random.high < 0:
            places.setdefault(row.family, []).append(f"{row.background} at {row.share:.0%}")
    return [
        f"Do not use {family} on {', '.join(where)}: it loses to random drop."
        for family, where in places.items()
    ]


def _slow(points: Sequence[Point]) -> list[str]:
    """Methods that save tokens and no time, by batch size."""
    found = []
    dense = {(p.background, p.regime): p.seconds for p in points if p.kind == "dense"}
    batches = sorted({batch for p in points for batch in p.seconds})
    for batch in batches:
        slower = {
            p.family
            for p in points
            if p.kind == "method"
            and batch in p.seconds
            and p.seconds[batch] > SLOWER * dense[p.background, p.regime].get(batch, float("inf"))
        }
        fast = {p.family for p in points if p.kind == "method" and batch in p.seconds} - slower
        if slower:
            text = f"With batches of {batch}, {', '.join(sorted(slower))} can be slower than dense "
            found.append(text + "on a model of this size: tokens saved are not time saved.")
        if fast:
            found.append(f"With batches of {batch}, {', '.join(sorted(fast))} are never slower.")
    return found
