"""Models by name: architecture presets with random weights, Hugging Face ids, local folders."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tubelet.core.errors import ModelError
from tubelet.models.catalogue import adapter_for, adapters
from tubelet.models.encoder import ClipSpec, EncoderAdapter

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    name: str,
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
        UnsupportedError: It loads, but no adapter serves it.
    """
    if name in presets():
        return _from_preset(name, dtype, torch.device(device), seed)
    return _from_pretrained(name, dtype, torch.device(device))


def _from_preset(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> LoadedModel:
    import transformers

    adapter = presets()[name]
    config = getattr(transformers, adapter.config_class)(**adapter.presets[name], num_labels=400)
    head = next(c for c in adapter.classes if c.endswith("ForVideoClassification"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, head)(config)
    model = model.to(device, dtype).eval()
    return LoadedModel(model=model, name=name, random_weights=True, clip=adapter.clip(config))


def _from_pretrained(name: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForVideoClassification

    if not Path(name).exists() and name.count("/") != 1:
        close = difflib.get_close_matches(name, list(presets()), n=1)
        hint = f"; did you mean {close[0]}" if close else ""
        raise ModelError(
            f"unknown model {name!r}{hint}. Presets: {', '.join(presets())}; or give a Hugging "
            "Face id (owner/name) or a local folder"
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
    mean = settings.get("image_mean", IMAGENET_MEAN)
    return tuple(mean), tuple(settings.get("image_std", IMAGENET_STD))
