"""The attention calls that are measured: grids, heads and widths of published models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tubelet.bench.amdahl import attention_flops
from tubelet.core.errors import TubeletError
from tubelet.core.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One self-attention call, batch 1.

    Args:
        name: As in `--shape`.
        grid: Video tokens and the text around them.
        heads: Query heads, and as many key heads.
        width: Channels per head.
    """

    name: str
    grid: TokenGrid
    heads: int
    width: int

    @property
    def tokens(self) -> int:
        """Queries, and as many keys."""
        return self.grid.num_tokens

    @property
    def flops(self) -> float:
        """Floating-point operations of the dense call."""
        return attention_flops(self.tokens, self.heads * self.width)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        return {
            "name": self.name,
            "grid": self.grid.to_dict(),
            "tokens": self.tokens,
            "heads": self.heads,
            "width": self.width,
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


SHAPES = {
    shape.name: shape
    for shape in [
        *_both_widths("wan-480p", _WAN_480P, 12),
        *_both_widths("wan-480p-14b", _WAN_480P, 40),
        *_both_widths("wan-720p", _WAN_720P, 40),
        *_both_widths("hunyuan-720p", _HUNYUAN_720P, 24),
        Shape(name="cpu-16k", grid=TokenGrid(frames=16, height=32, width=32), heads=2, width=128),
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
    return shapes if heads is None else [replace(shape, heads=heads) for shape in shapes]
