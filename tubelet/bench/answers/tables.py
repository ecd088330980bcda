"""The result as Markdown: against dense by background, by kind of question, advice in words."""

from collections.abc import Iterable, Sequence

from tubelet.bench.answers.advice import advice, families_of, used_words
from tubelet.bench.answers.result import Answers
from tubelet.bench.answers.summary import (
    FRAMES,
    RANDOM,
    KindPoint,
    Point,
    by_kind,
    keeps,
    of_kind,
    points,
    shown_keep,
)
from tubelet.bench.fidelity.stats import Estimate

LEGEND = (
    "Mean accuracy over the kinds of questions minus that of dense, in points, ± its standard "
    "error over the same questions; behind it video tokens that enter the language model, and "
    "mean over its layers, in percent. Bold: surely better than random drop at as many tokens per "
    "layer (95 % interval of this comparison alone)."
)


def markdown(run: Answers) -> str:
    """Everything, as one document."""
    parts = [heading(run), "### Dense\n\n" + dense_table(run)]
    parts += [f"### On {name}\n\n{LEGEND}\n\n{budget_table(run, name)}" for name in run.backgrounds]
    if of_kind(run, "prefill", "cache"):
        told = "Differences to dense in points, ± standard error."
        parts.append(f"### All tokens kept\n\n{told}\n\n{whole_table(run)}")
    keep = shown_keep(run)
    if keep is not None:
        told = (
            f"Accuracy in percent at {keep:.3g} of the tokens, over all backgrounds; tokens per "
            "layer in percent. Arrows: the 95 % interval of the difference to dense leaves out 0."
        )
        parts.append(f"### By kind of question\n\n{told}\n\n{kind_table(run, keep)}")
    parts.append("### Which recipe when\n\n" + "\n".join(f"- {line}" for line in advice(run)))
    notes = remarks(run)
    if notes:
        parts.append("### Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def heading(run: Answers) -> str:
    """What was measured, in one paragraph."""
    model, versions = run.model, run.environment["versions"]
    checksum = "" if model["sha256"] is None else f", sha256 `{model['sha256'][:12]}`"
    commit = (run.environment["commit"] or "installed package")[:10]
    text = (
        f"**{model['name']}** ({model['parameters'] / 1e6:.1f} M with its encoder"
        f"{checksum}), {run.num_video} video tokens, {run.depth} layers, {run.precision}, "
        f"{run.environment['hardware']}; {run.clips} test clips with one question each, per kind "
        f"and background; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"commit `{commit}`."
    )
    if not run.complete:
        there = {cell.background: len(cell.parts) for cell in run.cells}
        counts = ", ".join(f"{name} {there.get(name, 0)} of {run.parts}" for name in run.wanted)
        text += f" A part of the run only: {counts} parts of the questions."
    return text


def points_of(estimate: Estimate | None, signed: bool = True) -> str:
    """Value ± standard error in points."""
    if estimate is None:
        return "-"
    sign = "+" if signed else ""
    return f"{estimate.value * 100:{sign}.1f} ±{estimate.error * 100:.1f}"


def dense_table(run: Answers) -> str:
    """What the model answers with all of its tokens, and what a guess is worth."""
    lines = [_row(["", *run.kinds, "mean"]), _rule(len(run.kinds) + 1)]
    for cell in run.cells:
        right = cell.entries["dense"].right
        shares = [f"{100 * float(row.mean()):.1f}" for row in right]
        lines.append(_row([cell.background, *shares, f"{100 * float(right.mean()):.1f}"]))
    chances = [run.chances[kind] for kind in run.kinds]
    mean = sum(chances) / len(chances)
    guesses = [f"{100 * chance:.1f}" for chance in (*chances, mean)]
    return "\n".join([*lines, _row(["a guess", *guesses])])


def budget_table(run: Answers, background: str) -> str:
    """Families against budgets."""
    found = {point.name: point for point in points(run, background)}
    budgets = keeps(run)
    lines = [_row(["recipe", *(f"{keep:.3g}" for keep in budgets)]), _rule(len(budgets))]
    for title, names in groups(run).items():
        lines.append(_row([f"*{title}*", *[""] * len(budgets)]))
        for family in names:
            cells = [_budget_cell(found.get(f"{family} {keep:g}")) for keep in budgets]
            if set(cells) != {"-"}:
                lines.append(_row([family, *cells]))
    return "\n".join(lines)


def groups(run: Answers) -> dict[str, list[str]]:
    """Families as tables group them, the controls first."""
    return {"controls": [RANDOM, FRAMES], **families_of(run)}


def _budget_cell(point: Point | None) -> str:
    if point is None:
        return "-"
    shown = points_of(point.difference)
    better = point.over_random is not None and point.over_random.low > 0
    shares = f"{100 * point.used.entering:.0f} / {100 * point.used.layers:.0f}"
    return f"{f'**{shown}**' if better else shown} ({shares})"


def whole_table(run: Answers) -> str:
    """What drops no tokens, on every background."""
    lines = [_row(["recipe", "setting", "saves", *run.backgrounds])]
    lines.append("|---|---|---|" + "---:|" * len(run.backgrounds))
    found = {name: {p.name: p for p in points(run, name)} for name in run.backgrounds}
    for name in of_kind(run, "prefill", "cache"):
        mine = [found[background].get(name) for background in run.backgrounds]
        there = [point for point in mine if point is not None]
        if there:
            shown = [points_of(None if p is None else p.difference) for p in mine]
            setting = f"`{run.variants[name].setting}`"
            lines.append(_row([name, setting, used_words(there[0]), *shown]))
    return "\n".join(lines)


def kind_table(run: Answers, keep: float) -> str:
    """Families against kinds of questions, over all backgrounds, at one budget."""
    lines = [_row(["recipe", "tokens", *run.kinds]), _rule(len(run.kinds) + 1)]
    names = ["dense", *(f"{family} {keep:g}" for names in groups(run).values() for family in names)]
    for name in [*names, *of_kind(run, "prefill", "cache")]:
        table = by_kind(run, name) if name in run.variants else None
        if table is not None:
            used = [cell.entries[name].used.layers for cell in run.cells]
            shares = [_kind_cell(table[kind], name == "dense") for kind in run.kinds]
            family = run.variants[name].family
            lines.append(_row([family, f"{100 * sum(used) / len(used):.0f}", *shares]))
    return "\n".join(lines)


def _kind_cell(point: KindPoint, is_dense: bool) -> str:
    shown = f"{100 * point.share:.1f}"
    # Without a mark a difference may be noise.
    worse = not is_dense and point.difference.high < 0
    better = not is_dense and point.difference.low > 0
    return f"{shown} ↓" if worse else (f"{shown} ↑" if better else shown)


def remarks(run: Answers) -> list[str]:
    """How to read it, what was not measured, and the run's notes."""
    how = [
        "prompts with recipes run through the host's own forward pass; the answer is right if the "
        "most likely word of the whole vocabulary is the right one",
        "budgets are what is left behind the last cut, of two stages behind the first; thresholds "
        "of PruneVid, LLaVAScissor, STTM and MustDrop were searched to meet them on average on "
        "clips of their own; layer numbers keep their relative depth",
        "with a recipe for caches the video alone is the prompt, and the question is read word by "
        "word from its cache; the first answer word of one call would not see the recipe at all",
        "the model was trained with tokens dropped at random, which suits random drop; recipes "
        "played no part in its training",
    ]
    failures: dict[tuple[str, str], list[str]] = {}
    for name, why in run.failures.items():
        line = run.variants[name]
        budgets = failures.setdefault((line.family, why), [])
        budgets += [] if line.keep is None else [f"{line.keep:.3g}"]
    told = []
    for (family, why), budgets in failures.items():
        where = f" at {', '.join(budgets)}" if budgets else ""
        told.append(f"not measured: {family}{where}: {why}")
    return [*how, *told, *run.notes]


def settings_table(run: Answers) -> str:
    """The recipes with their fields, by variant."""
    lines = [_row(["variant", "setting", "ms per question"]), "|---|---|---:|"]
    seconds: dict[str, list[float]] = {}
    for cell in run.cells:
        for name, entry in cell.entries.items():
            seconds.setdefault(name, []).append(entry.seconds)
    for name, line in run.variants.items():
        spent = seconds.get(name)
        shown = "-" if spent is None else f"{1e3 * sum(spent) / len(spent):.2f}"
        lines.append(_row([name, f"`{line.setting}`", shown]))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|---|" + "---:|" * columns


def cells_of(table: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a Markdown table, for the page."""
    lines: Sequence[str] = table.splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return header, rows
