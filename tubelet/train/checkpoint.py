"""Checkpoints: everything a run needs to go on bit for bit, in one file, whole or not at all."""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import ModelError
from tubelet.train.config import FREE_ON_RESUME

FILE = "checkpoint.pt"
MAGIC = b"tubelet checkpoint 1\n"
"""First bytes of the file, with the version; then a SHA-256, then what torch.save writes."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run after `step` steps.

    Args:
        step: Steps done.
        total: Steps that the learning rate is laid out for.
        end: Step at which the run ends; before `total` only if its time was over.
        measured: Steps done before the total was known.
        seconds: Training time so far.
        timed_steps: Steps that `seconds` covers.
        processes: Processes that trained together; their seeds depend on it.
        config: Fields of the TrainConfig.
        identity: What the objective says about itself.
        model: State dict, the trained weights and not their average.
        trained: Names of the trained parameters.
        average: Averaged weights in fp32 by parameter name, or None.
        optimizer: AdamW's state per parameter, without its settings.
    """

    step: int
    total: int
    end: int
    measured: int
    seconds: float
    timed_steps: int
    processes: int
    config: dict[str, Any]
    identity: dict[str, Any]
    model: dict[str, Tensor]
    trained: list[str]
    average: dict[str, Tensor] | None
    optimizer: dict[int, dict[str, Any]]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint at `path`.

    Raises:
        OSError: It could not be written; the previous one is untouched, no partial file is left.
    """
    state = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    # Through memory: torch.save straight to a full disk raises RuntimeError without the reason.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    # One fixed name, so that what a killed process left is overwritten.
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_bytes(partial, MAGIC + hashlib.sha256(data).digest(), data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file and wait until it lies on the disk."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint into CPU memory, without running code that it may contain.

    Raises:
        ModelError: There is none, or it is damaged or of another version.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}; start the run without resuming")
    advice = "remove it and start again, or restore a copy"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    start = len(MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(MAGIC[:-2]):
        raise ModelError(f"{path} is no tubelet checkpoint; {advice}")
    if not data.startswith(MAGIC):
        raise ModelError(f"checkpoint {path} is of another version of tubelet; {advice}")
    # torch.load does not notice most single wrong bits in a tensor.
    if hashlib.sha256(memoryview(data)[start:]).digest() != data[len(MAGIC) : start]:
        raise ModelError(f"checkpoint {path} is damaged or was cut off; {advice}")
    state = torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)
    return Checkpoint(**state)


def check_resumable(
    path: Path,
    saved: Checkpoint,
    *,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    processes: int,
    model: nn.Module,
) -> None:
    """Refuse a checkpoint that another run has written.

    Raises:
        ModelError: Names the fields or tensors that differ.
    """
    differing = _different(saved.config, config, FREE_ON_RESUME)
    differing += _different(saved.identity, identity)
    differing += _different({"processes": saved.processes}, {"processes": processes})
    if differing:
        raise ModelError(f"cannot resume {path}: it was made with other {'; '.join(differing)}")
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    wrong = _different(_shapes(saved.model), _shapes(model.state_dict()))
    wrong += [f"{name} (trained in one only)" for name in sorted({*trained} ^ {*saved.trained})]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"cannot resume {path}: another architecture, differing in {'; '.join(wrong[:3])}{more}"
        )


def _different(
    saved: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str] = frozenset()
) -> list[str]:
    names = [name for name in {**saved, **now} if name not in free]
    return [
        f"{name} ({saved.get(name, 'absent')} there, {now.get(name, 'absent')} now)"
        for name in names
        if (name in saved) != (name in now) or saved[name] != now[name]
    ]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(t.shape)} {str(t.dtype)[6:]}" for name, t in state.items()}


def _flush_folder(folder: Path) -> None:
    # The rename itself; file systems that cannot flush a folder say so with an OSError.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
