"""Models by name: architecture presets with random weights, Hugging Face ids, local folders."""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tubelet.core.errors import ModelError, UnsupportedError
from tubelet.models.catalogue import adapter_for, adapters
from tubelet.models.encoder import IMAGENET_MEAN, IMAGENET_STD, ClipSpec, EncoderAdapter


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what it takes.

    Args:
        model: In eval mode, on its device.
        name: The name it was loaded by.
        random_weights: True for presets: the weights were never trained.
        clip: Frames, size and argument name.
        mean, std: Pixel normalisation per channel, on pixels in [0, 1].
        notes: What a reader of its results must know.
    """

    model: Any
    name: str
    random_weights: bool
    clip: ClipSpec
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: tuple[str, ...] = ()


def presets() -> dict[str, EncoderAdapter]:
    """Adapter by preset name."""
    return {name: a for a in adapters() if isinstance(a, EncoderAdapter) for name in a.presets}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LoadedModel:
    """Load a model.

    Args:
        name: A preset such as "videomae-base", a Hugging Face id, or a folder with
            `config.json` and weights.
        dtype: Precision of the weights.
        device: Where it runs.
        seed: Seed of a preset's random weights.

    Raises:
        ModelError: The name is unknown, or what it names does not load.
        UnsupportedError: It loads, but no adapter serves it, or the device is not there.
    """
    if not isinstance(name, str | os.PathLike):
        raise ModelError(f"a model is named by text or a path, got {name!r}")
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
    if not -(2**63) <= seed < 2**63:
        raise ModelError("seed must fit 64 bits")
    name, place = os.fspath(name), checked_device(device)
    if name in presets():
        return _from_preset(name, dtype, place, seed)
    return _from_pretrained(name, dtype, place)


def checked_device(name: torch.device | str) -> torch.device:
    """A device that is there.

    Raises:
        UnsupportedError: It is unknown, missing, or neither a CPU nor a CUDA device.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UnsupportedError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"device {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA GPUs"
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    return device


def _from_preset(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> LoadedModel:
    adapter = presets()[name]
    built = adapter.build(name, seed)
    return LoadedModel(
        model=built.model.to(device, dtype).eval(),
        name=name,
        random_weights=built.random_weights,
        clip=adapter.clip(built.model.config),
        mean=built.mean,
        std=built.std,
        notes=built.notes,
    )


def _from_pretrained(name: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForVideoClassification

    if not _exists(name) and name.count("/") != 1:
        close = difflib.get_close_matches(name, list(presets()), n=1)
        hint = f"; did you mean {close[0]}" if close else ""
        raise ModelError(
            f"unknown model {name[:80]!r}{hint}. Presets: {', '.join(presets())}; or give a "
            "Hugging Face id (owner/name) or a local folder"
        )
    try:
        config = AutoConfig.from_pretrained(name)
        model, loading = AutoModelForVideoClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        # The hub client, safetensors and transformers each raise their own kinds.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load model {name!r}: {reason}") from error
    adapter = adapter_for(model)
    assert isinstance(adapter, EncoderAdapter)
    mean, std = _normalisation(name)
    return LoadedModel(
        model=model.to(device).eval(),
        name=name,
        random_weights=False,
        clip=adapter.clip(config),
        mean=mean,
        std=std,
        notes=_missing(loading["missing_keys"]),
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        # Too long for the file system, or not a path at all.
        return False


def _missing(keys: Iterable[str]) -> tuple[str, ...]:
    keys = sorted(keys)
    if not keys:
        return ()
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return (f"{len(keys)} weights are not in the checkpoint and are random: {shown}",)


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        # No preprocessor_config.json: the ImageNet values are what these families use.
        settings = {}
    mean = settings.get("image_mean") or IMAGENET_MEAN
    std = settings.get("image_std") or IMAGENET_STD
    if not all(isinstance(x, list | tuple) and len(x) == 3 for x in (mean, std)):
        raise ModelError(f"{name}: image_mean and image_std must be 3 numbers, got {mean}, {std}")
    return tuple(mean), tuple(std)
