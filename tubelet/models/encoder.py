"""The facts that an adapter states about a family of video encoders."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import TRAINED, Handle
from tubelet.core.recipe import (
    Recipe,
)
from tubelet.models.interface import take_over
from tubelet.models.runtime import EncoderRuntime


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The clip that a model takes.

    Args:
        frames: Number of frames.
        size: (height, width) in pixels.
        tubelet: (frames, height, width) of one token.
        argument: Name of the forward argument, [B, T, 3, H, W].
    """

    frames: int
    size: tuple[int, int]
    tubelet: tuple[int, int, int]
    argument: str = "pixel_values"


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A preset, and what it expects of its pixels.

    Args:
        model: On the CPU, float32.
        random_weights: True when the weights were never trained.
        mean, std: Pixel normalisation per channel, on pixels in [0, 1].
        notes: What a reader of its results must know.
    """

    model: Any
    random_weights: bool
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: tuple[str, ...] = ()


ONLY_ENCODES = {
    "generator": "an encoder runs once, not in denoising steps",
    "video prompt": "an encoder reads a video, not a prompt",
    "kv cache": "an encoder runs once and keeps no keys and values",
}

NOT_JOINT = {"joint": "divided attention joins the frames of a place, then the places of a frame"}


@dataclass(frozen=True, kw_only=True)
class EncoderAdapter:
    """Facts about a family of video encoders in transformers.

    Args:
        family: Name for people.
        classes: Model classes it serves.
        base: Attribute that holds the encoder in classes with a head.
        embeddings, layers: Paths in the base model.
        attention: Path in a layer to the module that calls the attention function.
        norm_after: Path in a layer to the norm in front of the MLP.
        mlp_out: Path in a layer to the last module before the second residual addition.
        class_tokens: Tokens in front of the video tokens.
        missing: Capabilities the family lacks, with reasons.
        takes_positions: Layers take original positions as their second argument.
        pooler: Path of an attention pooler over the output tokens, if there is one.
        fused_by_tubelet: The host has no fused attention; tubelet brings it, also without any
            recipe.
        config_class: Configuration class of the family in transformers.
        presets: Published sizes by name, as changes to the configuration's defaults.
        clip: What a model of a given configuration takes.
    """

    family: str
    classes: tuple[str, ...]
    base: str
    embeddings: str
    layers: str
    attention: str
    norm_after: str
    mlp_out: str
    class_tokens: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    takes_positions: bool = False
    pooler: str | None = None
    fused_by_tubelet: bool = False
    config_class: str
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    clip: Callable[[Any], ClipSpec]

    def base_model(self, model: Any) -> Any:
        """The encoder below a task head."""
        return getattr(model, self.base, model)

    def grid(self, base: Any, pixels: Tensor) -> TokenGrid:
        """Token geometry of a clip [B, T, 3, H, W]; rests of a tubelet at the ends are cut off."""
        depth, tall, wide = self.clip(base.config).tubelet
        _, frames, _, height, width = pixels.shape
        return TokenGrid(
            # Hosts that take a clip shorter than a tubelet repeat its frames.
            frames=max(frames // depth, 1),
            height=height // tall,
            width=width // wide,
            before=self.class_tokens,
        )

    def variants(self) -> dict[str, dict[str, str]]:
        """What each kind of model in the family lacks, by the kind's name."""
        return {self.family: {**self.missing, **ONLY_ENCODES, **self.untrained()}}

    def variant_of(self, settings: Mapping[str, Any]) -> str:
        """Name of the kind that configuration settings describe."""
        return self.family

    def lacks(self, model: Any) -> dict[str, str]:
        """Capabilities that this model does not offer, each with the reason."""
        stated = self.variants()[self.variant_of(self.base_model(model).config.to_dict())]
        modules = {f"trained {name}" for name in TRAINED}
        facts = {need: reason for need, reason in stated.items() if need not in modules}
        return {**facts, **self.untrained(self.reducers(model))}

    @staticmethod
    def untrained(offered: Container[str] = ()) -> dict[str, str]:
        """The trained modules that are not among those offered, each with the reason."""
        lacking = [name for name in TRAINED if name not in offered]
        reason = "the model carries no reducers[{!r}]; `tubelet train` makes it"
        return {f"trained {name}": reason.format(name) for name in lacking}

    def reducers(self, model: Any) -> Mapping[str, Any]:
        """Trained modules that this very model carries: its or its encoder's `reducers`."""
        found: dict[str, Any] = {}
        for owner in (self.base_model(model), model):
            found.update(getattr(owner, "reducers", None) or {})
        return found

    def sites(self, model: Any) -> list[Site]:
        """The embeddings, then every layer."""
        prefix = f"{self.base}." if hasattr(model, self.base) else ""
        layers = self.base_model(model).get_submodule(self.layers)
        sites = [self._site(prefix + self.embeddings, -1, len(layers), "input")]
        for index in range(len(layers)):
            for kind in self.kinds(model):
                name = f"{prefix}{self.layers}.{index}"
                sites.append(self._site(name, index, len(layers), kind))
        return sites

    def kinds(self, model: Any) -> tuple[str, ...]:
        """Kinds of attention in one layer, in the order they run."""
        return ("joint",)

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        """Hook the recipes in."""
        runtime = EncoderRuntime(self, model, recipes, handle)
        runtime.hook_embeddings()
        runtime.hook_layers()
        attending = [layer.get_submodule(self.attention) for layer in runtime.layers]
        take_over(model, attending + runtime.pooling, runtime, handle)

    def build(self, preset: str, seed: int) -> BuiltModel:
        """A preset of transformers' classes, with seeded random weights."""
        import transformers

        config = getattr(transformers, self.config_class)(**self.presets[preset], num_labels=400)
        head = next(c for c in self.classes if c.endswith("ForVideoClassification"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, head)(config)
        return BuiltModel(model=model, random_weights=True)

    @staticmethod
    def _site(name: str, layer: int, num_layers: int, kind: Any) -> Site:
        return Site(name=name, layer=layer, num_layers=num_layers, kind=kind)
