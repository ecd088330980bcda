"""The result of a run: right answers, tokens used, where they come from. JSON both ways."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.answers.ask import Outcome, Used
from tubelet.bench.answers.settings import families
from tubelet.bench.fidelity.result import decode_scores, encode_scores
from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

SCHEMA = 1
KIND = "tubelet answers"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a reader has to know about a variant.

    Args:
        family: What it is a setting of.
        kind: Where it acts, see `settings.Kind`.
        keep: Wanted budget; None for dense and for what drops no tokens.
        setting: The recipes with their fields.
    """

    family: str
    kind: str
    keep: float | None
    setting: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one variant answered on one background.

    Args:
        right: [kinds, questions] 1 where the answer is right, 0 elsewhere.
        used: What it used, mean over questions.
        seconds: Per question.
    """

    right: Tensor
    used: Used
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All variants on the same questions about clips of one background.

    Args:
        background: What is behind the objects.
        parts: Numbers of the parts of the questions, in the order of the entries.
        entries: By variant; the same questions in the same places.
    """

    background: str
    parts: list[int]
    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One run, or the shards of one.

    Args:
        environment: Hardware, versions, commit, command.
        commands: Of all shards.
        model: Name, checksum, parameters of the language model and its encoder.
        precision: Of weights and activations.
        clips: Questions of each kind on each background.
        parts: In how many parts they are asked.
        wanted: Backgrounds of the whole run.
        kinds: Kinds of questions.
        chances: What the best guess is worth, by kind.
        first_seed: Generator seed of the first test clip.
        num_video: Video tokens of a clip.
        depth: Layers of the language model.
        quick: A smoke test: too few questions to conclude anything.
        variants: By name, dense first.
        cells: One per background.
        failures: Why a variant was not measured, by name.
        notes: Things a reader must know.
    """

    environment: dict[str, Any]
    commands: list[str]
    model: dict[str, Any]
    precision: str
    clips: int
    parts: int
    wanted: list[str]
    kinds: list[str]
    chances: dict[str, float]
    first_seed: int
    num_video: int
    depth: int
    quick: bool
    variants: dict[str, Line]
    cells: list[Cell] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def backgrounds(self) -> list[str]:
        """Backgrounds that were run, in order."""
        return [cell.background for cell in self.cells]

    @property
    def complete(self) -> bool:
        """Whether every part of the questions is there on every background."""
        there = {cell.background: len(cell.parts) for cell in self.cells}
        return all(there.get(background) == self.parts for background in self.wanted)

    def cell(self, background: str) -> Cell:
        """The cell of a background."""
        return next(cell for cell in self.cells if cell.background == background)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        plain["variants"] = {name: asdict(line) for name, line in self.variants.items()}
        plain["cells"] = [_plain(cell, self.kinds) for cell in self.cells]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Answers":
        """Inverse of `to_dict`."""
        parts = {
            "variants": {name: Line(**line) for name, line in data["variants"].items()},
            "cells": [_cell(cell, len(data["kinds"])) for cell in data["cells"]],
        }
        return cls(**{**data, **parts})


def entry_of(outcomes: Sequence[Outcome], sizes: Sequence[int], kinds: int) -> Entry:
    """An entry from the batches of a part, whose questions come kind after kind."""
    right = torch.cat([outcome.right for outcome in outcomes]).float().unflatten(0, (kinds, -1))
    return Entry(
        right=right,
        used=_mean_used([outcome.used for outcome in outcomes], sizes),
        seconds=_mean([outcome.seconds for outcome in outcomes], sizes),
    )


def merge_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one background become one, with the variants that all of them have.

    Raises:
        TubeletError: A part of the questions is there twice.
    """
    merged = []
    for background in dict.fromkeys(cell.background for cell in cells):
        mine = [cell for cell in cells if cell.background == background]
        parts = [part for cell in mine for part in cell.parts]
        if len(set(parts)) < len(parts):
            raise TubeletError(f"a part of the questions on {background} is in two files")
        shared = [n for n in mine[0].entries if all(n in cell.entries for cell in mine)]
        entries = {name: _merged([cell.entries[name] for cell in mine]) for name in shared}
        merged.append(Cell(background=background, parts=parts, entries=entries))
    return merged


def _merged(entries: Sequence[Entry]) -> Entry:
    sizes = [entry.right.numel() for entry in entries]
    return Entry(
        right=torch.cat([entry.right for entry in entries], dim=1),
        used=_mean_used([entry.used for entry in entries], sizes),
        seconds=_mean([entry.seconds for entry in entries], sizes),
    )


def _mean_used(used: Sequence[Used], sizes: Sequence[int]) -> Used:
    names = [name for name in Used.__dataclass_fields__ if getattr(used[0], name) is not None]
    return Used(**{name: _mean([getattr(u, name) for u in used], sizes) for name in names})


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def join(runs: Sequence[Answers]) -> Answers:
    """Shards of one run become one; runs of other recipes on the same questions stand beside it.

    Raises:
        TubeletError: They differ in model, questions or settings, hold the same questions twice, or
            answered differently where they measured the same.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("model", "precision", "clips", "wanted", "kinds", "first_seed"):
            if getattr(run, name) != getattr(first, name):
                raise TubeletError(f"two shards differ in their {name}; join shards of one run")
    groups: dict[tuple[str, ...], list[Answers]] = {}
    for run in runs:
        groups.setdefault(tuple(run.variants), []).append(run)
    wholes = [_shards(group) for group in groups.values()]
    notes = [note for whole in wholes for note in whole.notes]
    hardware = dict.fromkeys(whole.environment["hardware"] for whole in wholes)
    data = wholes[0].to_dict() | {
        "environment": {**first.environment, "hardware": " and ".join(hardware)},
        "commands": [command for whole in wholes for command in whole.commands],
        "variants": _in_order({n: asdict(line) for w in wholes for n, line in w.variants.items()}),
        "failures": {name: why for whole in wholes for name, why in whole.failures.items()},
        "notes": list(dict.fromkeys(notes)),
        "cells": [],
    }
    whole = Answers.from_dict(data)
    whole.cells.extend(_beside([cell for one in wholes for cell in one.cells]))
    return whole


def _in_order(variants: dict[str, Any]) -> dict[str, Any]:
    """Dense, then by family as one run has them, whichever file they came from."""
    order = {family: number for number, family in enumerate(["dense", *families()])}
    names = sorted(variants, key=lambda name: order.get(variants[name]["family"], len(order)))
    return {name: variants[name] for name in names}


def _shards(runs: Sequence[Answers]) -> Answers:
    """Runs of the same variants on other questions."""
    notes = [note for run in runs for note in run.notes] + _drift(runs)
    data = runs[0].to_dict() | {
        "commands": [command for run in runs for command in run.commands],
        "failures": {name: why for run in runs for name, why in run.failures.items()},
        "notes": list(dict.fromkeys(notes)),
        "cells": [],
    }
    whole = Answers.from_dict(data)
    whole.cells.extend(merge_cells([cell for run in runs for cell in run.cells]))
    return whole


def _beside(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of other variants on the same questions become one."""
    found: dict[str, Cell] = {}
    for cell in cells:
        whole = found.setdefault(
            cell.background, Cell(background=cell.background, parts=cell.parts)
        )
        if cell.parts != whole.parts:
            raise TubeletError(
                f"two runs of other recipes asked other questions on {cell.background}; join runs "
                "of the same recipes, or of the same questions"
            )
        for name, entry in cell.entries.items():
            known = whole.entries.setdefault(name, entry)
            differ = int((known.right != entry.right).sum())
            if differ:
                raise TubeletError(
                    f"two runs disagree about {differ} of {entry.right.numel()} answers of {name} "
                    f"on {cell.background}, so their other recipes cannot be compared"
                )
    return list(found.values())


def _drift(runs: Sequence[Answers]) -> list[str]:
    """Thresholds that rounding on a GPU let end elsewhere in another shard."""
    found = []
    for name in runs[0].variants:
        settings = {run.variants[name].setting: None for run in runs}
        if len(settings) > 1:
            found.append(f"{name} ran as {'; as '.join(settings)}, by shard")
    return found


def write_answers(path: str | os.PathLike[str], run: Answers) -> Path:
    """Write a run; the file appears whole or not at all."""
    data = {"kind": KIND, "schema": SCHEMA, "run": run.to_dict()}
    return write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_answers(path: str | os.PathLike[str]) -> Answers:
    """A run that `write_answers` wrote.

    Raises:
        TubeletError: The file is missing or is no such result.
    """
    wrong = f"{path} is not a result of `tubelet bench answers`"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if (data["kind"], data["schema"]) != (KIND, SCHEMA):
            raise TubeletError(wrong)
        return Answers.from_dict(data["run"])
    except OSError as error:
        raise TubeletError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TubeletError(wrong) from None


def _plain(cell: Cell, kinds: Sequence[str]) -> dict[str, Any]:
    entries = {}
    for name, entry in cell.entries.items():
        counts = [int(x) for x in entry.right.sum(1).tolist()]
        entries[name] = {
            "right": dict(zip(kinds, counts, strict=True)),
            "total": entry.right.shape[1],
            "used": {n: v for n, v in asdict(entry.used).items() if v is not None},
            "seconds": entry.seconds,
            "scores": encode_scores(entry.right.flatten()),
        }
    return {"background": cell.background, "parts": cell.parts, "entries": entries}


def _cell(data: dict[str, Any], kinds: int) -> Cell:
    entries = {
        name: Entry(
            right=decode_scores(entry["scores"]).unflatten(0, (kinds, -1)),
            used=Used(**entry["used"]),
            seconds=entry["seconds"],
        )
        for name, entry in data["entries"].items()
    }
    return Cell(background=data["background"], parts=data["parts"], entries=entries)
