"""One training run from request to weights: what `tubelet train` does."""

import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tubelet.core.errors import TubeletError, UnsupportedError
from tubelet.models.load import checked_device
from tubelet.nn.weights import read_card
from tubelet.train.config import TrainConfig
from tubelet.train.distributed import open_world
from tubelet.train.jobs import Job, Setup, job, save
from tubelet.train.loop import train

Progress = Callable[[str, int, int], None]

QUICK_MINUTES = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What was asked for; None takes the job's own value. See `tubelet train --help`."""

    what: str
    out: Path
    minutes: float | None = None
    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    init: str | None = None
    size: int | None = None
    seed: int = 0
    device: str = "cuda"
    quick: bool = False
    compile: bool = False
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it.

    Args:
        steps: Steps made.
        scores: Evaluation with the averaged weights.
        files: Weights and log.
        first: Whether this is the process that wrote them.
    """

    steps: int
    scores: dict[str, float]
    files: tuple[Path, ...] = ()
    first: bool = True
    record: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"steps": self.steps, "scores": self.scores, "files": [str(f) for f in self.files]}


def run_training(request: TrainRequest, progress: Progress) -> Outcome:
    """Train a job and write its weights.

    Raises:
        TubeletError: Unknown job, missing device, settings out of range, a folder that cannot be
            written, or training that failed; the last good checkpoint survives.
    """
    entry = job(request.what)
    _check_device(request, entry)
    config = _config(request, entry)
    init = request.init
    if init is None and not request.quick:
        init = entry.init
    with open_world(request.device) as world:
        setup = Setup(
            device=world.device,
            seed=request.seed,
            batch=config.batch,
            init=init,
            size=request.size,
            quick=request.quick,
        )
        objective = entry.build(setup)
        # Read now: the run may write over the file that it started from.
        before = None if init is None else read_card(init).record
        started = time.time()
        result = train(objective, config, request.out, resume=request.resume, progress=progress)
        record = {
            "command": "tubelet " + " ".join(sys.argv[1:]),
            "job": entry.name,
            "seed": request.seed,
            "init": None if init is None else Path(init).name,
            "steps": result.steps,
            "training_minutes": round(result.seconds / 60, 2),
            "wall_minutes": round((time.time() - started) / 60, 2),
            "processes": world.size,
            "hardware": _hardware(world.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "clips_per_second": round(result.samples_per_second, 1),
            "config": config.to_dict(),
            "scores": {name: _rounded(value) for name, value in result.metrics.items()},
            "curve": result.curve,
        }
        if hasattr(objective, "notes"):
            record["notes"] = objective.notes
        if init is not None:
            record["before"] = before
        files = save(entry, objective.model, request.out, record) if world.first else []
        return Outcome(
            steps=result.steps,
            scores=result.metrics,
            files=(*files, request.out / "log.jsonl"),
            first=world.first,
            record=record,
        )


def _config(request: TrainRequest, entry: Job) -> TrainConfig:
    minutes, rate = request.minutes, request.learning_rate
    if minutes is None and request.steps is None:
        minutes = QUICK_MINUTES if request.quick else entry.minutes
    batch = entry.quick_batch if request.quick else entry.batch
    return TrainConfig(
        minutes=minutes,
        steps=request.steps,
        batch=batch if request.batch is None else request.batch,
        learning_rate=entry.learning_rate if rate is None else rate,
        ema=0.98 if request.quick else entry.ema,
        precision="bf16" if request.device.startswith("cuda") else "fp32",
        compile=request.compile,
        seed=request.seed,
        device=request.device,
    )


def _check_device(request: TrainRequest, entry: Job) -> None:
    try:
        checked_device(request.device)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error}. {entry.name} takes about {entry.minutes:g} minutes on one H200; on a CPU "
            "try --device cpu --quick, which trains a much smaller model"
        ) from None
    if request.device == "cpu" and not request.quick and request.steps is None:
        raise TubeletError(
            f"{entry.name} takes about {entry.minutes:g} minutes on one H200 and days on a CPU; "
            "add --quick for a much smaller model, or --steps for an exact count"
        )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
