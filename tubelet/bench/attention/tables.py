"""The result as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from tubelet.bench.attention.result import BASELINES, AttentionRun, Measured, Skipped

_LABELS = {"fa4": "FA4", "sdpa": "SDPA", "flex": "Flex"}


_PARTS = {
    "seconds": "layer ms",
    "attention": "attention ms",
    "reordering": "of it reordering ms",
    "selection": "selection ms",
    "first": "first step ms",
}


def markdown(runs: Sequence[AttentionRun]) -> str:
    """Kernels, policies and what was left out, shape by shape."""
    parts = []
    for run in runs:
        facts = run.environment
        versions = ", ".join(
            f"{name} {facts['versions'][name]}"
            for name in ("torch", "flash-attn-4", "triton")
            if name in facts["versions"]
        )
        parts.append(
            f"{facts['hardware']}; {versions}; {run.precision}; medians of {run.repeats} in turns; "
            f"commit {facts['commit'] or 'unknown'}\n\n`{facts['command']}`"
        )
        parts += [f"- {note}" for note in run.notes]
        for shape in run.shapes:
            parts.append(f"### {shape['name']}: {_call(shape)}")
            kernels = run.of(shape["name"], "dense") + run.of(shape["name"], "lists")
            parts += [_kernels(kernels)] if kernels else []
            policies = run.of(shape["name"], "policy")
            parts += [_policies(policies)] if policies else []
            left = [entry for entry in run.skipped if entry.shape == shape["name"]]
            parts += [_left_out(left)] if left else []
    return "\n\n".join(parts) + "\n"


def _call(shape: dict[str, Any]) -> str:
    # Results from before there were prompts have neither key heads nor causality.
    few = shape.get("key_heads", shape["heads"])
    grouped = "" if few == shape["heads"] else f", {few} key heads"
    causal = ", causal" if shape.get("causal") else ""
    return f"{shape['tokens']:,} tokens, {shape['heads']} heads x {shape['width']}{grouped}{causal}"


def layers(runs: Sequence[AttentionRun]) -> str:
    """Whole layers of the policies only, shape by shape: the short version."""
    parts = []
    for run in runs:
        for shape in run.shapes:
            cases = run.of(shape["name"], "policy")
            if not cases:
                continue
            dense = " and ".join(
                f"{_LABELS[c.name]} {_milliseconds(c.seconds)} ms"
                for c in run.of(shape["name"], "dense")
                if c.name in _LABELS
            )
            parts.append(
                f"**{shape['name']}**: {shape['tokens']:,} tokens, {shape['heads']} heads of "
                f"{shape['width']}; dense {dense}"
            )
            parts.append(_layers(cases))
    return "\n\n".join(parts)


def _layers(cases: Sequence[Measured]) -> str:
    baselines = _baselines(cases)
    rows = [
        [
            f"`{case.name}`",
            f"{case.density:.3f}",
            *(_milliseconds(x) for x in (case.seconds, case.selection)),
            *(_ratio(case, name) for name in baselines),
            "" if case.recall is None else f"{case.recall:.2f}",
        ]
        for case in sorted(cases, key=lambda case: case.seconds)
    ]
    over = [f"over {_LABELS[name]}" for name in baselines]
    return _table(["policy", "density", "layer ms", "of it selection", *over, "recall"], rows)


def forwards(results: Sequence[dict[str, Any]]) -> str:
    """Whole forward passes of `tubelet bench forward`: predicted, then measured."""
    rows = [
        [
            result["preset"],
            f"{result['tokens']:,}",
            f"`{row['name']}`",
            f"{result['dense']['attention_share']:.0%}",
            f"{row['prediction']['density']:.3f}",
            f"{row['predicted_speedup']:.2f}x",
            f"{row['measured_speedup']:.2f}x",
            f"{row['predicted_speedup'] / row['measured_speedup'] - 1:+.1%}",
        ]
        for result in results
        for row in result["recipes"]
    ]
    head = ["model", "tokens", "policy", "attention's share", "density", "predicted", "measured"]
    return _table([*head, "off by"], rows)


def _kernels(cases: Sequence[Measured]) -> str:
    baselines = _baselines(cases)
    rows = [
        [
            case.name,
            "dense" if case.block is None else f"{case.block[0]} x {case.block[1]}",
            f"{case.density:.3f}",
            _milliseconds(case.seconds),
            f"{case.tflops:.1f}",
            *(_ratio(case, name) for name in baselines),
            _small(case.kernel_error),
        ]
        for case in cases
    ]
    head = ["kernel", "blocks", "density", "ms", "TFLOP/s"]
    return _table([*head, *(f"over {_LABELS[n]}" for n in baselines), "max error"], rows)


def _policies(cases: Sequence[Measured]) -> str:
    baselines = _baselines(cases)
    # Steps are a generator's, an order per head that of prompts.
    timed = ("seconds", "attention", "reordering", "selection", "first")
    parts = [part for part in timed if any(getattr(case, part) is not None for case in cases)]
    rows = [
        [
            case.name,
            case.field,
            case.impl if case.block is None else f"{case.impl} {case.block[0]} x {case.block[1]}",
            f"{case.density:.3f}",
            *(_milliseconds(getattr(case, part)) for part in parts),
            *(_ratio(case, name) for name in baselines),
            "" if case.recall is None else f"{case.recall:.3f}",
            _small(case.error),
        ]
        for case in cases
    ]
    head = ["policy", "inputs", "kernel", "density", *(_PARTS[part] for part in parts)]
    over = [f"over {_LABELS[name]}" for name in baselines]
    return _table([*head, *over, "recall", "error"], rows)


def _left_out(skipped: Sequence[Skipped]) -> str:
    """One line per reason."""
    names: dict[str, list[str]] = {}
    for entry in skipped:
        names.setdefault(entry.reason, []).append(entry.name)
    shown = {
        reason: all_[0] if len(all_) == 1 else f"{all_[0]} and {len(all_) - 1} more"
        for reason, all_ in names.items()
    }
    return "\n".join(f"- not measured: {who}: {reason}" for reason, who in shown.items())


def _baselines(cases: Sequence[Measured]) -> list[str]:
    return [name for name in BASELINES if any(name in case.over for case in cases)]


def _ratio(case: Measured, name: str) -> str:
    return f"{case.over[name]:.2f}x" if name in case.over else ""


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1000:.3g}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
