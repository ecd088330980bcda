"""A Vision Transformer for video, for several tasks at once.

The four ways of attending are those of ViViT (Arnab et al., 2021, arXiv:2103.15691): joint over all
tokens, divided (time, then space, in every layer), a factorised encoder (frames first, then time
over one token per frame) and factorised dot-product (half of the heads look along time, half
across space).
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.errors import ModelError, ShapeError
from tubelet.kernels.attention import attention
from tubelet.nn.rotary import apply_rotary, grid_coordinates, rotary_table

AttentionKind = Literal["joint", "divided", "factorised-encoder", "factorised-dot-product"]
PositionKind = Literal["rotary", "learned"]
PoolKind = Literal["class", "mean"]

Table = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, [N, D] or [B, N, D] each."""

TASKS = {
    "direction": 8,
    "needle": 10,
    "collisions": 2,
    "shells": 3,
    "ego-motion": 8,
    "collision-count": 5,
}
"""Classification tasks of the shipped models, with their numbers of classes."""


@dataclass(frozen=True, kw_only=True)
class VideoViTConfig:
    """Everything that decides the shape of a `VideoViT`.

    Args:
        width: Channels of a token; a multiple of `heads`.
        depth: Layers; of a factorised encoder the spatial ones.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP relative to `width`.
        tubelet: (frames, height, width) in pixels of one token.
        frames, size: Clip that the model is made for; rotary positions take others as well.
        attention: How tokens attend; "divided" and "factorised-dot-product" need mean pooling.
        temporal_depth: Temporal layers of a factorised encoder.
        positions: Rotary (relative, in token units) or learned (a table of one clip size).
        pool: What the heads read: a class token or the mean of the tokens.
        tasks: Classes of each classification task; the name picks the head and prompts the model.
        dense_tasks: Tasks with one logit per video token.

    Raises:
        ModelError: A value is outside its range, or values contradict one another.
    """

    width: int = 256
    depth: int = 12
    heads: int = 4
    mlp_ratio: float = 4.0
    tubelet: tuple[int, int, int] = (2, 8, 8)
    frames: int = 16
    size: tuple[int, int] = (64, 64)
    attention: AttentionKind = "joint"
    temporal_depth: int = 4
    positions: PositionKind = "rotary"
    pool: PoolKind = "class"
    tasks: dict[str, int] = field(default_factory=lambda: dict(TASKS))
    dense_tasks: tuple[str, ...] = ("mask",)

    def __post_init__(self) -> None:
        for name in ("tubelet", "size", "dense_tasks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_kinds()
        self._check_sizes()
        self._check_tasks()

    def _check_kinds(self) -> None:
        for name, kinds in (
            ("attention", AttentionKind),
            ("positions", PositionKind),
            ("pool", PoolKind),
        ):
            if getattr(self, name) not in get_args(kinds):
                allowed = ", ".join(get_args(kinds))
                raise ModelError(
                    f"VideoViT {name} must be one of {allowed}, got {getattr(self, name)!r}"
                )
        if self.pool == "class" and self.attention in ("divided", "factorised-dot-product"):
            raise ModelError(f'VideoViT attention="{self.attention}" needs pool="mean"')

    def _check_sizes(self) -> None:
        if (len(self.tubelet), len(self.size)) != (3, 2):
            raise ModelError("VideoViT tubelet is (frames, height, width), size (height, width)")
        sizes = (self.width, self.depth, self.heads, self.frames, self.temporal_depth)
        if any(not isinstance(n, int) or n < 1 for n in (*sizes, *self.tubelet, *self.size)):
            raise ModelError("VideoViT sizes must be whole numbers of at least 1")
        if self.width * self.mlp_ratio < 1:
            raise ModelError(f"VideoViT mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ModelError(
                f"VideoViT width {self.width} over {self.heads} heads must give a multiple of 8"
            )
        if self.attention == "factorised-dot-product" and self.heads % 2:
            raise ModelError(f"half of the heads per axis needs an even number, got {self.heads}")
        try:
            self.grid(self.frames, *self.size)
        except ShapeError as error:
            raise ModelError(f"VideoViT: {error}") from None

    def _check_tasks(self) -> None:
        if not isinstance(self.tasks, dict) or not self.task_names:
            raise ModelError("VideoViT needs at least one task, as a dict of name to classes")
        if any(not isinstance(n, int) or n < 1 for n in self.tasks.values()):
            raise ModelError(f"VideoViT tasks need at least one class each, got {self.tasks}")
        if len(set(self.task_names)) != len(self.task_names):
            raise ModelError(f"VideoViT task names must differ, got {', '.join(self.task_names)}")
        # Heads are submodules, and torch keeps some names for itself.
        taken = nn.ModuleDict()
        for name in self.task_names:
            if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
                raise ModelError(f"VideoViT cannot name a task {name!r}; use another name")

    @property
    def task_names(self) -> tuple[str, ...]:
        """All tasks in the order of their numbers."""
        return (*self.tasks, *self.dense_tasks)

    @property
    def class_tokens(self) -> int:
        """Tokens in front of the video tokens, as a layer sees them."""
        return int(self.pool == "class" and self.attention == "joint")

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a clip.

        Raises:
            ShapeError: The clip is no whole number of tubelets.
        """
        sides = (frames, height, width)
        if any(side % step or side < step for side, step in zip(sides, self.tubelet, strict=True)):
            raise ShapeError(
                f"a clip of {frames} frames of {height}x{width} is no whole number of "
                f"{'x'.join(map(str, self.tubelet))} tubelets"
            )
        t, h, w = (side // step for side, step in zip(sides, self.tubelet, strict=True))
        return t, h, w

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VideoViTConfig":
        """Inverse of `to_dict`; unknown names raise ModelError."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ModelError(f"not a VideoViT configuration: {error}") from None


@dataclass(frozen=True, kw_only=True)
class VideoViTOutput:
    """What a `VideoViT` returns.

    Args:
        logits: [B, classes] of the named task, [B, N] of a dense one; for numbered tasks the heads
            of all classification tasks side by side, [B, all classes].
        last_hidden_state: [B, tokens, C] after the final norm.
    """

    logits: Tensor
    last_hidden_state: Tensor


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys and rotary positions."""

    runtime: Any = None
    """Set by `tubelet.accelerate` while recipes are on the model."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)

    def project(self, x: Tensor, table: Table | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values [B, H, N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _unit(q, self.norm_q), _unit(k, self.norm_k)
        if table is not None:
            q, k = apply_rotary(q, *table), apply_rotary(k, *table)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(
        self, x: Float[Tensor, "b n c"], table: Table | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attend over all tokens of each row of the batch."""
        q, k, v = self.project(x, table)

        def dense() -> Tensor:
            return attention(q, k, v)[0].transpose(1, 2)

        if self.runtime is None:
            mixed = dense()
        else:
            mixed = self.runtime.attend(self, q, k, v, q.shape[-1] ** -0.5, dense)
        return self.out(mixed.flatten(2))


def _unit(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """The norm in float32 whatever the weights are in; torch's fused kernel wants one dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.eps)


class AxisAttention(Attention):
    """Half of the heads attend along time, the other half within each frame."""

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        table: Table | None = None,
        grid: tuple[int, int] = (1, 1),
    ) -> Float[Tensor, "b n c"]:
        """`grid` is (frames, places)."""
        frames, places = grid
        half = self.heads // 2

        def boxes(y: Tensor) -> Tensor:
            return y.unflatten(2, (frames, places))

        q, k, v = (boxes(y) for y in self.project(x, table))
        time = [y[:, :half].permute(0, 3, 1, 2, 4).flatten(0, 1) for y in (q, k, v)]
        space = [y[:, half:].transpose(1, 2).flatten(0, 1) for y in (q, k, v)]
        along = attention(*time)[0].unflatten(0, (-1, places)).permute(0, 3, 1, 2, 4)
        within = attention(*space)[0].unflatten(0, (-1, frames)).permute(0, 1, 3, 2, 4)
        return self.out(torch.cat([along, within], dim=3).flatten(3).flatten(1, 2))


def _mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Layer(nn.Module):
    """Pre-norm transformer layer over all tokens of a row."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attention = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = _mlp(config.width, config.mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        positions: Int[Tensor, "p n"] | None = None,
        table: Table | None = None,
    ) -> Float[Tensor, "b n c"]:
        """`positions` picks the rows of the rotary table; None means all in order."""
        if table is not None and positions is not None:
            table = (table[0][positions], table[1][positions])
        x = x + self.attention(self.norm1(x), table)
        return x + self.mlp(self.norm2(x))


class DividedLayer(Layer):
    """Attention along time, then within each frame, then the MLP."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__(config)
        self.norm0 = nn.LayerNorm(config.width, eps=1e-6)
        self.temporal = Attention(config.width, config.heads)

    def along_time(self, x: Float[Tensor, "rows frames c"], table: Table | None) -> Tensor:
        """The first attention with its residual; a row is a place of one sample."""
        return x + self.temporal(self.norm0(x), table)

    def within_frames(self, x: Float[Tensor, "rows places c"], table: Table | None) -> Tensor:
        """The second attention with its residual; a row is a frame of one sample."""
        return x + self.attention(self.norm1(x), table)

    def forward(
        self, x: Tensor, grid: tuple[int, int] = (1, 1), table: Table | None = None
    ) -> Tensor:
        """`grid` is (frames, places); both attentions read the same table."""
        frames, places = grid
        time = space = None
        if table is not None:
            cos, sin = (y.unflatten(0, (frames, places)) for y in table)
            time, space = (cos[:, 0], sin[:, 0]), (cos[0], sin[0])
        x = x.unflatten(1, (frames, places)).transpose(1, 2).flatten(0, 1)
        x = self.along_time(x, time)
        x = x.unflatten(0, (-1, places)).transpose(1, 2).flatten(0, 1)
        x = self.within_frames(x, space)
        x = x.unflatten(0, (-1, frames)).flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class AxisLayer(Layer):
    """Factorised dot-product attention, then the MLP."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__(config)
        self.attention = AxisAttention(config.width, config.heads)

    def forward(
        self, x: Tensor, grid: tuple[int, int] = (1, 1), table: Table | None = None
    ) -> Tensor:
        """`grid` is (frames, places)."""
        x = x + self.attention(self.norm1(x), table, grid)
        return x + self.mlp(self.norm2(x))


class Embeddings(nn.Module):
    """Tubelets to tokens, the class token and the task's prompt."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__()
        self.config = config
        depth, tall, wide = config.tubelet
        self.patch = nn.Linear(3 * depth * tall * wide, config.width)
        self.prompt = nn.Embedding(len(config.task_names), config.width)
        if config.pool == "class":
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.positions == "learned":
            num = torch.Size(config.grid(config.frames, *config.size)).numel()
            self.place = nn.Parameter(torch.zeros(1, num, config.width))

    def forward(self, pixels: Float[Tensor, "b t 3 h w"], task: Int[Tensor, "b"]) -> Tensor:
        """[B, tokens, C] in raster order behind the class token."""
        batch, frames, _, height, width = pixels.shape
        t, h, w = self.config.grid(frames, height, width)
        depth, tall, wide = self.config.tubelet
        boxes = pixels.reshape(batch, t, depth, 3, h, tall, w, wide)
        tokens = self.patch(boxes.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3))
        if self.config.positions == "learned":
            if self.place.shape[1] != tokens.shape[1]:
                raise ShapeError(
                    f"learned positions are for {self.place.shape[1]} tokens, the clip has "
                    f"{tokens.shape[1]}; rotary positions take any clip"
                )
            tokens = tokens + self.place
        prompt = self.prompt(task)[:, None]
        if self.config.pool == "mean":
            return tokens + prompt
        if self.config.attention == "factorised-encoder":
            # The class token joins behind the spatial layers, one per clip.
            return tokens
        return torch.cat([(self.class_token + prompt).to(tokens.dtype), tokens], dim=1)


class VideoViT(nn.Module):
    """A video encoder with one head per task.

    Example:
        >>> model = VideoViT(VideoViTConfig(width=64, depth=2, heads=2))
        >>> model(torch.randn(1, 16, 3, 64, 64), task="direction").logits.shape
        torch.Size([1, 8])
    """

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        kinds = {"divided": DividedLayer, "factorised-dot-product": AxisLayer}
        kind = kinds.get(config.attention, Layer)
        self.layers = nn.ModuleList(kind(config) for _ in range(config.depth))
        if config.attention == "factorised-encoder":
            self.temporal = nn.ModuleList(Layer(config) for _ in range(config.temporal_depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.heads = nn.ModuleDict({n: nn.Linear(config.width, k) for n, k in config.tasks.items()})
        self.dense_heads = nn.ModuleDict(
            {n: nn.Linear(config.width, 1) for n in config.dense_tasks}
        )
        self.apply(_initialise)

    def forward(
        self, pixel_values: Float[Tensor, "b t 3 h w"], task: str | Int[Tensor, "b"] | None = None
    ) -> VideoViTOutput:
        """Encode clips and answer a task.

        Args:
            pixel_values: Pixels in [0, 1] minus 0.5, over 0.225.
            task: Name for the whole batch (default: the first), or numbers in the order of
                `config.task_names`, one per sample.

        Raises:
            ShapeError: The clip is no whole number of tubelets, or not [B, T, 3, H, W].
            ModelError: Unknown task.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[2] != 3:
            raise ShapeError(f"VideoViT takes [B, T, 3, H, W], got {tuple(pixel_values.shape)}")
        name, numbers = self._task(task, pixel_values)
        hidden, pooled = self.features(pixel_values, numbers)
        return VideoViTOutput(logits=self._answer(name, hidden, pooled), last_hidden_state=hidden)

    def _task(self, task: str | Tensor | None, pixels: Tensor) -> tuple[str | None, Tensor]:
        if isinstance(task, Tensor):
            if task.shape != pixels.shape[:1]:
                raise ShapeError(f"{len(pixels)} clips need as many task numbers, got {task.shape}")
            if not self.heads:
                raise ModelError("this VideoViT has dense tasks only; name one")
            return None, task
        names = self.config.task_names
        name = names[0] if task is None else task
        if name not in names:
            raise ModelError(f"this VideoViT has no task {name!r}; it has {', '.join(names)}")
        number = names.index(name)
        return name, torch.full((len(pixels),), number, device=pixels.device)

    def features(
        self, pixels: Float[Tensor, "b t 3 h w"], numbers: Int[Tensor, "b"]
    ) -> tuple[Tensor, Tensor]:
        """All tokens [B, tokens, C] after the final norm, and what the heads read, [B, C]."""
        x = self.embeddings(pixels, numbers)
        grid = self.config.grid(pixels.shape[1], *pixels.shape[3:])
        frames, places = grid[0], grid[1] * grid[2]
        if self.config.attention == "factorised-encoder":
            return self._factorised(x, grid, numbers)
        table = self._table(grid, x.device, self.config.class_tokens)
        for layer in self.layers:
            if self.config.attention == "joint":
                x = layer(x, None, table)
            else:
                x = layer(x, (frames, places), table)
        return self.norm(x), self._pooled(x)

    def _pooled(self, x: Tensor) -> Tensor:
        """[B, C]. The norm follows the mean, so that pooling takes a token that stands for others
        by its size, as token reductions promise."""
        return self.norm(x[:, 0] if self.config.pool == "class" else x.mean(1))

    def _factorised(
        self, x: Tensor, grid: tuple[int, int, int], numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        frames = grid[0]
        x = x.unflatten(1, (frames, -1)).flatten(0, 1)
        table = self._table((1, grid[1], grid[2]), x.device)
        for layer in self.layers:
            x = layer(x, None, table)
        rows = x.mean(1).unflatten(0, (-1, frames))
        if self.config.pool == "class":
            prompt = self.embeddings.prompt(numbers)[:, None]
            start = (self.embeddings.class_token + prompt).to(rows.dtype)
            rows = torch.cat([start, rows], dim=1)
        table = self._table((frames, 1, 1), x.device, int(self.config.pool == "class"))
        for layer in self.temporal:
            rows = layer(rows, None, table)
        return self.norm(x).unflatten(0, (-1, frames)).flatten(1, 2), self._pooled(rows)

    def _table(
        self, grid: tuple[int, int, int], device: torch.device, before: int = 0
    ) -> Table | None:
        """Rotary table of the grid; leading tokens are not rotated."""
        if self.config.positions != "rotary":
            return None
        places = F.pad(grid_coordinates(*grid, device=device), (0, 0, before, 0))
        return rotary_table(places, self.config.width // self.config.heads)

    def _answer(self, name: str | None, hidden: Tensor, pooled: Tensor) -> Tensor:
        if name is None:
            return torch.cat([head(pooled) for head in self.heads.values()], dim=-1)
        if name in self.heads:
            return self.heads[name](pooled)
        return self.dense_heads[name](hidden[:, self.config.class_tokens :])[..., 0]

    def class_range(self, task: str) -> slice:
        """Columns of a classification task in the logits of numbered tasks."""
        if task not in self.config.tasks:
            known = ", ".join(self.config.tasks) or "none"
            raise ModelError(f"no classification task {task!r}; this VideoViT has {known}")
        names = list(self.config.tasks)
        start = sum(self.config.tasks[n] for n in names[: names.index(task)])
        return slice(start, start + self.config.tasks[task])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    if isinstance(module, Embeddings):
        for name in ("class_token", "place"):
            if hasattr(module, name):
                nn.init.trunc_normal_(getattr(module, name), std=0.02)
