"""The facts that an adapter states about a family of video encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
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
        return {self.family: self.missing}

    def variant_of(self, settings: Mapping[str, Any]) -> str:
        """Name of the kind that configuration settings describe."""
        return self.family

    def lacks(self, model: Any) -> dict[str, str]:
        """Capabilities that this model does not offer, each with the reason."""
        return self.variants()[self.variant_of(self.base_model(model).config.to_dict())]

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

    @staticmethod
    def _site(name: str, layer: int, num_layers: int, kind: Any) -> Site:
        return Site(name=name, layer=layer, num_layers=num_layers, kind=kind)
