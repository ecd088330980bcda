"""What a training run is told, and the learning rate and seeds that follow from it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

SEED_LIMIT = 2**40
"""Batch seeds of training stay below; seeds from here on are reserved for testing."""

MEASURING_RAMP = 1000
"""Steps in which the rate would rise to its peak while the number of steps is not known yet."""

FREE_ON_RESUME = frozenset({"device", "compile", "log_every", "checkpoint_minutes", "eval_every"})
"""Fields that may differ between a checkpoint and the run that resumes it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; saved as JSON beside its weights.

    Args:
        minutes: Wall-clock budget of the training itself, in minutes; compilation and evaluation
            are not counted. The number of steps is fixed once the speed is measured. Exactly one
            of `minutes` and `steps` is given.
        steps: Exact number of optimiser steps.
        batch: Clips per step and process; with N processes a step sees N x batch clips.
        learning_rate: Peak learning rate, > 0.
        weight_decay: Decoupled decay of weight matrices, >= 0. Biases, norms, embeddings and
            other tables are never decayed.
        betas: AdamW's two decay rates, each in [0, 1).
        warmup: Share of the steps, in [0, 1), in which the rate rises linearly to its peak.
        final_ratio: Learning rate of the last step as a share of the peak, in [0, 1].
        ema: Decay per step of the weights' moving average, in (0, 1), or None for no average.
            Early steps use min(ema, (1 + t) / (10 + t)), so that the start is forgotten.
        clip_norm: Largest L2 norm of all gradients together, > 0.
        precision: "bf16" runs the loss under autocast, weights stay fp32; "fp32" does not.
        compile: Compile the objective with torch.compile.
        seed: Any integer in [0, 2**63); decides batches and noise, not the initial weights.
        device: "cpu", "cuda" or "cuda:N". Of several processes each takes its own GPU.
        log_every: Steps between log lines. The loop waits for the device only there.
        checkpoint_minutes: Least minutes between checkpoints, >= 0; they are written at log
            lines, 0 means at each one.
        eval_every: Steps between evaluations, or None for one at the end only.

    Raises:
        TubeletError: A value outside its range; the message names the field.
    """

    minutes: float | None = None
    steps: int | None = None
    batch: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.03
    final_ratio: float = 0.01
    ema: float | None = 0.999
    clip_norm: float = 1.0
    precision: str = "bf16"
    compile: bool = False
    seed: int = 0
    device: str = "cpu"
    log_every: int = 50
    checkpoint_minutes: float = 5.0
    eval_every: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise TubeletError("give either minutes or steps, and not both")
        if self.minutes is not None:
            self._number("minutes", above=0)
        if self.steps is not None:
            self._whole("steps", 1)
        self._whole("batch", 1)
        self._whole("seed", 0, 2**63 - 1)
        self._whole("log_every", 1)
        if self.eval_every is not None:
            self._whole("eval_every", 1)
        self._number("learning_rate", above=0)
        self._number("clip_norm", above=0)
        self._number("weight_decay", least=0)
        self._number("checkpoint_minutes", least=0)
        self._number("warmup", least=0, below=1)
        self._number("final_ratio", least=0, most=1)
        if self.ema is not None:
            self._number("ema", above=0, below=1)
        self._betas()
        if self.precision not in ("bf16", "fp32"):
            raise TubeletError(f"precision is {self.precision!r}; use 'bf16' or 'fp32'")
        if not isinstance(self.compile, bool):
            raise TubeletError(f"compile is {self.compile!r}; use True or False")
        _device_type(self.device)

    def _betas(self) -> None:
        pair = tuple(self.betas) if isinstance(self.betas, (list, tuple)) else ()
        if len(pair) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in pair):
            raise TubeletError(f"betas is {self.betas!r}; give two numbers in [0, 1)")
        # JSON has lists only; a config read back must equal the one that was written.
        object.__setattr__(self, "betas", pair)

    def _whole(self, name: str, least: int, most: float = math.inf) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            limit = "" if most == math.inf else f" and at most {most}"
            raise TubeletError(
                f"{name} is {value!r}; give a whole number of at least {least}{limit}"
            )

    def _number(self, name, *, above=-math.inf, least=-math.inf, most=math.inf, below=math.inf):
        value = getattr(self, name)
        fits = _is_number(value) and above < value < below and least <= value <= most
        if not fits:
            limits = (("above", above), ("at least", least), ("at most", most), ("below", below))
            allowed = " and ".join(
                f"{word} {bound}" for word, bound in limits if abs(bound) < 1e300
            )
            raise TubeletError(f"{name} is {value!r}; give a number {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrainConfig":
        """Inverse of `to_dict`.

        Raises:
            TubeletError: An unknown or missing field, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise TubeletError(f"unknown training fields {unknown}; known: {', '.join(known)}")
        if "batch" not in data:
            raise TubeletError("a training configuration needs the field batch")
        return cls(**data)

    def to_json(self, path: Path) -> Path:
        """Write the fields; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")


@dataclass(frozen=True)
class Schedule:
    """How many steps a run has.

    Args:
        total: Number of steps; None while the speed is still being measured.
        measured: Steps that were made before `total` was known.
    """

    total: int | None
    measured: int = 0


def learning_rate(config: TrainConfig, schedule: Schedule, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then half a cosine down to the final ratio.

    Steps that measure the speed rise by 1 / `MEASURING_RAMP` of the peak each, never above it;
    the warm-up then goes on from there and lasts at least as many steps again.
    """
    if schedule.total is None or step < schedule.measured:
        return config.learning_rate * _measuring_ratio(step)
    total, begin = schedule.total, schedule.measured
    warm = min(max(math.ceil(config.warmup * total), 2 * begin), total)
    if step < warm:
        start = _measuring_ratio(begin - 1) if begin else 0.0
        return config.learning_rate * (start + (1 - start) * (step + 1 - begin) / (warm - begin))
    done = (step + 1 - warm) / max(total - warm, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * cosine)


def batch_seed(seed: int, rank: int, step: int) -> int:
    """Seed of the batch and noise of one step of one process, in [0, 2**40).

    The three numbers go one after the other through the finaliser of SplitMix64, and the top 40
    bits are kept. Two steps may collide (chance 2**-40 a pair); none meets a test seed.

    Source:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = 0
    for part in (seed, rank, step):
        state = _scramble((state ^ part) + 0x9E3779B97F4A7C15)
    return state >> 24


def _scramble(value: int) -> int:
    mask = 2**64 - 1
    value &= mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


def _measuring_ratio(step: int) -> float:
    return min((step + 1) / MEASURING_RAMP, 1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _device_type(device: str) -> str:
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        raise TubeletError(f"device is {device!r}; use cpu, cuda or cuda:N") from None
