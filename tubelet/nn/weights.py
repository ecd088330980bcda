"""Weights that come with tubelet, and files like them: safetensors plus a card in JSON.

The tensors are stored in float16. The card beside them says which architecture and configuration
they belong to, their checksum, and how they were made.
"""

import hashlib
import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import ModelError, TubeletError
from tubelet.core.files import write_whole

ASSETS = Path(__file__).parents[1] / "assets"
PIXEL_MEAN, PIXEL_STD = 0.5, 0.225
"""Normalisation of pixels in [0, 1], in every channel, of tubelet's own encoders."""

ARCHITECTURES = {
    "VideoViT": ("tubelet.nn.vit", "VideoViT", "VideoViTConfig"),
    "VideoDiT": ("tubelet.nn.dit", "VideoDiT", "VideoDiTConfig"),
    "Reducers": ("tubelet.nn.reducers", "Reducers", "ReducersConfig"),
    "VideoLLM": ("tubelet.nn.video_llm", "VideoLLM", "VideoLLMConfig"),
}
"""Module, model class and configuration class by architecture name."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about a weights file.

    Args:
        architecture: Key of `ARCHITECTURES`.
        config: Fields of the configuration.
        sha256: Checksum of the safetensors file.
        summary: One line for people.
        attach: Name of a second file whose module becomes `model.reducers`, or None.
        record: Command, seed, time, hardware, curves: how the weights were made.
    """

    architecture: str
    config: dict[str, Any]
    sha256: str
    summary: str = ""
    attach: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


def shipped() -> list[str]:
    """Names of the weights that come with tubelet."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def save_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    record: dict[str, Any],
    summary: str = "",
    attach: str | None = None,
) -> Path:
    """Write `PATH.safetensors` and `PATH.json`.

    Args:
        path: Without extension; the folder must exist.
        model: One of `ARCHITECTURES`, with a `config` that has `to_dict`.
        record, summary, attach: See `Card`.

    Raises:
        ModelError: Another kind of model, reducers on it that are not in a file of their own, or
            a weight that float16 does not hold.
        TubeletError: The files cannot be written; what was there before survives. Should the last
            rename alone fail, card and weights differ, and loading says so.
    """
    from safetensors.torch import save

    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ModelError(f"cannot save a {name}; known: {', '.join(ARCHITECTURES)}")
    config: Any = model.config
    data = save(_stored(model, attach))
    card = {
        "architecture": name,
        "config": config.to_dict(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "summary": summary,
        "attach": attach,
        "record": record,
    }
    path = Path(path)
    weights = path.with_name(path.name + ".safetensors")
    partial = weights.with_name(weights.name + ".part")
    try:
        partial.write_bytes(data)
        write_whole(path.with_name(path.name + ".json"), json.dumps(card, indent=1) + "\n")
        os.replace(partial, weights)
    except OSError as error:
        raise TubeletError(f"cannot write {weights}: {error.strerror or error}") from None
    finally:
        # Also when the card could not be written, or on a keyboard interrupt.
        partial.unlink(missing_ok=True)
    return weights


def _stored(model: nn.Module, attach: str | None) -> dict[str, Tensor]:
    """The tensors of a file; numbers that are no floats keep their type."""
    tensors = dict(model.state_dict())
    own = {n: t for n, t in tensors.items() if not n.startswith("reducers.")}
    if attach is None and len(own) < len(tensors):
        raise ModelError("the model carries reducers; save them by themselves and name the file")
    kept: dict[str, Tensor] = {}
    for name, tensor in own.items():
        half = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        if not bool(half.isfinite().all()):
            raise ModelError(f"{name} has values that are not finite in float16; not saved")
        kept[name] = half.to("cpu", copy=True).contiguous()
    return kept


def read_card(name: str | os.PathLike[str]) -> Card:
    """The card of shipped weights or of a file.

    Raises:
        ModelError: There is none, or it is not a card.
    """
    path = _find(name)
    try:
        data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        card = Card(**data)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path.with_suffix('.json')} is not a card of weights: {error}") from None
    texts = (card.architecture, card.sha256, card.summary, card.attach or "")
    if not all(isinstance(text, str) for text in texts) or os.path.basename(texts[-1]) != texts[-1]:
        raise ModelError(f"{path.with_suffix('.json')} is not a card of weights: damaged fields")
    return card


def load_weights(
    name: str | os.PathLike[str],
    *,
    expect: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The model of shipped weights (see `shipped`) or of a `.safetensors` file with its card.

    Args:
        name: A name such as "tubelet-vit", or a path.
        expect: Architecture that the caller needs, such as "VideoViT".
        device, dtype: Where and in what precision the model is returned, in eval mode.

    Raises:
        ModelError: Unknown name, missing or changed file, another architecture, or tensors that
            do not fit the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    card, path = read_card(name), _find(name)
    if expect is not None and card.architecture != expect:
        raise ModelError(f"{path.name} holds a {card.architecture}, wanted a {expect}")
    if card.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{path.name} holds an unknown {card.architecture!r}; known: {known}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != card.sha256:
        raise ModelError(f"{path} does not have the checksum of its card; it is damaged or changed")
    module, model_class, config_class = ARCHITECTURES[card.architecture]
    home = importlib.import_module(module)
    # The weights drawn here are overwritten; the caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]):
        model = getattr(home, model_class)(getattr(home, config_class).from_dict(card.config))
    try:
        # Copying widens float16 to what the model is made in.
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path.name} does not fit its configuration: {reason}") from None
    if card.attach is not None:
        model.reducers = load_weights(path.with_name(card.attach), expect="Reducers")
    return model.to(device, dtype).eval()


def _find(name: str | os.PathLike[str]) -> Path:
    text = os.fspath(name)
    for path in (Path(text), Path(text + ".safetensors"), ASSETS / f"{text}.safetensors"):
        if path.suffix == ".safetensors" and os.path.isfile(path):
            return path
    raise ModelError(
        f"no weights {text!r}; tubelet ships {', '.join(shipped()) or 'none'}, or give a path to "
        "a .safetensors file with its card"
    )
