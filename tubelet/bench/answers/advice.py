"""Which recipe to use for which questions, said in words by rules over the figures."""

from collections.abc import Sequence
from statistics import median

from tubelet.bench.answers.result import Answers
from tubelet.bench.answers.summary import (
    METHODS,
    Point,
    by_kind,
    of_kind,
    points,
    shown_keep,
    surely,
    unknown_kinds,
)
from tubelet.bench.fidelity.stats import score

COLLAPSED = 0.5
"""Share of what dense knows beyond a guess, below which a kind of question counts as lost."""

HARMLESS = 0.9
"""Share from which on it counts as kept."""


def advice(run: Answers) -> list[str]:
    """Sentences, each following from the figures by one rule."""
    if run.quick:
        return ["This was a smoke test; run it without --quick before following any advice."]
    known = [background for background in run.backgrounds if knows(run, background)]
    every = [point for background in known for point in points(run, background)]
    methods = [point for point in every if point.line.kind in METHODS]
    if known and not methods:
        return ["No recipe that drops tokens was measured."]
    found = [
        f"On {background} dense answers no better than a guess; nothing follows from it."
        for background in run.backgrounds
        if background not in known
    ]
    if not known:
        return found
    found += _unknown(run)
    for background in known:
        found += _best([p for p in every if p.background == background], background)
    found += _robust(methods, known, shown_keep(run))
    found += _kinds(run)
    found += _idle(methods)
    found += _harmful(methods)
    return found + _whole(every)


def _unknown(run: Answers) -> list[str]:
    names = unknown_kinds(run)
    if not names:
        return []
    return [
        f"Dense itself answers {', '.join(names)} no better than a guess; nothing about recipes "
        "follows from these."
    ]


def knows(run: Answers, background: str) -> bool:
    """Whether dense answers more there than the best guess would."""
    dense = score(list(run.cell(background).entries["dense"].right))
    return dense.low > sum(run.chances[kind] for kind in run.kinds) / len(run.kinds)


def _best(here: Sequence[Point], background: str) -> list[str]:
    """The best at every budget, beside the controls, and whether it surely beats random drop."""
    found = []
    methods = [p for p in here if p.line.kind in METHODS]
    for keep in sorted({p.line.keep for p in methods if p.line.keep is not None})[::-1]:
        rivals = [p for p in methods if p.line.keep == keep]
        controls = [p for p in here if p.line.kind == "control" and p.line.keep == keep]
        front = [p for p in rivals if p.line.kind == "prompt"]
        best = max(rivals, key=lambda p: p.difference.value)
        names = [_told(best)]
        if front and best.line.kind != "prompt":
            first = max(front, key=lambda p: p.difference.value)
            names.append(f"{_told(first)} in front of the language model")
        tests = len(rivals)
        sure = surely(best.over_random, tests) > 0
        verdict = "surely" if sure else "not surely"
        beside = ", ".join(f"{p.line.family} {in_points(p.difference.value)}" for p in controls)
        found.append(
            f"On {background}, set to {keep:.3g} of the tokens: best is {'; and '.join(names)}. "
            f"{best.line.family} is {verdict} better than random drop at as many tokens per layer. "
            f"{beside}."
        )
    return found


def _told(point: Point) -> str:
    noise = "" if point.difference.significant else ", within noise of dense"
    return (
        f"{point.line.family} ({in_points(point.difference.value)} to dense at "
        f"{point.used.layers:.0%} of the tokens per layer{noise})"
    )


def in_points(value: float) -> str:
    """A difference of accuracies in percentage points."""
    return f"{value * 100:+.1f} points"


def _robust(methods: Sequence[Point], backgrounds: Sequence[str], keep: float | None) -> list[str]:
    """The one whose worst background is best, at one budget."""
    groups: dict[str, list[Point]] = {}
    for point in methods:
        if point.line.keep == keep and point.line.kind == "prompt":
            groups.setdefault(point.line.family, []).append(point)
    full = [group for group in groups.values() if len(group) == len(backgrounds)]
    if len(backgrounds) < 2 or not full or keep is None:
        return []
    worst = [min(group, key=lambda p: p.difference.value) for group in full]
    best = max(worst, key=lambda p: p.difference.value)
    return [
        f"If you do not know your videos, at {keep:.3g} of the tokens {best.line.family} has the "
        f"best worst case in front of the language model: {in_points(best.difference.value)} to "
        f"dense, on {best.background}."
    ]


def _kinds(run: Answers) -> list[str]:
    """Kinds of questions that most recipes lose, and those that most keep."""
    keep = shown_keep(run)
    tables = [
        table
        for name, line in run.variants.items()
        if line.kind in METHODS and line.keep == keep and (table := by_kind(run, name)) is not None
    ]
    if not tables or keep is None:
        return []
    lost, kept = [], []
    for kind in run.kinds:
        shares = [share for table in tables if (share := table[kind].known) is not None]
        if not shares:
            continue
        middle = median(shares)
        if middle < COLLAPSED:
            best = max(shares)
            lost.append(f"{kind} ({middle:.0%}; the best recipe {best:.0%})")
        elif middle > HARMLESS:
            kept.append(kind)
    told = []
    if lost:
        told.append(
            f"Collapsing at {keep:.3g} of the tokens: {', '.join(lost)}. The share is of what "
            "dense knows beyond a guess, and that of the median recipe."
        )
    if kept:
        told.append(
            f"Hardly touched at {keep:.3g} of the tokens, by the median recipe: {', '.join(kept)}."
        )
    return told


def _idle(methods: Sequence[Point]) -> list[str]:
    """Recipes that nowhere surely beat random drop, or fewer frames."""
    told = []
    for what, against in (("random drop", "over_random"), ("fewer frames", "over_frames")):
        judged = [p for p in methods if getattr(p, against) is not None]
        families = list(dict.fromkeys(p.line.family for p in judged))
        idle = []
        for family in families:
            mine = [p for p in judged if p.line.family == family]
            if not any(surely(getattr(p, against), len(mine)) > 0 for p in mine):
                idle.append(family)
        if idle == families and families:
            told.append(f"No recipe is surely better than {what} at as many tokens per layer.")
        elif idle:
            told.append(
                f"Nowhere surely better than {what} at as many tokens per layer: {', '.join(idle)}."
            )
        elif families:
            told.append(f"Every recipe beats {what} surely on some background and budget.")
    return told


def _harmful(methods: Sequence[Point]) -> list[str]:
    """Recipes that somewhere surely lose to random drop."""
    places: dict[str, list[str]] = {}
    for point in methods:
        tests = sum(p.line.family == point.line.family for p in methods)
        if surely(point.over_random, tests) < 0:
            where = f"{point.background} at {point.line.keep:.3g}"
            places.setdefault(point.line.family, []).append(where)
    if not places:
        return []
    told = "; ".join(f"{family} ({', '.join(where)})" for family, where in places.items())
    return [f"Surely worse than random drop at as many tokens per layer: {told}."]


def _whole(every: Sequence[Point]) -> list[str]:
    """What drops no tokens: what it loses where it loses most."""
    told = []
    for what, kind in (("sparse prefill", "prefill"), ("caches", "cache")):
        mine = [p for p in every if p.line.kind == kind]
        worst = []
        for family in dict.fromkeys(p.line.family for p in mine):
            point = min(
                (p for p in mine if p.line.family == family), key=lambda p: p.difference.value
            )
            worst.append(
                f"{family} {in_points(point.difference.value)} ({used_words(point)}, on "
                f"{point.background})"
            )
        if worst:
            told.append(f"Worst case to dense of {what}: {'; '.join(worst)}.")
    return told


def used_words(point: Point) -> str:
    """What a recipe that drops no tokens saves."""
    used, told = point.used, []
    if used.density is not None:
        told.append(f"density {used.density:.2f}")
    if used.stored is not None:
        told.append(f"{used.stored:.0%} of the cache's bytes")
    if used.read is not None:
        told.append(f"{used.read:.0%} of the cache read")
    return ", ".join(told) or "nothing saved"


def families_of(run: Answers) -> dict[str, list[str]]:
    """Families by where they act, as tables and charts group them."""
    groups = {
        "in front of the language model": of_kind(run, "prompt"),
        "inside it": of_kind(run, "layers"),
        "in two stages": of_kind(run, "two stages"),
    }
    return {title: names for title, names in groups.items() if names}
