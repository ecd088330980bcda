"""The result of a run, JSON both ways, and joining runs."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

SCHEMA = 1
KIND = "tubelet llm"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The retained ratio in its four definitions, each a share of dense.

    Args:
        entering: Video tokens that enter the first layer of the language model.
        layers: Video tokens entering a layer, mean over the layers.
        operations: Operations of the language model up to the first token, text included.
        cache: Bytes of the key-value cache behind the prompt, text included.
    """

    entering: float
    layers: float
    operations: float
    cache: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the answer compares with that of the dense model of the same run.

    Args:
        kl: KL(dense || this) of the first token's distribution, in nats.
        first: The most likely first token is the same.
        match: Leading tokens of the greedy answer that are the same, as a share of its length.
    """

    kl: float
    first: bool
    match: float


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Prompts answered by batched `generate`.

    Args:
        concurrency: Prompts that wait for an answer.
        together: Of them in a batch: all, or the largest equal part that memory allows, one part
            behind the other. None where not even one fits.
        seconds: Until all are answered; None where it failed.
        requests: Prompts per second.
        tokens: Answer tokens per second.
        over_dense: `requests` over those of the dense model; None where either failed.
        error: Why there is no figure.
    """

    concurrency: int
    together: int | None = None
    seconds: float | None = None
    requests: float | None = None
    tokens: float | None = None
    over_dense: float | None = None
    error: str | None = None


@dataclass(kw_only=True)
class Row:
    """One variant; figures are None where it failed, `error` says why.

    Args:
        name: The recipes as text, "dense" for the reference.
        recipes: Their fields.
        tokens_per_layer: Tokens of the prompt, text included, entering each layer.
        density: Share of causal attention that sparse prefill computes, mean over its layers; None
            without one.
        kept: See `Kept`.
        work: Operations up to the first token; see `Work`.
        bound: Largest speed-up to the first token that the operations allow, computed before
            anything was timed.
        first_samples, dense_samples: Seconds to the first token, of this variant and of the dense
            model in the same turns.
        first: Median seconds to the first token.
        split: Medians of its parts; see `Split`.
        dense_split: Those of the dense model in the same turns.
        speedup: Dense over this, to the first token.
        decode: Answer tokens per second behind the first.
        decode_speedup: Over the dense model's in the same turns.
        cache_bytes: Of the key-value cache behind the prompt.
        memory: Peak bytes allocated up to the first token, above model and inputs.
        agreement: See `Agreement`.
        throughput: One entry per concurrency.
        report: What the recipes did.
        error: Why it was not measured.
    """

    name: str
    recipes: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_layer: list[float] = field(default_factory=list)
    density: float | None = None
    kept: Kept | None = None
    work: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    first_samples: list[float] = field(default_factory=list)
    dense_samples: list[float] = field(default_factory=list)
    first: float | None = None
    split: dict[str, float] = field(default_factory=dict)
    dense_split: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None
    decode: float | None = None
    decode_speedup: float | None = None
    cache_bytes: int | None = None
    memory: int | None = None
    agreement: Agreement | None = None
    throughput: list[Throughput] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def of_bound(self) -> float | None:
        """Measured speed-up as a share of the bound."""
        return None if self.speedup is None or self.bound is None else self.speedup / self.bound

    @property
    def prefill_speedup(self) -> float | None:
        """The same without what the host and `generate` do around the two models in a dense answer;
        what a recipe adds to that counts."""
        if not self.split or not self.dense_split:
            return None
        around = self.dense_split["prompt"]
        return (self.dense_split["total"] - around) / (self.split["total"] - around)

    @property
    def prefill_of_bound(self) -> float | None:
        """`prefill_speedup` as a share of the bound."""
        if self.prefill_speedup is None or self.bound is None:
            return None
        return self.prefill_speedup / self.bound

    @property
    def plan_share(self) -> float | None:
        """Deciding (scores and selection) as a share of this variant's time to the first token."""
        return self.split["plan"] / self.split["total"] if self.split else None

    @property
    def overhead(self) -> float | None:
        """All that a recipe adds outside of the language model (statistics of the vision tower,
        deciding, gathering), as a share of the same time; noise may make it negative."""
        if not self.split or not self.dense_split:
            return None
        added = sum(self.split[n] - self.dense_split[n] for n in ("vision", "plan", "prompt"))
        return added / self.split["total"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with what follows from the figures."""
        derived = ("of_bound", "prefill_speedup", "prefill_of_bound", "plan_share", "overhead")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Row":
        """Inverse of `to_dict`."""
        known = {name: data[name] for name in cls.__dataclass_fields__}
        known["kept"] = None if data["kept"] is None else Kept(**data["kept"])
        known["agreement"] = None if data["agreement"] is None else Agreement(**data["agreement"])
        known["throughput"] = [Throughput(**entry) for entry in data["throughput"]]
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class LLMRun:
    """One run of `tubelet bench llm`; `rows[0]` is dense.

    Args:
        environment: Hardware, versions, commit, command.
        model: Name of the preset, or of the folder.
        random_weights: The weights were never trained.
        parameters, layers: Of the model; layers of its language model.
        grid: Video tokens (frames, height, width).
        input: The video in words.
        video_tokens, prompt_tokens: Of one prompt.
        new_tokens: Of an answer, behind its first token.
        precision: Of the weights.
        attention: Implementations of language model and vision tower, dense or not.
        decode_video: Seconds to read and resize the clip file; None for a rendered one.
        repeats: Timed runs of each kind, in turns with dense.
        seed: Of weights, clips and words.
        quick: A smoke test: sizes too small to conclude anything.
        rows: The variants.
        notes: Things a reader must know.
    """

    environment: dict[str, Any]
    model: str
    random_weights: bool
    parameters: int
    layers: int
    grid: list[int]
    input: str
    video_tokens: int
    prompt_tokens: int
    new_tokens: int
    precision: str
    attention: dict[str, str]
    decode_video: float | None
    repeats: int
    seed: int
    quick: bool
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Row:
        """The reference."""
        return self.rows[0]

    @property
    def concurrencies(self) -> list[int]:
        """Batches that were tried."""
        return [entry.concurrency for entry in self.dense.throughput]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**plain, "rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LLMRun":
        """Inverse of `to_dict`."""
        return cls(**{**data, "rows": [Row.from_dict(row) for row in data["rows"]]})


def write_runs(path: str | os.PathLike[str], runs: Sequence[LLMRun]) -> Path:
    """Write runs; the file appears whole or not at all."""
    data = {"kind": KIND, "schema": SCHEMA, "runs": [run.to_dict() for run in runs]}
    return write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def merged(runs: Sequence[LLMRun]) -> list[LLMRun]:
    """Shards of one measurement as one run: those that differ only in command, rows and notes.

    The first dense row stays; ratios of the others are to the dense row of their own process.
    """
    groups: list[list[LLMRun]] = []
    for run in runs:
        same = next((group for group in groups if _setting(group[0]) == _setting(run)), None)
        groups.append([run]) if same is None else same.append(run)
    return [_one(group) for group in groups]


def _setting(run: LLMRun) -> dict[str, Any]:
    """All that two runs must share to be shards of one."""
    own = {name: value for name, value in run.to_dict().items() if name not in ("rows", "notes")}
    where = {name: value for name, value in run.environment.items() if name != "command"}
    return own | {"environment": where, "concurrencies": run.concurrencies}


def _one(group: Sequence[LLMRun]) -> LLMRun:
    if len(group) == 1:
        return group[0]
    first = group[0]
    commands = dict.fromkeys(run.environment["command"] for run in group)
    notes = dict.fromkeys(note for run in group for note in run.notes)
    note = (
        f"measured by {len(group)} processes, each on a device of its own; ratios are to the dense "
        "model of the same process, of which the first is shown"
    )
    return replace(
        first,
        environment={**first.environment, "command": "; ".join(commands)},
        rows=[first.dense, *(row for run in group for row in run.rows[1:])],
        notes=[*notes, note],
    )


def read_runs(path: str | os.PathLike[str]) -> list[LLMRun]:
    """Runs that `write_runs` wrote.

    Raises:
        TubeletError: The file is missing or is no such result.
    """
    wrong = f"{path} is not a result of `tubelet bench llm`"
    try:
        data = json.loads(Path(path).read_text())
        if (data["kind"], data["schema"]) != (KIND, SCHEMA):
            raise TubeletError(wrong)
        return [LLMRun.from_dict(run) for run in data["runs"]]
    except OSError as error:
        raise TubeletError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise TubeletError(wrong) from None
