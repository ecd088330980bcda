"""The result of a run, JSON both ways, and joining runs over shapes."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

SCHEMA = 1
KIND = "tubelet attention"

BASELINES = ("fa4", "sdpa", "flex")
"""Dense implementations that others are compared with: FlashAttention-4, torch's fused kernel
(cuDNN on Hopper and later), FlexAttention."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A case that was measured.

    Args:
        kind: "dense", "lists" (random block lists) or "policy" (the whole layer).
        shape: Name of the shape.
        name: Implementation, or the policy with its fields.
        impl: Implementation that ran.
        block: (query, key) block sizes in tokens; None for dense calls.
        density: Share of token pairs computed; of a causal call, of those that dense causal
            attention computes.
        seconds: Median; of a policy the whole layer: deciding, reordering, attention and inverse.
        samples: Timed runs in seconds.
        tflops: 4 x computed pairs x channels per second, in 1e12.
        over: Median of each dense implementation of the same turns, over `seconds`.
        kernel_error, lse_error: See `probe.Probe`.
        field: Of a policy: what queries and keys looked like; "random" for all other cases.
        error, recall: Of a policy, against dense attention; see `probe.Probe`.
        selection: Of a policy: seconds of deciding, from the second step of a run on.
        first: Of a policy in a generator: seconds of deciding at the first step.
        attention: Of a policy: seconds of the call with its plan, reordering included.
        reordering: Of a policy with an order: seconds of reordering and of the way back, alone.
    """

    kind: str
    shape: str
    name: str
    impl: str
    block: tuple[int, int] | None
    density: float
    seconds: float
    samples: list[float]
    tflops: float
    over: dict[str, float]
    kernel_error: float | None
    lse_error: float | None
    field: str = "random"
    error: float | None = None
    recall: float | None = None
    selection: float | None = None
    first: float | None = None
    attention: float | None = None
    reordering: float | None = None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A case that was not measured, and why."""

    shape: str
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttentionRun:
    """One run of `tubelet bench attention`.

    Args:
        environment: Hardware, versions, commit, command.
        precision: Of queries, keys and values.
        repeats: Timed runs per case, taking turns.
        seed: Of inputs and lists.
        quick: A smoke test: sizes too small to conclude anything.
        shapes: As in `Shape.to_dict`.
        cases: What was measured.
        skipped: What was not, with the reason.
        notes: Things a reader must know.
    """

    environment: dict[str, Any]
    precision: str
    repeats: int
    seed: int
    quick: bool
    shapes: list[dict[str, Any]] = field(default_factory=list)
    cases: list[Measured] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, shape: str, kind: str) -> list[Measured]:
        """Cases of a shape and kind."""
        return [case for case in self.cases if (case.shape, case.kind) == (shape, kind)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionRun":
        """Inverse of `to_dict`."""
        cases = [
            Measured(**{**case, "block": None if case["block"] is None else tuple(case["block"])})
            for case in data["cases"]
        ]
        skipped = [Skipped(**entry) for entry in data["skipped"]]
        return cls(**{**data, "cases": cases, "skipped": skipped})


def write_runs(path: str | os.PathLike[str], runs: Sequence[AttentionRun]) -> Path:
    """Write runs; the file appears whole or not at all."""
    data = {"kind": KIND, "schema": SCHEMA, "runs": [run.to_dict() for run in runs]}
    return write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_runs(path: str | os.PathLike[str]) -> list[AttentionRun]:
    """Runs that `write_runs` wrote.

    Raises:
        TubeletError: The file is missing or is no such result.
    """
    try:
        data = json.loads(Path(path).read_text())
        if (data["kind"], data["schema"]) != (KIND, SCHEMA):
            raise TubeletError(f"{path} is not a result of `tubelet bench attention`")
        return [AttentionRun.from_dict(run) for run in data["runs"]]
    except OSError as error:
        raise TubeletError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise TubeletError(f"{path} is not a result of `tubelet bench attention`") from None
