"""Figures of drawn clips against the dense run, and the label that follows from them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

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

Kind = Literal["reference", "floor", "control", "recipe", "curve", "compensated"]
"""What a way is: the dense run, its noise floor, a control, or recipes on the model."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order of a result."""

COMMON = ("reference", "floor", "control")
"""Kinds that different runs may share."""

SHARED = ("model", "sha256", "pairs", "clip", "guidance", "precision", "quick", "dense_steps")
"""Fields that the parts of one result have in common."""

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
        computed: The same of all attention calls: dense ones count whole, and so does what terms
            of compensation add; None without any sparse call.
        recipes: What was on the model, as `Recipe.to_dict` gives it.
        kernels: Implementations that computed the sparse calls.
    """

    name: str
    kind: Kind
    calls: int
    seconds: float
    exact: bool
    figures: dict[str, list[float]]
    label: str = ""
    density: float | None = None
    computed: float | None = None
    recipes: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

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

    @cached_property
    def derived(self) -> dict[str, Any]:
        """Statistics of all figures; kept, since a run writes its file after every way."""
        return {
            name: {"middle": asdict(self.middle(name)), "bad_end": asdict(self.bad_end(name))}
            for name in FIGURES
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived figures."""
        return {**asdict(self), "derived": self.derived}


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
        dense_steps: Warm-up that all curves have in common; None without curves.
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
    dense_steps: float | None = None

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
        outcomes = [_outcome(item) for item in data.pop("outcomes")]
        return Generation(outcomes=outcomes, **data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TubeletError(f"{path} is not a result of tubelet bench generation: {error}") from None


def join(shards: Sequence[Generation]) -> Generation:
    """One result from shards, or from runs of different ways.

    Every shard compares with a dense reference that it drew itself from the same noise; that of
    the first one stays, and so do its floor and controls where several have them.

    Raises:
        TubeletError: Shards differ in what they drew, or hold the same recipes twice.
    """
    first, outcomes = shards[0], list(shards[0].outcomes)
    for shard in shards[1:]:
        for name, (ours, theirs) in _protocols(first, shard).items():
            if ours != theirs:
                raise TubeletError(f"the files have different {name}: {ours} and {theirs}")
        names = {outcome.name for outcome in outcomes}
        for outcome in shard.outcomes:
            if outcome.name not in names:
                outcomes.append(outcome)
            elif outcome.kind not in COMMON:
                raise TubeletError(f"{outcome.name} is in two of the files")
    outcomes.sort(key=lambda outcome: KINDS.index(outcome.kind))
    label_all(outcomes)
    notes = list(dict.fromkeys(note for shard in shards for note in shard.notes))
    return replace(first, outcomes=outcomes, notes=notes)


def _protocols(one: Generation, other: Generation) -> dict[str, tuple[Any, Any]]:
    """What the parts of one result have in common, of two of them."""
    same = {name: (getattr(one, name), getattr(other, name)) for name in SHARED}
    same["reference"] = (one.outcomes[0].name, other.outcomes[0].name)
    same["hardware"] = (one.environment["hardware"], other.environment["hardware"])
    return same


def label_all(outcomes: Sequence[Outcome]) -> None:
    """Label every outcome by the noise floor among them."""
    floor = [outcome for outcome in outcomes if outcome.kind == "floor"]
    for outcome in outcomes:
        outcome.label = label_of(outcome, floor)


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


def _outcome(data: dict[str, Any]) -> Outcome:
    kept = {key: value for key, value in data.items() if key != "derived"}
    # JSON has null where a figure was not finite.
    kept["figures"] = {
        name: [math.nan if value is None else value for value in values]
        for name, values in kept["figures"].items()
    }
    return Outcome(**kept)


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
