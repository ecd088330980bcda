"""A small video diffusion transformer in pixel space, with full attention over space and time.

Conventions, shared with `tubelet.nn.flow`:

- The network sees and predicts pixels in [-1, 1]; users see [0, 1].
- Time t runs from 0 (noise) to 1 (data): x_t = (1 - t) noise + t data.
- The network predicts the clean clip x, not the velocity. Pixel patches live on a thin sheet that
  noise leaves, so clean pixels are the easier target; the velocity follows as
  (x - x_t) / (1 - t).
- Tokens are patches in raster order (t, h, w), positions are rotary in token units: any number of
  frames and any size that are whole patches run.

Sources: DiT (Peebles & Xie, 2023, arXiv:2212.09748), one modulation network for all blocks plus a
table per block (PixArt-alpha, Chen et al., 2023, arXiv:2310.00426), clean prediction on raw
patches (Li & He, 2025, arXiv:2511.13720).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.errors import ModelError, ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.kernels.attention import attention
from tubelet.nn.rotary import apply_rotary, grid_coordinates, rotary_table

CHANNELS = 3
FREQUENCIES = 256
"""Channels of the sinusoidal time code."""

TIME_UNITS = 1000.0
"""Times in [0, 1] are stretched by this before the sinusoids, as in earlier diffusion models."""


@dataclass(frozen=True, kw_only=True)
class VideoDiTConfig:
    """Sizes of a `VideoDiT`.

    Raises:
        ShapeError: A size is not positive, or sizes do not divide.
    """

    width: int = 256
    depth: int = 8
    heads: int = 4
    mlp_ratio: float = 4.0  # hidden width of the MLP over `width`
    patch: tuple[int, int, int] = (2, 4, 4)  # frames, height, width of a token in pixels
    frames: int = 16  # of the clips it was trained on; others run too
    size: tuple[int, int] = (128, 128)  # height, width of these clips in pixels
    attributes: tuple[int, ...] = (5, 6, 8, 4, 2)  # number of values of each attribute

    def __post_init__(self) -> None:
        for name in ("patch", "size", "attributes"):
            # A configuration read from JSON holds lists.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = (self.width, self.depth, self.heads, *self.patch, self.frames, *self.size)
        if min(*sizes, *self.attributes) < 1 or self.mlp_ratio <= 0:
            raise ShapeError(f"every size of a VideoDiT must be positive, got {self}")
        if self.width % self.heads or self.width // self.heads % 2 or self.width_per_head < 6:
            raise ShapeError(
                f"width {self.width} must be heads {self.heads} times an even number from 6 on"
            )
        count_tokens((self.frames, *self.size), self.patch)

    @property
    def width_per_head(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VideoDiTConfig":
        """Inverse of `to_dict`; unknown names raise ModelError."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ModelError(f"not a VideoDiT configuration: {error}") from None


class VideoDiT(nn.Module):
    """Predicts the clean clip from a noisy one, given its time and attributes.

    The output layer and all gates start at zero: a new model predicts 0, mid-grey, everywhere.
    Blocks are in `model.blocks[i]` with submodules `norm1, attention, norm2, mlp`.
    """

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, values = config.width, CHANNELS * math.prod(config.patch)
        self.embed = nn.Linear(values, width)
        self.time_embed = nn.Sequential(
            nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        # Row 0 stands for a dropped attribute, row 1 + i for value i.
        self.attribute_embed = nn.ModuleList(nn.Embedding(n + 1, width) for n in config.attributes)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, values)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in self.attribute_embed:
            # As large as the time code, so that a short training notices the attributes.
            nn.init.normal_(table.weight, std=0.3)
        for layer in (self.modulation, self.modulation_out, self.head):
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        noisy: Float[Tensor, "b t 3 h w"],
        time: Float[Tensor, "b"],
        attributes: Int[Tensor, "b a"],
    ) -> Float[Tensor, "b t 3 h w"]:
        """Predict the clean clip.

        Args:
            noisy: x_t, pixels in about [-1, 1] plus noise; T, H, W are whole patches.
            time: t of each clip in [0, 1], 1 is clean.
            attributes: int64, value of each attribute; -1 is dropped. All -1 is unconditional.

        Returns:
            The clean clip in [-1, 1], not clamped, in the dtype of `noisy`.

        Raises:
            ShapeError: Shapes do not fit. Values are not looked at, which would stop a GPU; see
                `check_attributes`.
        """
        tokens = self._check(noisy, time, attributes)
        hidden = self.embed(patchify(noisy, self.config.patch).to(self.embed.weight.dtype))
        condition = self.condition(time, attributes)
        modulation = self.modulation(condition).unflatten(-1, (6, -1))
        place = grid_coordinates(*tokens, noisy.device)
        cos, sin = rotary_table(place, self.config.width_per_head)
        for block in self.blocks:
            hidden = block(hidden, modulation, cos, sin)
        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
        values = self.head(self.norm_out(hidden) * (1 + scale) + shift)
        return unpatchify(values, tokens, self.config.patch).to(noisy.dtype)

    def condition(
        self, time: Float[Tensor, "b"], attributes: Int[Tensor, "b a"]
    ) -> Float[Tensor, "b c"]:
        """What time and attributes say to every block, after its activation."""
        code = time_code(time, FREQUENCIES).to(self.embed.weight.dtype)
        tables = zip(self.attribute_embed, attributes.unbind(1), strict=True)
        return F.silu(self.time_embed(code) + sum(table(value + 1) for table, value in tables))

    def grid(self, clip: Float[Tensor, "b t 3 h w"]) -> TokenGrid:
        """Token geometry of a clip.

        Raises:
            ShapeError: It is not [batch, frames, 3, height, width] in whole patches.
        """
        frames, height, width = self._tokens(clip)
        return TokenGrid(frames=frames, height=height, width=width)

    def _tokens(self, clip: Tensor) -> tuple[int, int, int]:
        if clip.ndim != 5 or clip.shape[2] != CHANNELS:
            raise ShapeError(
                f"a clip must be [batch, frames, 3, height, width], got {tuple(clip.shape)}"
            )
        return count_tokens((clip.shape[1], *clip.shape[3:]), self.config.patch)

    def _check(self, noisy: Tensor, time: Tensor, attributes: Tensor) -> tuple[int, int, int]:
        tokens, batch, kinds = self._tokens(noisy), noisy.shape[0], len(self.config.attributes)
        if time.shape != (batch,):
            raise ShapeError(f"time must be [batch] = [{batch}], got {tuple(time.shape)}")
        if attributes.shape != (batch, kinds) or attributes.is_floating_point():
            raise ShapeError(
                f"attributes must be whole numbers [batch, kinds] = [{batch}, {kinds}], got "
                f"{attributes.dtype} {tuple(attributes.shape)}"
            )
        return tokens


class Block(nn.Module):
    """Attention and MLP, each behind a norm that time and attributes shift, scale and gate."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(
        self,
        hidden: Float[Tensor, "b n c"],
        modulation: Float[Tensor, "b 6 c"],
        cos: Float[Tensor, "*b n d"],
        sin: Float[Tensor, "*b n d"],
    ) -> Float[Tensor, "b n c"]:
        """One layer.

        Args:
            hidden: Tokens; any subset, as long as the tables hold the same tokens.
            modulation: Shift, scale, gate of the attention, then of the MLP, before the block's
                own table is added.
            cos, sin: From `rotary_table`, [N, D] or [B, N, D].
        """
        parts = (modulation + self.table)[:, :, None].unbind(1)
        shift, scale, gate = parts[:3]
        mixed = self.attention(self.norm1(hidden) * (1 + scale) + shift, cos, sin)
        hidden = hidden + gate * mixed
        shift, scale, gate = parts[3:]
        return hidden + gate * self.mlp(self.norm2(hidden) * (1 + scale) + shift)


class Attention(nn.Module):
    """Self-attention over all tokens with normalised queries and keys and rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.runtime: Any = None
        """Set by an adapter; its `attend` then computes or replaces every call."""

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        cos: Float[Tensor, "*b n d"],
        sin: Float[Tensor, "*b n d"],
    ) -> Float[Tensor, "b n c"]:
        """Attention of one block, projections included."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Under autocast the norm's weights are float32; fused norms and kernels want one dtype.
        wide = self.norm_q.weight.dtype
        q = apply_rotary(self.norm_q(q.to(wide)), cos, sin).to(v.dtype)
        k = apply_rotary(self.norm_k(k.to(wide)), cos, sin).to(v.dtype)
        return self.out(self.attend(q, k, v, q.shape[-1] ** -0.5).flatten(2))

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        scale: float,
    ) -> Float[Tensor, "b n h d"]:
        """The attention call itself; the place where sparse attention enters."""

        def host() -> Tensor:
            return attention(q, k, v, scale=scale)[0].transpose(1, 2)

        if self.runtime is None:
            return host()
        return self.runtime.attend(self, q, k, v, scale, host)


def count_tokens(clip: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens in time, height and width of a clip of (frames, height, width).

    Raises:
        ShapeError: The clip is empty or not a whole number of patches.
    """
    if min(clip) < 1 or any(n % p for n, p in zip(clip, patch, strict=True)):
        raise ShapeError(
            f"a clip of {clip[0]} frames, {clip[1]} x {clip[2]} is not a whole number of patches "
            f"{patch}; crop or pad it"
        )
    return clip[0] // patch[0], clip[1] // patch[1], clip[2] // patch[2]


def patchify(
    clip: Float[Tensor, "b t c h w"], patch: tuple[int, int, int]
) -> Float[Tensor, "b n v"]:
    """Cut a clip into patches in raster order; V = frames x height x width x channels of one."""
    batch, frames, channels, height, width = clip.shape
    f, y, x = patch
    cut = clip.reshape(batch, frames // f, f, channels, height // y, y, width // x, x)
    return cut.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(batch, -1, f * y * x * channels)


def unpatchify(
    values: Float[Tensor, "b n v"], tokens: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Tensor, "b t c h w"]:
    """Inverse of `patchify`."""
    f, y, x = patch
    frames, height, width = tokens
    cut = values.reshape(-1, *tokens, f, y, x, CHANNELS).permute(0, 1, 4, 7, 2, 5, 3, 6)
    return cut.reshape(-1, frames * f, CHANNELS, height * y, width * x)


def time_code(time: Float[Tensor, "b"], width: int) -> Float[Tensor, "b w"]:
    """Cosines, then sines, of 1000 t at rates from 1 down to 1e-4; float32."""
    half = width // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angle = TIME_UNITS * time.float()[:, None] * torch.exp(-math.log(10_000.0) * steps)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def check_attributes(attributes: Int[Tensor, "b a"], counts: Sequence[int]) -> None:
    """Refuse attributes that a model with these `counts` has no row for. Waits for the device.

    Raises:
        ShapeError: Not whole numbers [batch, kinds], or a value outside -1 .. count - 1.
    """
    shape = tuple(attributes.shape)
    if len(shape) != 2 or shape[1] != len(counts) or shape[0] < 1:
        raise ShapeError(f"attributes must be [batch, {len(counts)}], got {shape}")
    if attributes.is_floating_point() or attributes.dtype == torch.bool:
        raise ShapeError(f"attributes must be whole numbers (int64), got {attributes.dtype}")
    for kind, (column, count) in enumerate(zip(attributes.T.tolist(), counts, strict=True)):
        wrong = [value for value in column if not -1 <= value < count]
        if wrong:
            raise ShapeError(
                f"attribute {kind} must be 0 to {count - 1}, or -1 for dropped, got {wrong[0]}"
            )


def forward_flops(config: VideoDiTConfig, tokens: int) -> int:
    """Multiply-adds x 2 of one forward of one clip with this many tokens: projections, attention
    products and MLP; norms and modulation are below 1 % and left out."""
    hidden = int(config.width * config.mlp_ratio)
    per_token = 4 * config.width**2 + 2 * config.width * hidden
    attention_products = 2 * tokens * config.width
    ends = 2 * config.width * CHANNELS * math.prod(config.patch)
    return 2 * tokens * (config.depth * (per_token + attention_products) + ends)
