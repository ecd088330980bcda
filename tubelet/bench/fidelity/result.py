"""The result of a run: scores per clip, latencies, where they come from. JSON both ways."""

import base64
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.fidelity.cells import Cell, Entry
from tubelet.bench.fidelity.timing import Latency
from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

SCHEMA = 1
KIND = "tubelet fidelity"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a reader has to know about a variant.

    Args:
        family: Line of the plot it belongs to.
        kind: "dense", "random", "baseline", "small", "oracle", "method" or "control".
        regime: "training-free" or "trained".
        keep: Wanted budget, None where none was asked for.
    """

    family: str
    kind: str
    regime: str
    keep: float | None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """One run of the bench with one set of trained models.

    Args:
        seed_name: Names the training seed of the models, so that runs can be joined.
        quick: A smoke test: too few clips to conclude anything.
        precision: Of weights and activations.
        clips: Test clips per cell.
        first_seed: Generator seed of the first of them.
        core_tasks: Tasks of the core score.
        models: Name, role, checksum and parameters of each model.
        environment: Hardware, versions, commit, command.
        variants: By name.
        cells: One per task and background.
        latencies: Of all variants but the controls.
        notes: Things a reader must know.
    """

    seed_name: str
    quick: bool
    precision: str
    clips: int
    first_seed: int
    core_tasks: tuple[str, ...]
    models: list[dict[str, Any]]
    environment: dict[str, Any]
    variants: dict[str, Line]
    cells: list[Cell] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cell(self, task: str, background: str) -> Cell | None:
        """The cell of a task and background."""
        wanted = (task, background)
        return next((c for c in self.cells if (c.task, c.background) == wanted), None)

    @property
    def tasks(self) -> list[str]:
        """Tasks that were run, in order."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def backgrounds(self) -> list[str]:
        """Backgrounds that were run, in order."""
        return list(dict.fromkeys(cell.background for cell in self.cells))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data of this run."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        plain["variants"] = {name: asdict(line) for name, line in self.variants.items()}
        plain["latencies"] = [asdict(latency) for latency in self.latencies]
        plain["core_tasks"] = list(self.core_tasks)
        plain["cells"] = [_plain_cell(cell) for cell in self.cells]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Fidelity":
        """Inverse of `to_dict`."""
        parts = {
            "core_tasks": tuple(data["core_tasks"]),
            "variants": {name: Line(**line) for name, line in data["variants"].items()},
            "latencies": [Latency(**latency) for latency in data["latencies"]],
            "cells": [_cell(cell) for cell in data["cells"]],
        }
        return cls(**{**data, **parts})


def write_runs(path: str | os.PathLike[str], runs: Sequence[Fidelity], summary: Any) -> Path:
    """Write runs with their derived figures; the file appears whole or not at all."""
    data = {
        "kind": KIND,
        "schema": SCHEMA,
        "summary": summary,
        "runs": [run.to_dict() for run in runs],
    }
    return write_whole(path, json.dumps(_finite(data), indent=1) + "\n")


def read_runs(path: str | os.PathLike[str]) -> list[Fidelity]:
    """The runs of a file that `write_runs` wrote.

    Raises:
        TubeletError: It is missing, or is no such file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if (data["kind"], data["schema"]) != (KIND, SCHEMA):
            raise TubeletError(
                f"{path} is {data['kind']!r} of schema {data['schema']}, wanted {KIND!r} of "
                f"{SCHEMA}"
            )
        return [Fidelity.from_dict(run) for run in data["runs"]]
    except OSError as error:
        raise TubeletError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TubeletError(f"{path} is not a result of this bench: {error}") from None


def join(runs: Sequence[Fidelity]) -> list[Fidelity]:
    """Shards of one run become one; runs of different seed names stay beside one another.

    Raises:
        TubeletError: Shards disagree about models or clips, or hold the same cell twice.
    """
    by_seed: dict[str, list[Fidelity]] = {}
    for run in runs:
        by_seed.setdefault(run.seed_name, []).append(run)
    joined = [_one_run(shards) for shards in by_seed.values()]
    first = _protocol(joined[0])
    for run in joined[1:]:
        if _protocol(run) != first:
            raise TubeletError(
                f"{run.seed_name} has other clips, tasks or backgrounds than "
                f"{joined[0].seed_name}; runs over seeds need the same"
            )
    return joined


def _protocol(run: Fidelity) -> tuple[Any, ...]:
    return run.clips, run.first_seed, sorted((cell.task, cell.background) for cell in run.cells)


def _one_run(shards: Sequence[Fidelity]) -> Fidelity:
    first = shards[0]
    cells: list[Cell] = []
    for shard in shards:
        for name in ("clips", "first_seed", "models", "precision"):
            if getattr(shard, name) != getattr(first, name):
                raise TubeletError(
                    f"two shards of seed {first.seed_name!r} have different {name}; give runs of "
                    "other models another --seed-name"
                )
        for cell in shard.cells:
            if any((c.task, c.background) == (cell.task, cell.background) for c in cells):
                raise TubeletError(
                    f"{cell.task} on {cell.background} is in two files of seed "
                    f"{first.seed_name!r}; give runs of other models another --seed-name"
                )
            cells.append(cell)
    order = {pair: i for i, pair in enumerate(dict.fromkeys((c.task, c.background) for c in cells))}
    cells.sort(key=lambda c: order[c.task, c.background])
    merged = first.to_dict() | {
        "variants": {n: asdict(v) for shard in shards for n, v in shard.variants.items()},
        "latencies": [
            asdict(x) for x in {_key(x): x for s in shards for x in s.latencies}.values()
        ],
        "notes": list(dict.fromkeys(note for shard in shards for note in shard.notes)),
        "cells": [],
    }
    whole = Fidelity.from_dict(merged)
    whole.cells.extend(cells)
    return whole


def _key(latency: Latency) -> tuple[str, str, int]:
    return latency.variant, latency.background, latency.batch


def _plain_cell(cell: Cell) -> dict[str, Any]:
    entries = {
        name: {
            "setting": entry.setting,
            "share": entry.share,
            "macs": entry.macs,
            "scores": encode_scores(entry.scores),
        }
        for name, entry in cell.entries.items()
    }
    return {
        "task": cell.task,
        "background": cell.background,
        "chance": cell.chance,
        "floors": cell.floors,
        "entries": entries,
    }


def _cell(data: dict[str, Any]) -> Cell:
    entries = {
        name: Entry(**{**entry, "scores": decode_scores(entry["scores"])})
        for name, entry in data["entries"].items()
    }
    return Cell(**{**data, "entries": entries})


def encode_scores(scores: Tensor) -> dict[str, Any]:
    """Per-clip scores as text: a bit each where all are 0 or 1, else 16 bits each."""
    binary = bool(((scores == 0) | (scores == 1)).all())
    if binary:
        padded = torch.zeros(-(-len(scores) // 8) * 8, dtype=torch.uint8)
        padded[: len(scores)] = scores.to(torch.uint8)
        places = 2 ** torch.arange(8, dtype=torch.uint8)
        raw = (padded.reshape(-1, 8) * places).sum(1).to(torch.uint8)
    else:
        raw = scores.half().view(torch.uint8)
    text = base64.b64encode(raw.numpy().tobytes()).decode()
    return {"num": len(scores), "bits": 1 if binary else 16, "data": text}


def decode_scores(data: dict[str, Any]) -> Tensor:
    """Inverse of `encode_scores`; float32."""
    raw = torch.frombuffer(bytearray(base64.b64decode(data["data"])), dtype=torch.uint8)
    if data["bits"] == 16:
        return raw.view(torch.float16).float()
    bits = (raw[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: data["num"]].float()


def _finite(data: Any) -> Any:
    """The same with null for NaN and infinities, which JSON has no words for."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
