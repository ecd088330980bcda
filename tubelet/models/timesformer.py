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

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import TokenContext
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.recipe import Recipe
from tubelet.kernels.attention import attention
from tubelet.models.encoder import ClipSpec, EncoderAdapter
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
        everything = ("any subset", "grid", "pixels", "class token", "divided", "attention")
        return {
            "TimeSformer, divided": {
                "any subset": "divided attention needs whole rows of frames and patches, so only "
                "structured reductions (UniformPool, TESTA) run"
            },
            "TimeSformer, joint": {
                "divided": "this TimeSformer attends jointly over space and time"
            },
            "TimeSformer, space-only": dict.fromkeys(everything, alone),
        }

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
        runtime = (DividedRuntime if divided else JointRuntime)(self, model, recipes, handle)
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


class DividedRuntime(JointRuntime):
    """Frames x patches that shrink along either axis within a layer."""

    frames: int
    places: int

    def __init__(self, *setup: Any) -> None:
        super().__init__(*setup)
        if self.size_bias:
            raise UnsupportedError(
                "a log-size bias is not defined for divided attention; use proportional=False"
            )

    def to_raster(self, embedded: Tensor, grid: TokenGrid) -> Tensor:
        if grid.frames != self.base.config.num_frames:
            # The host would reshape by its configured length and mix up frames and places.
            raise ShapeError(
                f"divided TimeSformer takes {self.base.config.num_frames} frames, got {grid.frames}"
            )
        return super().to_raster(embedded, grid)

    def hook_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            self.replace_forward(layer, self._layer(index, layer))

    def reduce(self, key: tuple[int, str], hidden: Tensor, *rest: Any, **named: Any):
        reduced = super().reduce(key, hidden, *rest, **named)
        assert self.grid is not None
        self.frames, self.places = self.grid.frames, self.grid.per_frame
        if reduced is not None:
            # Only plans that leave a whole grid get here; its anchors tell the frames.
            group = self.groups[0]
            frames = self.grid.frame_index(hidden.device)[group.anchor[0, 1:]].unique()
            self.frames, self.places = len(frames), (group.num - 1) // len(frames)
        return reduced

    def _layer(self, index: int, layer: Any) -> Callable[..., tuple[Tensor]]:
        """Divided attention: time for each place, then space for each frame, then the MLP."""

        def forward(hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
            self.count_tokens(index)
            head, video = hidden_states[:, :1], hidden_states[:, 1:]
            x = video.unflatten(1, (self.frames, self.places)).transpose(1, 2).flatten(0, 1)
            mixed = layer.temporal_attention(layer.temporal_layernorm(x))[0]
            x = x + layer.temporal_dense(layer.drop_path(mixed))
            x = self._shrink(index, "temporal", x)

            x = x.unflatten(0, (-1, self.places)).transpose(1, 2).flatten(0, 1)
            heads = head.repeat_interleave(self.frames, dim=0)
            both = layer.layernorm_before(torch.cat([heads, x], dim=1))
            mixed = layer.drop_path(layer.attention(both)[0])
            head = head + mixed[:, :1].unflatten(0, (-1, self.frames)).mean(1)
            x = self._shrink(index, "spatial", x + mixed[:, 1:])

            x = torch.cat([head, x.unflatten(0, (-1, self.frames)).flatten(1, 2)], dim=1)
            x = x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))
            last = index == len(self.layers) - 1
            return (self.finish(x) if last else x,)

        return forward

    def _shrink(self, index: int, kind: str, x: Tensor) -> Tensor:
        """Apply the token recipe to [batch x places, frames, C] or [batch x frames, places, C]."""
        recipe = self.reducers.get((index, kind))
        if recipe is None:
            return x
        assert self.grid is not None
        temporal, group = kind == "temporal", self.groups[0]
        sizes = group.size[:, 1:].unflatten(1, (self.frames, self.places))
        context = TokenContext(
            site=self.sites[index, kind],
            grid=self.grid,
            hidden=x,
            size=(sizes.transpose(1, 2) if temporal else sizes).flatten(0, 1),
            anchor=torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]),
            shared=self.places if temporal else 1,
            stats=self._video_statistics(index, kind),
        )
        plan = recipe.plan(context)
        if plan is None:
            return x
        whole = self._over_grid(plan, temporal)
        self.groups = [group.after(whole, 0)]
        report = self.handle.report()
        report.change(str(recipe), f"{context.site.name} ({kind})", group.num, whole.num_out)
        if temporal:
            self.frames = plan.num_out
        else:
            self.places = plan.num_out
        return plan.reduce(x)

    def _video_statistics(self, index: int, kind: str):
        calls = self.statistics.pop(index, None)
        if calls is None or kind == "temporal":
            return None if calls is None else calls[0]
        stats = calls[0]
        # The class token in front takes part in spatial attention only.
        return type(stats)(stats.q[:, :, 1:], stats.k[:, :, 1:], stats.v[:, :, 1:], stats.scale)

    def _over_grid(self, plan: TokenAssignment, temporal: bool) -> TokenAssignment:
        """A plan along one axis as a plan over class token + frames x places."""
        places = self.places if temporal else plan.num_out

        def raster(x: Tensor) -> Tensor:
            # [batch x places, frames] or [batch x frames, places] to [batch, frames, places].
            if temporal:
                return x.unflatten(0, (-1, self.places)).transpose(1, 2)
            return x.unflatten(0, (-1, self.frames))

        def joined(values: Tensor, stride: int) -> Tensor:
            rows = torch.arange(values.shape[1], device=values.device)[None, :, None]
            columns = torch.arange(values.shape[2], device=values.device)
            flat = values * stride + columns if temporal else rows * stride + values
            return with_class(flat.flatten(1) + 1, 0)

        def with_class(x: Tensor, value: float) -> Tensor:
            return torch.cat([torch.full_like(x[:, :1], value), x], dim=1)

        anchor = joined(raster(plan.anchor), self.places)
        gone = with_class(raster(plan.index).flatten(1) < 0, False)
        return TokenAssignment(
            index=torch.where(gone, -1, joined(raster(plan.index), places)),
            weight=with_class(raster(plan.weight).flatten(1), 1.0),
            anchor=anchor,
            size=with_class(raster(plan.size).flatten(1), 1.0),
        )


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
