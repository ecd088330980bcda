"""The models of a run, and how they are called."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tubelet.bench.compare import on_model
from tubelet.bench.fidelity.budgets import Geometry
from tubelet.core.errors import ModelError
from tubelet.core.recipe import Recipe
from tubelet.models.catalogue import adapter_for
from tubelet.models.encoder import EncoderAdapter
from tubelet.nn.weights import PIXEL_MEAN, PIXEL_STD, load_weights, read_card

Role = Literal["dense", "small", "trained"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """One model.

    Args:
        name: As it was asked for.
        role: "dense" (recipes are put on it training-free), "small" (a smaller dense model) or
            "trained" (trained with the reducers it carries).
        model: In eval mode, on its device; takes normalised clips and a task's name.
        checksum: Of its weights file.
        std: Of the pixel normalisation.
    """

    name: str
    role: Role
    model: Any
    checksum: str
    std: float = PIXEL_STD

    @property
    def weights(self) -> Tensor:
        """Any parameter: tells device and precision."""
        return next(self.model.parameters())

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels of a token."""
        adapter = self._adapter()
        return adapter.clip(adapter.base_model(self.model).config).tubelet

    def geometry(self, frames: int, size: tuple[int, int]) -> Geometry:
        """What budgets are solved for, with clips of that shape."""
        adapter = self._adapter()
        blank = torch.zeros(1, frames, 3, *size)
        return Geometry(
            layers=adapter.sites(self.model)[0].num_layers,
            grid=adapter.grid(adapter.base_model(self.model), blank),
            std=self.std,
        )

    def answer(self, pixels: Tensor, task: str) -> Tensor:
        """Float32 logits: [B, classes], or [B, N] of a dense task; `pixels` lie in [0, 1]."""
        return self.model(self.normalised(pixels), task=task).logits.float()

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels as the model takes them."""
        return ((pixels - PIXEL_MEAN) / self.std).to(self.weights.dtype)

    def with_recipes(self, recipes: Sequence[Recipe]) -> AbstractContextManager[Any]:
        """The model with recipes on it; without any, dense."""
        return on_model(self.model, recipes)

    def _adapter(self) -> EncoderAdapter:
        adapter = adapter_for(self.model)
        assert isinstance(adapter, EncoderAdapter)
        return adapter


def load_host(name: str | os.PathLike[str], role: Role, device: torch.device) -> Host:
    """A host from shipped weights or a file; bfloat16 on CUDA, float32 elsewhere.

    Raises:
        ModelError: Unknown or damaged weights, or not an encoder.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_weights(name, expect="VideoViT", device=device, dtype=dtype)
    if role == "trained" and getattr(model, "reducers", None) is None:
        raise ModelError(f"{name} carries no trained reducers; train them, or leave it out")
    return Host(name=os.fspath(name), role=role, model=model, checksum=read_card(name).sha256)
