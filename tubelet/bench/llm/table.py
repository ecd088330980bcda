"""A run as columns, shared by terminal, Markdown and page."""

from collections.abc import Sequence
from itertools import compress

from rich.table import Table

from tubelet.bench.llm.result import LLMRun, Row, Throughput
from tubelet.bench.table import wide_table

COLUMNS = {
    "variant": "what ran",
    "kept": "video tokens entering the first layer of the language model, share of all",
    "layers": "the same, mean over the layers",
    "FLOPs": "operations of the language model to the first token, share of dense, text included",
    "density": "share of causal attention that sparse prefill computes, mean over its layers",
    "KV": "bytes of the key-value cache behind the prompt, share of dense, text included",
    "KV MB": "the same in megabytes",
    "first token": "median time to the first token, which the next four add up to",
    "vision": "of it vision tower and projector, with the statistics that a recipe asks for",
    "plan": "of it deciding: scores and selection",
    "prompt": "of it all else: embeddings, positions, gathering, what `generate` does",
    "LLM": "of it the language model",
    "speed-up": "dense time to the first token of the same turns / this time",
    "bound": "largest speed-up that the counted operations allow, computed before the run",
    "of bound": "measured speed-up as a share of the bound",
    "vision + LLM": "speed-up, and share of the bound, without what `generate` does around both "
    "models in a dense answer; what a recipe adds to that counts",
    "overhead": "all that the recipe adds outside of the language model, as a share of its time",
    "tokens/s": "answer tokens per second behind the first, one prompt",
    "memory": "peak megabytes to the first token, above model and inputs",
    "KL": "KL(dense || this) of the first token, nats",
    "match": "leading greedy tokens equal to dense, share of the answer",
}
"""Header and meaning; a column of prompts per second for each concurrency follows."""

PAGE_ONLY = {"density", "KV MB", "prompt", "overhead", "vision + LLM", "layers", "FLOPs", "memory"}
"""Columns for which a terminal is too narrow."""


def headers(run: LLMRun) -> dict[str, str]:
    """Header and meaning of every column of a run."""
    meaning = (
        "prompts answered per second by batched generate of {}, and over dense; in the largest "
        "parts that memory allows"
    )
    return COLUMNS | {f"{n} at once": meaning.format(n) for n in run.concurrencies}


def cells(row: Row, run: LLMRun) -> list[str]:
    """Texts of a row, in the order of `headers`."""
    if row.error is not None:
        return [row.name, *["-"] * (len(headers(run)) - 1)]
    kept, agreement, split = row.kept, row.agreement, row.split
    dense = row is run.dense
    return [
        row.name,
        *(_shown(getattr(kept, n, None), "{:.1%}")
          for n in ("entering", "layers", "operations")),
        _shown(row.density, "{:.3f}"),
        _shown(getattr(kept, "cache", None), "{:.1%}"),
        _shown(row.cache_bytes, "{:.1f}", 1e6),
        *(_milliseconds(x) for x in (row.first, *(split.get(n) for n in PARTS))),
        _shown(row.speedup, "{:.2f}x"),
        "-" if dense else _shown(row.bound, "{:.2f}x"),
        "-" if dense else _shown(row.of_bound, "{:.0%}"),
        "-" if dense else _both(row),
        "-" if dense else _shown(row.overhead, "{:.1%}"),
        _shown(row.decode, "{:.1f}"),
        _shown(row.memory, "{:.0f}", 1e6),
        _shown(getattr(agreement, "kl", None), "{:.3g}"),
        _shown(getattr(agreement, "match", None), "{:.0%}"),
        *(_throughput(row, n) for n in run.concurrencies),
    ]  # fmt: skip


PARTS = ("vision", "plan", "prompt", "llm")
"""Of the time to the first token."""


def heading(run: LLMRun) -> str:
    """What was measured, in one line."""
    weights = ", random weights" if run.random_weights else ""
    frames, height, width = run.grid
    return (
        f"{run.model} ({run.parameters / 1e9:.3g} B{weights}), {run.input}: {run.video_tokens:,} "
        f"video tokens ({frames}x{height}x{width}) in prompts of {run.prompt_tokens:,}, answers of "
        f"{1 + run.new_tokens}, {run.precision}, {run.environment['hardware']}"
    )


def markdown(runs: Sequence[LLMRun]) -> str:
    """Every run as a table with what was not measured and its notes."""
    return "\n\n".join(_markdown(run) for run in runs) + "\n"


def _markdown(run: LLMRun) -> str:
    versions = run.environment["versions"]
    commit = (run.environment["commit"] or "installed package")[:10]
    told = [
        f"**{heading(run)}**. Medians of {run.repeats} runs in turns with dense; dense or not, the "
        f"language model's attention is {run.attention['text']}, the vision tower's "
        f"{run.attention['vision']}. Commit `{commit}`, torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    ]
    if run.decode_video is not None:
        told.append(f"Reading the clip took {run.decode_video:.2f} s, not counted below.")
    measured = [row for row in run.rows if row.error is None]
    table = [cells(row, run) for row in measured]
    # Columns without a figure say nothing.
    kept = [any(text != "-" for text in column) for column in zip(*table, strict=True)]
    names = list(compress(headers(run), kept))
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for row, texts in zip(measured, table, strict=True):
        shown = list(compress(texts, kept))
        first = shown[0] if row is run.dense else f"`{shown[0]}`"
        lines.append("| " + " | ".join([first, *shown[1:]]) + " |")
    left_out = [f"- not measured: `{name}`: {why}" for name, why in failures(run)]
    notes = [f"- {note}" for note in run.notes]
    parts = [" ".join(told), "\n".join(lines)]
    return "\n\n".join([*parts, *(["\n".join([*left_out, *notes])] if left_out or notes else [])])


def failures(run: LLMRun) -> list[tuple[str, str]]:
    """What was not measured, and why."""
    found = [(row.name, row.error) for row in run.rows if row.error is not None]
    return found + [
        (f"{row.name}, {entry.concurrency} at once", entry.error)
        for row in run.rows
        for entry in row.throughput
        if entry.error is not None
    ]


def rich_table(run: LLMRun) -> Table:
    """For the terminal."""
    rows = (cells(row, run) for row in run.rows)
    return wide_table(heading(run).replace("[", "\\["), headers(run), rows, PAGE_ONLY)


def _throughput(row: Row, concurrency: int) -> str:
    entry = next((e for e in row.throughput if e.concurrency == concurrency), None)
    if entry is None or entry.requests is None:
        return "-"
    parts = "" if entry.together == concurrency else f", {entry.together} at a time"
    return f"{entry.requests:.3g}{_over(entry)}{parts}"


def _both(row: Row) -> str:
    share = _shown(row.prefill_of_bound, " ({:.0%})")
    return _shown(row.prefill_speedup, "{:.2f}x") + share


def _over(entry: Throughput) -> str:
    return "" if entry.over_dense is None else f" ({entry.over_dense:.2f}x)"


def _milliseconds(value: float | None) -> str:
    return _shown(value, "{:.4g} ms", 1e-3)


def _shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value / unit)
