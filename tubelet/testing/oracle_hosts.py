"""Hand-written pieces of the host models, for the oracles: one sample, plain tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Token:
    """One token of one sample.

    Args:
        value: [C].
        place: Original position that gives its order, class token included in the count.
        members: Original positions that it stands for.
    """

    value: Tensor
    place: int
    members: list[int]

    @property
    def size(self) -> int:
        """How many originals it stands for."""
        return len(self.members)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention [N, H * D] and its map [H, N, N] from [H, N, D] inputs."""
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def _heads(x: Tensor, num: int) -> Tensor:
    return x.unflatten(-1, (num, -1)).transpose(0, 1)


def mean_of(tokens: list[Token]) -> Tensor:
    """Size-weighted mean."""
    total = sum(token.size for token in tokens)
    return sum(token.value * token.size for token in tokens) / total  # type: ignore[return-value]


class _VideoMAE:
    """The five pieces of a host around attention, on [N, C] tokens of one sample."""

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, model.videomae
        self.layers = self.base.encoder.layer

    def embed(self, clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        config = self.base.config
        side = config.image_size // config.patch_size
        shape = (clip.shape[1] // config.tubelet_size, side, side)
        return self.base.embeddings(clip, None)[0], shape

    def project(self, layer: Any, x: Tensor, places: Tensor) -> list[Tensor]:
        inner, x = layer.attention.attention, layer.layernorm_before(x)
        heads = inner.num_attention_heads
        return [_heads(linear(x), heads) for linear in (inner.query, inner.key, inner.value)]

    def output(self, layer: Any, out: Tensor) -> Tensor:
        return layer.attention.output.dense(out)

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.output.dense(layer.intermediate(layer.layernorm_after(x)))

    def head(self, tokens: list[Token]) -> Tensor:
        mean = mean_of(tokens)
        return self.model.classifier(self.model.fc_norm(mean))[None]


class _ViViT(_VideoMAE):
    def __init__(self, model: Any) -> None:
        self.model, self.base = model, model.vivit
        self.layers = self.base.layers

    def embed(self, clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        depth, tall, wide = self.base.config.tubelet_size
        shape = (clip.shape[1] // depth, clip.shape[3] // tall, clip.shape[4] // wide)
        return self.base.embeddings(clip)[0], shape

    def project(self, layer: Any, x: Tensor, places: Tensor) -> list[Tensor]:
        inner, x = layer.attention, layer.layernorm_before(x)
        linears = (inner.q_proj, inner.k_proj, inner.v_proj)
        return [_heads(linear(x), inner.num_attention_heads) for linear in linears]

    def output(self, layer: Any, out: Tensor) -> Tensor:
        return layer.attention.o_proj(out)

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.mlp(layer.layernorm_after(x))

    def head(self, tokens: list[Token]) -> Tensor:
        return self.model.classifier(self.base.layernorm(tokens[0].value))[None]


class _VJEPA2(_VideoMAE):
    def __init__(self, model: Any) -> None:
        self.model, self.base = model, model.vjepa2
        self.layers = self.base.encoder.layer

    def embed(self, clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        config = self.base.config
        side = config.crop_size // config.patch_size
        shape = (clip.shape[1] // config.tubelet_size, side, side)
        return self.base.encoder.embeddings(clip)[0], shape

    def project(self, layer: Any, x: Tensor, places: Tensor) -> list[Tensor]:
        inner, x = layer.attention, layer.norm1(x)
        heads, side = inner.num_attention_heads, inner.grid_size
        q, k, v = (_heads(linear(x), heads) for linear in (inner.query, inner.key, inner.value))
        axes = [places // side**2, places % side**2 // side, places % side]
        width = inner.d_dim
        for position, start in zip(axes, range(0, 3 * width, width), strict=True):
            q, k = (_rotate(part, start, width, position) for part in (q, k))
        return [q, k, v]

    def output(self, layer: Any, out: Tensor) -> Tensor:
        return layer.attention.proj(out)

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.mlp(layer.norm2(x))

    def head(self, tokens: list[Token]) -> Tensor:
        # The pooler sees each original that still has a token, and nothing of those dropped.
        owners = sorted((place, token.value) for token in tokens for place in token.members)
        x = torch.stack([value for _, value in owners])[None]
        return self.model.classifier(self.model.pooler(self.base.encoder.layernorm(x)))


def _rotate(x: Tensor, start: int, width: int, position: Tensor) -> Tensor:
    """Rotate channel pairs (0, 1), (2, 3), ... of one span by position times their frequency.

    The host tiles its frequencies over the whole span instead of repeating each for its pair;
    that is part of the trained weights.
    """
    span = x[..., start : start + width]
    frequency = 1.0 / 10000 ** (torch.arange(width // 2) / (width / 2))
    angle = (position[:, None] * frequency).repeat(1, 2)
    turned = torch.stack([-span[..., 1::2], span[..., 0::2]], dim=-1).flatten(-2)
    done = span * angle.cos() + turned * angle.sin()
    return torch.cat([x[..., :start], done, x[..., start + width :]], dim=-1)


class TimeSformer(_ViViT):
    """Joint attention, tokens in raster order; the parts also serve divided attention."""

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, model.timesformer
        self.layers = self.base.encoder.layer

    def embed(self, clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        config = self.base.config
        side, frames = config.image_size // config.patch_size, clip.shape[1]
        x = self.base.embeddings(clip)[0]
        # The host orders tokens by place, then time.
        order = [1 + p * frames + t for t in range(frames) for p in range(side * side)]
        return x[[0, *order]], (frames, side, side)

    def project(self, layer: Any, x: Tensor, places: Tensor) -> list[Tensor]:
        inner = layer.attention.attention
        return split_qkv(inner, layer.layernorm_before(x))

    def output(self, layer: Any, out: Tensor) -> Tensor:
        return layer.attention.output.dense(out)

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.output.dense(layer.intermediate(layer.layernorm_after(x)))


def split_qkv(inner: Any, x: Tensor) -> list[Tensor]:
    """TimeSformer's q, k and v as [H, N, D] each."""
    return [_heads(part, inner.num_heads) for part in inner.qkv(x).chunk(3, dim=-1)]


HOSTS: dict[str, type] = {
    "VideoMAEForVideoClassification": _VideoMAE,
    "VivitForVideoClassification": _ViViT,
    "VJEPA2ForVideoClassification": _VJEPA2,
    "TimesformerForVideoClassification": TimeSformer,
}
