"""The attention calls that are measured: grids, heads and widths of published models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import TubeletError
from tubelet.core.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One self-attention call, batch 1.

    Args:
        name: As in `--shape`.
        grid: Video tokens and the text around them.
        heads: Query heads.
        width: Channels per head.
        key_heads: Key heads, a divisor of `heads`; None for as many.
        causal: The prompt of a language model: no query sees a later token.
        words: Text tokens in front of and behind the tokens of each frame: its time stamp and the
            marks of its beginning and end.
    """

    name: str
    grid: TokenGrid
    heads: int
    width: int
    key_heads: int | None = None
    causal: bool = False
    words: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Queries, and as many keys."""
        return self.grid.num_tokens + self.grid.frames * sum(self.words)

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads // (self.key_heads or self.heads)

    @property
    def pairs(self) -> int:
        """Token pairs of the dense call: of a causal one the query itself and all before it."""
        return self.tokens * (self.tokens + 1) // 2 if self.causal else self.tokens**2

    @property
    def flops(self) -> float:
        """Floating-point operations of the dense call."""
        return 4.0 * self.pairs * self.heads * self.width

    def video_places(self, device: torch.device | str | None = None) -> Tensor:
        """[num_video] int64, where in the sequence each token of the video stands."""
        number = torch.arange(self.grid.num_video, device=device)
        frame, (front, behind) = number // self.grid.per_frame, self.words
        return self.grid.before + number + (frame + 1) * front + frame * behind

    def layout(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """`video` and `place` of every token, as in `core.prefill.PrefillContext`."""
        video = torch.full((self.tokens,), -1, device=device)
        place, where = torch.zeros_like(video), self.video_places(device)
        video[where] = 0
        place[where] = torch.arange(len(where), device=device)
        return video, place

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        return {
            "name": self.name,
            "grid": self.grid.to_dict(),
            "tokens": self.tokens,
            "heads": self.heads,
            "key_heads": self.key_heads or self.heads,
            "width": self.width,
            "causal": self.causal,
            "words": list(self.words),
        }


_WAN_480P = TokenGrid(frames=21, height=30, width=52)
_WAN_720P = TokenGrid(frames=21, height=45, width=80)
_HUNYUAN_720P = TokenGrid(frames=33, height=45, width=80, after=256)


def _both_widths(name: str, grid: TokenGrid, heads: int) -> list[Shape]:
    """A shape of head width 128, and the same channels in heads of 64."""
    return [
        Shape(name=name, grid=grid, heads=heads, width=128),
        Shape(name=f"{name}-d64", grid=grid, heads=2 * heads, width=64),
    ]


def _qwen3_vl(name: str, frames: int, question: int) -> Shape:
    """Attention of Qwen3-VL-8B over 14 words, frames of 512 x 512 pixels, and a question.

    In front of each frame stand a time stamp of 6 tokens and a mark, behind it a mark.
    """
    grid = TokenGrid(frames=frames, height=16, width=16, before=14, after=question)
    return Shape(name=name, grid=grid, heads=32, key_heads=8, width=128, causal=True, words=(7, 1))


SHAPES = {
    shape.name: shape
    for shape in [
        *_both_widths("wan-480p", _WAN_480P, 12),
        *_both_widths("wan-480p-14b", _WAN_480P, 40),
        *_both_widths("wan-720p", _WAN_720P, 40),
        *_both_widths("hunyuan-720p", _HUNYUAN_720P, 24),
        Shape(name="cpu-16k", grid=TokenGrid(frames=16, height=32, width=32), heads=2, width=128),
        _qwen3_vl("qwen3-vl-32k", 124, 18),
        _qwen3_vl("qwen3-vl-128k", 496, 114),
        Shape(
            name="tiny-prompt",
            grid=TokenGrid(frames=9, height=6, width=8, before=5, after=11),
            heads=4,
            key_heads=2,
            width=32,
            causal=True,
            words=(3, 1),
        ),
        Shape(
            name="tiny", grid=TokenGrid(frames=5, height=10, width=14, after=9), heads=2, width=32
        ),
    ]
}
"""By name. 14B models have the 40 heads of `wan-720p`, the 1.3B model the 12 of `wan-480p`."""

DEFAULT = {
    "cuda": ("wan-480p", "wan-480p-d64", "wan-720p", "wan-720p-d64", "hunyuan-720p"),
    "cpu": ("cpu-16k",),
}
"""What runs when no shape is named, by kind of device."""


def chosen_shapes(names: Sequence[str], device: str, heads: int | None) -> list[Shape]:
    """The shapes of these names, or the default ones of a kind of device.

    Args:
        names: As in SHAPES; none takes the default.
        device: "cuda" or "cpu".
        heads: Instead of the model's own, to bound time and memory.

    Raises:
        TubeletError: An unknown name, or no heads.
    """
    for name in names:
        if name not in SHAPES:
            raise TubeletError(f"unknown shape {name!r}; there are {', '.join(SHAPES)}")
    if heads is not None and heads < 1:
        raise TubeletError(f"heads must be at least 1, got {heads}")
    shapes = [SHAPES[name] for name in dict.fromkeys(names or DEFAULT[device])]
    return shapes if heads is None else [_with_heads(shape, heads) for shape in shapes]


def _with_heads(shape: Shape, heads: int) -> Shape:
    """Other query heads, and as many for each key head as before."""
    if heads % shape.groups:
        raise TubeletError(
            f"{shape.name} has {shape.groups} query heads per key head; heads must be a multiple "
            f"of that, got {heads}"
        )
    grouped = None if shape.key_heads is None else heads // shape.groups
    return replace(shape, heads=heads, key_heads=grouped)
