"""A trained `VideoViT` as a vision tower of transformers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tubelet.core.errors import ModelError, ShapeError
from tubelet.nn.vit import VideoViT, VideoViTConfig

WAVES = 4
"""Sines and cosines of a token's place along each axis, in octaves of half a turn."""


class TowerConfig(PreTrainedConfig):
    """Configuration of `VideoTower` among those of transformers.

    `patch_size` is what the host believes: it halves rows and columns of a tower's map, so a map
    of all tokens is given as one of twice the side.
    """

    model_type = "tubelet_video_tower"

    encoder: dict | None = None
    taps: list[int] | None = None
    task: str = "mask"
    image_size: int = 64
    patch_size: int = 4
    hidden_size: int = 0
    num_frames: int = 8


class LayerView(nn.Module):
    """What others see of an encoder layer: its video tokens, without the class token."""

    def __init__(self, config: TowerConfig, first: int) -> None:
        super().__init__()
        self.self_attn = AttentionView(config, first)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same tokens; hooks on this module see them."""
        return hidden


class AttentionView(nn.Module):
    """Stands for the attention call of an encoder layer.

    Attention functions that are set on the tower, such as one that takes statistics, are shown
    the queries, keys and values of the video tokens. The call itself is computed by the encoder as
    ever, so what such a function returns is not used.
    """

    def __init__(self, config: TowerConfig, first: int) -> None:
        super().__init__()
        self.config, self.first = config, first

    def show(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Show a call to the function of the tower's name."""
        see = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _unseen)
        see(self, *(x[:, :, self.first :] for x in (q, k, v)), None, scaling=scale, dropout=0.0)


@dataclass(frozen=True)
class _Watched:
    """The `runtime` of an encoder's attention while it is watched.

    No module itself: torch would register it, and the attribute of the class would hide it.
    """

    view: AttentionView
    before: Any

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, host: Any) -> Any:
        """Show a call, then have it computed."""
        self.view.show(q, k, v, scale)
        if self.before is not None:
            return self.before.attend(module, q, k, v, scale, host)
        return host()


def _unseen(*call: Any, **options: Any) -> None:
    """For names that are no function, such as "eager"."""


class VideoTower(PreTrainedModel):
    """A `VideoViT` as a vision tower of transformers.

    It takes the frames of a token, 3 channels each, as the channels of one picture:
    [videos x frames of tokens, 3 x tubelet frames, H, W], see `as_pictures`.
    """

    config: TowerConfig
    config_class = TowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.video = VideoViT(VideoViTConfig.from_dict(dict(config.encoder or {})))
        shape, self.taps = self.video.config, tuple(config.taps or ())
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            LayerView(config, shape.class_tokens) for _ in range(shape.depth)
        )
        self.own_attention = config._attn_implementation
        self.post_init()

    def forward(
        self, pixel_values: Float[Tensor, "f c h w"], return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutput:
        """What the projector takes, [videos x frames of tokens, places, C].

        Raises:
            ShapeError: No whole number of videos of the right length.
        """
        frames, depth = self.config.num_frames, self.video.config.tubelet[0]
        if len(pixel_values) % frames or pixel_values.shape[1] != 3 * depth:
            raise ShapeError(
                f"this model takes videos of {frames} x {depth} frames; give them through "
                f"`as_pictures`, got {tuple(pixel_values.shape)}"
            )
        clips = pixel_values.unflatten(1, (depth, 3)).unflatten(0, (-1, frames)).flatten(1, 2)
        seen = self._watched() if self._is_watched() else nullcontext()
        with seen:
            tokens = self.tokens(clips)
        grid = self.video.config.grid(clips.shape[1], *clips.shape[3:])
        side = self.config.image_size // self.config.patch_size
        # The host pools what it projects; a token repeated is its own mean.
        maps = tokens.unflatten(1, grid).flatten(0, 1)
        maps = maps.repeat_interleave(side // grid[1], 1).repeat_interleave(side // grid[2], 2)
        hidden = maps.flatten(1, 2).to(pixel_values.dtype)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))

    def tokens(self, clips: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b n c"]:
        """The tapped layers of every token side by side, each normalised, then its place."""
        layers = self.layers_of(clips)
        grid = self.video.config.grid(clips.shape[1], *clips.shape[3:])
        tapped = [F.layer_norm(layers[tap].float(), layers[tap].shape[-1:]) for tap in self.taps]
        where = waves_of(grid, clips.device).expand(len(clips), -1, -1)
        return torch.cat([*tapped, where], dim=-1)

    def layers_of(self, clips: Float[Tensor, "b t 3 h w"]) -> list[Tensor]:
        """Video tokens [B, N, C] in front of the first layer and behind each one."""
        config = self.video.config
        number = config.task_names.index(self.config.task)
        x = self.video.embeddings(clips, torch.full((len(clips),), number, device=clips.device))
        grid, first = config.grid(clips.shape[1], *clips.shape[3:]), config.class_tokens
        table = self.video._table(grid, x.device, first)
        seen = [x[:, first:]]
        last = max(self.taps)
        for layer, view in zip(self.video.layers[:last], self.encoder.layers[:last], strict=True):
            x = layer(x, None, table)
            seen.append(view(x[:, first:]))
        return seen

    def _is_watched(self) -> bool:
        return self.config._attn_implementation != self.own_attention

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The views see every attention call."""
        modules = [layer.attention for layer in self.video.layers]
        before = [module.runtime for module in modules]
        try:
            for module, view, runtime in zip(modules, self.encoder.layers, before, strict=True):
                module.runtime = _Watched(view.self_attn, runtime)
            yield
        finally:
            for module, runtime in zip(modules, before, strict=True):
                module.runtime = runtime


def tower_config(
    encoder: VideoViTConfig, taps: tuple[int, ...], task: str, pooled: bool
) -> TowerConfig:
    """The tower of an encoder; layers behind the last tap are left out.

    Args:
        encoder: Of joint attention, with square frames of tokens.
        taps: Layers that the projector sees; 0 is in front of the first.
        task: The encoder's task prompt.
        pooled: Whether the host halves rows and columns of tokens.

    Raises:
        ModelError: The encoder does not fit, or lacks the task or a layer.
    """
    frames, tall, wide = encoder.grid(encoder.frames, *encoder.size)
    if encoder.attention != "joint" or tall != wide or (pooled and tall % 2):
        raise ModelError(
            "a tower needs an encoder of joint attention and square frames of tokens, got "
            f"{encoder.attention} attention and {tall} x {wide}"
        )
    if max(taps) > encoder.depth or task not in encoder.task_names:
        raise ModelError(
            f"the encoder has {encoder.depth} layers and the tasks "
            f"{', '.join(encoder.task_names)}; wanted taps {taps} and task {task!r}"
        )
    return TowerConfig(
        encoder=replace(encoder, depth=max(1, *taps)).to_dict(),
        taps=list(taps),
        task=task,
        image_size=encoder.size[0],
        patch_size=encoder.size[0] // (tall if pooled else 2 * tall),
        hidden_size=len(taps) * encoder.width + 6 * WAVES,
        num_frames=frames,
    )


def as_pictures(clips: Float[Tensor, "b t 3 h w"], depth: int) -> Float[Tensor, "b f c h w"]:
    """Clips as the host takes them: the `depth` frames of a token as one picture of more channels.

    Raises:
        ShapeError: No whole number of tokens.
    """
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] % depth:
        raise ShapeError(f"clips are [B, a multiple of {depth}, 3, H, W], got {clips.shape}")
    return clips.unflatten(1, (-1, depth)).flatten(2, 3)


def waves_of(grid: tuple[int, int, int], device: torch.device) -> Float[Tensor, "n c"]:
    """Sines and cosines of every place of a grid, raster order; 0 and 1 are the borders."""
    axes = [(torch.arange(n, device=device) + 0.5) / n for n in grid]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    octaves = math.pi * 2.0 ** torch.arange(WAVES, device=device)
    angles = (where[..., None] * octaves).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


AutoConfig.register(TowerConfig.model_type, TowerConfig)
AutoModel.register(TowerConfig, VideoTower)
