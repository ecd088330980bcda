"""Figures of drawn clips against the dense run, and the label that follows from them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.quality import Interval, bootstrap
from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

SCHEMA = 1
KIND = "tubelet generation"
FILES = ("generation.json", "generation.html", "generation.md")

FIGURES = {
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "latent_error": "relative error of the last state",
    "flicker": "flicker score minus that of dense; above 0 is stiller",
    "motion_ratio": "motion energy over that of dense",
    "sharpness_ratio": "high-frequency energy over that of dense",
    "attributes": "share of the asked attributes that are found in the clip",
    "attributes_to_dense": "the same minus that of dense",
}
"""What is measured of every pair."""

WORSE_ABOVE = frozenset({"latent_error"})
"""Figures whose bad end is the high one."""

EXACT, ROUNDING, LOSSY = "exact", "lossless to rounding", "lossy"


@dataclass(kw_only=True)
class Outcome:
    """One way of drawing, compared with the dense run pair by pair.

    Args:
        name, kind: Of the way.
        calls: Velocities per clip.
        seconds: Per clip, whole batches.
        exact: Every last state equals the dense one bit for bit.
        figures: A value per pair, by the keys of `FIGURES`.
        label: "exact", "lossless to rounding" or "lossy".
        density: Mean share of the block pairs of sparse attention calls; None without any.
    """

    name: str
    kind: str
    calls: int
    seconds: float
    exact: bool
    figures: dict[str, list[float]]
    label: str = ""
    density: float | None = None

    def middle(self, figure: str) -> Interval:
        """Median over pairs with its bootstrap interval; of shares the mean."""
        share = figure.startswith("attributes")
        return self._statistic(figure, _mean if share else _median)

    def bad_end(self, figure: str) -> Interval:
        """5th percentile over pairs (95th where high is bad) with its bootstrap interval."""
        level = 0.95 if figure in WORSE_ABOVE else 0.05
        return self._statistic(figure, lambda x: x.quantile(level, dim=-1))

    def _statistic(self, figure: str, statistic: Any) -> Interval:
        values = torch.tensor(self.figures[figure], dtype=torch.float64)
        return bootstrap(values[values.isfinite()], statistic, seed=0, resamples=1000)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived figures."""
        derived = {
            name: {"middle": asdict(self.middle(name)), "bad_end": asdict(self.bad_end(name))}
            for name in FIGURES
        }
        return {**asdict(self), "derived": derived}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A whole run.

    Args:
        model, sha256: The network.
        pairs: Clips drawn in every way.
        clip: Frames, height, width.
        guidance: Of the sampler.
        precision: Of the reference.
        quick: A smoke test.
        environment: Hardware, versions, commit, command.
        outcomes: The reference first.
        notes: Things a reader must know.
    """

    model: str
    sha256: str
    pairs: int
    clip: list[int]
    guidance: float
    precision: str
    quick: bool
    environment: dict[str, Any]
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        plain["outcomes"] = [outcome.to_dict() for outcome in self.outcomes]
        return {"kind": KIND, "schema": SCHEMA, **plain}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the figures; the file appears whole or not at all."""
        return write_whole(path, json.dumps(_finite(self.to_dict()), indent=1) + "\n")


def read_generation(path: str | os.PathLike[str]) -> Generation:
    """A result that `Generation.to_json` wrote.

    Raises:
        TubeletError: The file is missing or is not such a result.
    """
    try:
        data = json.loads(Path(path).read_text())
        if (data.pop("kind"), data.pop("schema")) != (KIND, SCHEMA):
            raise ValueError("another kind or schema")
        outcomes = [
            Outcome(**{key: value for key, value in item.items() if key != "derived"})
            for item in data.pop("outcomes")
        ]
        return Generation(outcomes=outcomes, **data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TubeletError(f"{path} is not a result of tubelet bench generation: {error}") from None


def label_of(outcome: Outcome, floor: Sequence[Outcome]) -> str:
    """The label by rule.

    "exact": every last state equals the dense one bit for bit. "lossless to rounding": the worst
    pair is no farther from dense than the worst pair of the noise floor, which is dense with
    another kernel or precision. "lossy": anything else.
    """
    if outcome.exact:
        return EXACT
    allowed = max((max(other.figures["latent_error"]) for other in floor), default=0.0)
    return ROUNDING if max(outcome.figures["latent_error"]) <= allowed else LOSSY


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5, dim=-1)


def _mean(values: Tensor) -> Tensor:
    return values.mean(-1)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
