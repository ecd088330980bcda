"""The comparison as columns, shared by terminal and page."""

from rich.table import Table

from tubelet.bench.generators.result import GeneratorComparison, Row
from tubelet.bench.table import wide_table

COLUMNS = {
    "variant": "what ran",
    "time": "seconds of the whole run, verification included",
    "attention": "share of the time inside attention calls, deciding included",
    "speed-up": "dense time / this time",
    "predicted": "speed-up predicted before the runs: Amdahl's law with the density, the speed "
    "per pair and the dense calls of a probe of two steps",
    "by density": "the same if each computed pair cost what it costs dense attention",
    "density": "share of the block pairs computed, mean over the sparse calls",
    "all calls": "the same over all calls; dense ones count as 100 %",
    "PSNR": "dB to the dense clip of the same seed; 100 is equal",
    "SSIM": "structural similarity to the dense clip",
    "latent error": "relative error of the last state of the sampler",
    "attributes": "share of the asked attributes that the detector finds",
    "call error": "relative error of verified sparse calls, mean (worst)",
    "recall": "share of the dense softmax that these calls compute",
    "dense calls": "attention calls that the recipe left dense",
}
"""Header and meaning."""

PAGE_ONLY = {"by density", "dense calls"}
"""Columns for which a terminal is too narrow."""


def cells(row: Row, found: GeneratorComparison) -> list[str]:
    """Texts of a row, in the order of `COLUMNS`."""
    prediction = row.prediction or {}
    error = None if row.error is None else f"{row.error:.2f} ({row.worst_error:.2f})"
    return [
        row.name,
        f"{row.seconds:.1f} s",
        f"{row.attention_share:.0%}",
        f"{found.speedup(row):.2f}x",
        _shown(prediction.get("speedup"), "{:.2f}x"),
        _shown(prediction.get("by_density"), "{:.2f}x"),
        _shown(row.density, "{:.1%}"),
        f"{row.computed:.1%}",
        f"{row.psnr:.1f}",
        f"{row.ssim:.3f}",
        f"{row.latent_error[-1]:.3f}",
        f"{row.attributes:.0%}",
        _shown(error, "{}"),
        _shown(row.recall, "{:.0%}"),
        str(row.dense_calls) if row.densities else "-",
    ]


def heading(found: GeneratorComparison) -> str:
    """What was drawn, in one line."""
    frames, height, width = found.clip
    return (
        f"“{found.prompt}”, {frames} frames of {height}x{width}, {found.tokens:,} tokens, "
        f"{found.steps} steps, guidance {found.guidance:g}, seed {found.seed}, {found.precision}, "
        f"{found.environment['hardware']}"
    )


def rich_table(found: GeneratorComparison) -> Table:
    """For the terminal."""
    rows = (cells(row, found) for row in found.rows)
    return wide_table(f"{found.model}: {heading(found)}", COLUMNS, rows, PAGE_ONLY)


def _shown(value: float | str | None, form: str) -> str:
    return "-" if value is None else form.format(value)
