"""What a comparison on a generator found, as data."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tubelet.core.files import write_whole

SCHEMA = 1
KIND = "tubelet compare, generator"

Densities = list[list[list[float] | None]]
"""Block densities by layer, step and head; None where the call was dense."""


@dataclass(kw_only=True)
class Row:
    """One variant.

    Args:
        name: The recipes as text; "dense" for the reference.
        recipes: Their fields.
        seconds: The whole run.
        step_seconds: Each step.
        attention_seconds: Inside the attention calls of the run, deciding included.
        psnr, ssim: Of the clip to the dense clip of the same seed, dB and [-1, 1].
        latent_error: ||x - x_dense|| / ||x_dense|| after each step.
        attributes: Share of the asked attributes that the detector finds.
        found: All it finds, in words.
        densities: Of every attention call; empty for dense.
        error, worst_error, recall: Mean and largest relative error of the verified calls, and
            the mean share of the softmax that they compute where it is known; None without any.
        prediction: Of the speed-up, made before any run was timed; see `Prediction`.
        fallbacks: Reasons and counts of dense calls.
        kernels: Which recipe ran how often on what implementation.
    """

    name: str
    recipes: list[dict[str, Any]]
    seconds: float
    step_seconds: list[float]
    attention_seconds: float
    psnr: float
    ssim: float
    latent_error: list[float]
    attributes: float
    found: str
    densities: Densities = field(default_factory=list)
    error: float | None = None
    worst_error: float | None = None
    recall: float | None = None
    prediction: dict[str, float] | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def attention_share(self) -> float:
        """Of attention in the seconds of the run."""
        return self.attention_seconds / self.seconds

    @property
    def by_step(self) -> list[list[float | None]]:
        """Density by layer and step, mean over heads; None is dense."""
        return [[None if h is None else _mean(h) for h in layer] for layer in self.densities]

    @property
    def by_head(self) -> list[list[float | None]]:
        """Density by layer and head, mean over the sparse steps; None where none was sparse."""
        heads = max((len(h) for layer in self.densities for h in layer if h), default=0)
        return [
            [_mean([h[head] for h in layer if h is not None]) for head in range(heads)]
            for layer in self.densities
        ]

    @property
    def density(self) -> float | None:
        """Mean over the sparse calls; None without any."""
        return _mean([d for layer in self.by_step for d in layer if d is not None])

    @property
    def dense_calls(self) -> int:
        """Attention calls that the recipes left dense."""
        return sum(call is None for layer in self.densities for call in layer)

    @property
    def computed(self) -> float:
        """Mean over all calls, dense ones counting as 1."""
        found = _mean([1.0 if d is None else d for layer in self.by_step for d in layer])
        return 1.0 if found is None else found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with what follows from the figures."""
        derived = ("attention_share", "density", "computed", "dense_calls", "by_step", "by_head")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True, kw_only=True)
class GeneratorComparison:
    """A whole comparison; `rows[0]` is dense.

    Args:
        model, sha256: The network.
        prompt: What was asked for, completed.
        clip: Frames, height, width.
        tokens: Of the clip.
        steps, guidance, seed: Of the sampler.
        precision: Of all variants.
        environment: Hardware, versions, commit, command.
        rows: The variants.
        notes: Things a reader must know.
    """

    model: str
    sha256: str
    prompt: str
    clip: list[int]
    tokens: int
    steps: int
    guidance: float
    seed: int
    precision: str
    environment: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def speedup(self, row: Row) -> float:
        """Dense seconds over those of the row."""
        return self.rows[0].seconds / row.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rows = [{**row.to_dict(), "speedup": self.speedup(row)} for row in self.rows]
        return {"kind": KIND, "schema": SCHEMA, **plain, "rows": rows}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the figures; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
