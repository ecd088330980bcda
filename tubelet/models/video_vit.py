"""tubelet's own video encoder: joint or divided attention, rotary or learned positions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.recipe import Recipe
from tubelet.models.divided import DividedRuntime
from tubelet.models.encoder import NOT_JOINT, ONLY_ENCODES, BuiltModel, ClipSpec, EncoderAdapter
from tubelet.models.runtime import EncoderRuntime
from tubelet.nn.weights import PIXEL_MEAN, PIXEL_STD, load_weights


def _clip(config: Any) -> ClipSpec:
    return ClipSpec(frames=config.frames, size=config.size, tubelet=config.tubelet)


class VideoViTAdapter(EncoderAdapter):
    """Attention through the modules' own `runtime` attribute; weights that come with tubelet."""

    def variants(self) -> dict[str, dict[str, str]]:
        joint = {"divided": "this VideoViT attends jointly over space and time"}
        pooled = {"class token": "this VideoViT pools by the mean of its tokens"}
        factorised = (
            "factorised attention folds tokens by the frames and places of the clip and is not "
            "routed through recipes; use the joint or the divided kind"
        )
        everything = (
            "any subset",
            "grid",
            "pixels",
            "class token",
            "divided",
            "attention",
            "joint",
        )
        kinds = {
            "VideoViT, joint": joint,
            "VideoViT, joint, mean pool": {**joint, **pooled},
            "VideoViT, divided": {
                "any subset": "divided attention needs whole rows of frames and places, so only "
                "structured reductions (UniformPool, TESTA) run",
                **NOT_JOINT,
                **pooled,
            },
            "VideoViT, factorised": dict.fromkeys(everything, factorised),
        }
        bare = {
            kind: {**lacks, **ONLY_ENCODES, **self.untrained()} for kind, lacks in kinds.items()
        }
        return {**bare, "VideoViT, joint, with reducers": {**joint, **ONLY_ENCODES}}

    def variant_of(self, settings: Mapping[str, Any]) -> str:
        kind = settings.get("attention", "joint")
        if kind.startswith("factorised"):
            return "VideoViT, factorised"
        if kind == "divided":
            return "VideoViT, divided"
        if settings.get("reducers"):
            return "VideoViT, joint, with reducers"
        pooled = settings.get("pool", "class") == "mean"
        return "VideoViT, joint, mean pool" if pooled else "VideoViT, joint"

    def kinds(self, model: Any) -> tuple[str, ...]:
        divided = self.base_model(model).config.attention == "divided"
        return ("temporal", "spatial") if divided else ("joint",)

    def grid(self, base: Any, pixels: Tensor) -> TokenGrid:
        return replace(super().grid(base, pixels), before=base.config.class_tokens)

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        divided = "temporal" in self.kinds(model)
        runtime = (DividedVideoViT if divided else EncoderRuntime)(self, model, recipes, handle)
        runtime.hook_embeddings()
        runtime.hook_layers()
        paths = ("temporal", "attention") if divided else ("attention",)
        for layer in runtime.layers:
            for path in paths:
                _set(layer.get_submodule(path), "runtime", runtime, handle)

    def build(self, preset: str, seed: int) -> BuiltModel:
        return BuiltModel(
            model=load_weights(preset),
            random_weights=False,
            mean=(PIXEL_MEAN,) * 3,
            std=(PIXEL_STD,) * 3,
        )


class DividedVideoViT(DividedRuntime):
    """Divided attention whose rows turn by the original positions of their tokens."""

    table: Any = None
    """Rotary table of the whole clip, or None with learned positions."""

    def __init__(self, *setup: Any) -> None:
        super().__init__(*setup)
        self.keys = {
            getattr(layer, path): (index, kind)
            for index, layer in enumerate(self.layers)
            for path, kind in (("temporal", "temporal"), ("attention", "spatial"))
        }

    def hook_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            _set(layer, "forward", self._layer(index), self.handle)

    def _layer(self, index: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, grid: tuple[int, int] = (1, 1), table: Any = None) -> Tensor:
            self.table = table
            return self.run_layer(index, x)

        return forward

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        host: Callable[[], Tensor],
    ) -> Tensor:
        return self.attend_at(self.keys[module], q, k, v, scale, host)

    def along_time(self, layer: Any, x: Tensor) -> Tensor:
        # All places of a frame share its time; the table's row of its first place holds no other.
        first = self._anchors()[:, :, 0] // self._per_frame() * self._per_frame()
        return layer.along_time(x, self._turned(first.repeat_interleave(self.places, dim=0)))

    def within_frames(self, layer: Any, head: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        places = self._anchors() % self._per_frame()
        return head, layer.within_frames(x, self._turned(places.flatten(0, 1)))

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.mlp(layer.norm2(x))

    def _anchors(self) -> Tensor:
        """[batch, frames, places], original positions."""
        return self.groups[0].anchor.unflatten(1, (self.frames, self.places))

    def _per_frame(self) -> int:
        assert self.grid is not None
        return self.grid.per_frame

    def _turned(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.table is None else (self.table[0][rows], self.table[1][rows])


def _set(module: Any, name: str, value: Any, handle: Handle) -> None:
    """Shadow an attribute on one instance until the handle is removed."""
    setattr(module, name, value)
    handle.on_remove(lambda: module.__dict__.pop(name))


ADAPTER = VideoViTAdapter(
    family="VideoViT",
    classes=("VideoViT",),
    base="video_vit",
    embeddings="embeddings",
    layers="layers",
    attention="attention",
    norm_after="norm2",
    mlp_out="mlp",
    class_tokens=1,
    takes_positions=True,
    config_class="VideoViTConfig",
    presets={
        "tubelet-vit": {},
        "tubelet-vit-small": {"width": 128},
        "tubelet-vit-elastic": {"reducers": True},
    },
    clip=_clip,
)
