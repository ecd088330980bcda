"""The result of a comparison: rows for people, JSON for machines."""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tubelet.core.files import write_whole

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of a model on one clip.

    Args:
        name: The recipe as text, or "dense".
        latency: Median seconds of a forward pass.
        samples: All timed seconds.
        speedup: Dense latency / this latency.
        ceiling: Speed-up when the same token counts are merely sliced off; None if not measured.
        tokens_per_layer: Mean tokens per sample entering each layer.
        macs: Multiply-accumulates of a forward pass.
        memory: Peak bytes of tensors alive.
        cosine: Cosine similarity of the outputs with the dense ones, mean over samples.
        top1: Share of samples whose highest output is the dense one's; None without logits.
        accuracy: Share of samples answered rightly; None where the answer is not known.
        error: Relative error |out - dense| / |dense|.
        report: What the recipe did, from `Handle.report`.
    """

    name: str
    latency: float
    samples: list[float]
    speedup: float
    ceiling: float | None
    tokens_per_layer: list[float]
    macs: int
    memory: int
    cosine: float
    top1: float | None
    error: float
    accuracy: float | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def of_ceiling(self) -> float | None:
        """Measured speed-up as a share of the ceiling."""
        return None if self.ceiling is None else self.speedup / self.ceiling

    @property
    def overhead(self) -> float | None:
        """Scoring and merging, as a share of the dense latency."""
        return None if self.ceiling is None else 1 / self.speedup - 1 / self.ceiling

    @property
    def mean_tokens(self) -> float:
        """Tokens entering a layer, mean over layers."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Dense first, then each recipe, on the same input in one process.

    Args:
        model: Name of the model.
        random_weights: The weights were never trained, so outputs mean nothing.
        input: What went in, in words.
        dtype: Precision.
        repeats: Timed runs per variant.
        environment: Hardware, versions, commit, command.
        rows: Dense, then the recipes.
        notes: Things a reader must know.
    """

    model: str
    random_weights: bool
    input: str
    dtype: str
    repeats: int
    environment: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Row:
        """The baseline."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, with derived figures."""
        data = {"schema": SCHEMA, **asdict(self)}
        for row, plain in zip(self.rows, data["rows"], strict=True):
            plain["mean_tokens"] = row.mean_tokens
            plain["of_ceiling"] = row.of_ceiling
            plain["overhead"] = row.overhead
        return data

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the figures; the file appears whole or not at all."""
        return write_whole(path, json.dumps(_finite(self.to_dict()), indent=2) + "\n")

    def to_html(self, path: str | os.PathLike[str], pictures: Any = None) -> Path:
        """Write one self-contained page; see `bench.html`."""
        from tubelet.bench.html import render_page

        return write_whole(path, render_page(self, pictures))

    def table(self) -> str:
        """Plain-text table."""
        from tubelet.bench.table import text_table

        return text_table(self)


def _finite(data: Any) -> Any:
    """The same data with null for NaN and infinities, which JSON has no words for."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
