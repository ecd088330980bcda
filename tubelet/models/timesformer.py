"""TimeSformer: joint or divided space-time attention without fused kernels in the host.

Its attention does not go through transformers' interface, so tubelet replaces `forward` on the
instances: of every attention module (to bring fused attention), and with divided attention of
every layer, because frames and patches change within a layer. Tokens are put from the host's
(place, time) order into raster order behind the embeddings and back after the last layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.recipe import Recipe
from tubelet.kernels.attention import attention
from tubelet.models.divided import DividedRuntime
from tubelet.models.encoder import NOT_JOINT, ONLY_ENCODES, ClipSpec, EncoderAdapter
from tubelet.models.runtime import EncoderRuntime


def _clip(config: Any) -> ClipSpec:
    return ClipSpec(
        frames=config.num_frames,
        size=(config.image_size, config.image_size),
        tubelet=(1, config.patch_size, config.patch_size),
    )


class TimesformerAdapter(EncoderAdapter):
    """TimeSformer's own routes for attention and layers."""

    def variants(self) -> dict[str, dict[str, str]]:
        alone = "space-only attention folds frames into the batch; nothing joins them"
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
            "TimeSformer, divided": {
                "any subset": "divided attention needs whole rows of frames and patches, so only "
                "structured reductions (UniformPool, TESTA) run",
                **NOT_JOINT,
            },
            "TimeSformer, joint": {
                "divided": "this TimeSformer attends jointly over space and time",
                **self.untrained(),
            },
            "TimeSformer, space-only": dict.fromkeys(everything, alone),
        }
        return {kind: {**lacks, **ONLY_ENCODES} for kind, lacks in kinds.items()}

    def variant_of(self, settings: Mapping[str, Any]) -> str:
        kind = settings.get("attention_type", "divided_space_time")
        return (
            "TimeSformer, "
            + {
                "divided_space_time": "divided",
                "joint_space_time": "joint",
                "space_only": "space-only",
            }[kind]
        )

    def kinds(self, model: Any) -> tuple[str, ...]:
        divided = self.base_model(model).config.attention_type == "divided_space_time"
        return ("temporal", "spatial") if divided else ("joint",)

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        divided = "temporal" in self.kinds(model)
        runtime = (DividedTimesformer if divided else JointRuntime)(self, model, recipes, handle)
        runtime.hook_embeddings()
        runtime.hook_layers()
        for index, layer in enumerate(runtime.layers):
            space = "spatial" if divided else "joint"
            runtime.take_over_attention(layer.get_submodule("attention.attention"), (index, space))
            if divided:
                time = layer.get_submodule("temporal_attention.attention")
                runtime.take_over_attention(time, (index, "temporal"))


class JointRuntime(EncoderRuntime):
    """Raster order inside, fused attention in every layer."""

    def to_raster(self, embedded: Tensor, grid: TokenGrid) -> Tensor:
        video = embedded[:, 1:].unflatten(1, (-1, grid.frames)).transpose(1, 2).flatten(1, 2)
        return torch.cat([embedded[:, :1], video], dim=1)

    def finish(self, hidden: Tensor) -> Tensor:
        hidden = super().finish(hidden)
        assert self.grid is not None
        video = hidden[:, 1:].unflatten(1, (self.grid.frames, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([hidden[:, :1], video], dim=1)

    def take_over_attention(self, module: Any, key: tuple[int, str]) -> None:
        """Compute this module's attention with fused kernels, through the recipes."""
        heads, scale = module.num_heads, module.scale

        def forward(hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
            qkv = module.qkv(hidden_states).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)

            def fused() -> Tensor:
                return attention(q, k, v, scale=scale)[0].transpose(1, 2)

            return (self.attend_at(key, q, k, v, scale, fused).flatten(2),)

        self.replace_forward(module, forward)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Shadow `forward` on one instance until the handle is removed."""
        module.forward = forward
        self.handle.on_remove(lambda: module.__dict__.pop("forward"))


class DividedTimesformer(DividedRuntime, JointRuntime):
    """Divided attention with a class token that takes part in every frame."""

    def to_raster(self, embedded: Tensor, grid: TokenGrid) -> Tensor:
        if grid.frames != self.base.config.num_frames:
            # The host would reshape by its configured length and mix up frames and places.
            raise ShapeError(
                f"divided TimeSformer takes {self.base.config.num_frames} frames, got {grid.frames}"
            )
        return super().to_raster(embedded, grid)

    def hook_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            self.replace_forward(layer, self._layer(index))

    def _layer(self, index: int) -> Callable[..., tuple[Tensor]]:
        def forward(hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
            return (self.run_layer(index, hidden_states),)

        return forward

    def along_time(self, layer: Any, x: Tensor) -> Tensor:
        mixed = layer.temporal_attention(layer.temporal_layernorm(x))[0]
        return x + layer.temporal_dense(layer.drop_path(mixed))

    def within_frames(self, layer: Any, head: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = head.repeat_interleave(self.frames, dim=0)
        both = layer.layernorm_before(torch.cat([heads, x], dim=1))
        mixed = layer.drop_path(layer.attention(both)[0])
        head = head + mixed[:, :1].unflatten(0, (-1, self.frames)).mean(1)
        return head, x + mixed[:, 1:]

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))


ADAPTER = TimesformerAdapter(
    family="TimeSformer",
    classes=("TimesformerForVideoClassification", "TimesformerModel"),
    base="timesformer",
    embeddings="embeddings",
    layers="encoder.layer",
    attention="attention.attention",
    norm_after="layernorm_after",
    mlp_out="output",
    class_tokens=1,
    fused_by_tubelet=True,
    config_class="TimesformerConfig",
    presets={
        "timesformer-base": {},
        "timesformer-base-joint": {"attention_type": "joint_space_time"},
    },
    clip=_clip,
)
