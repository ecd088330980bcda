"""Geometry of a token sequence: a box of video tokens with other tokens around it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tubelet.core.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Where each token of one sample sits in the video.

    A sequence is `before` extra tokens (class, text), then `frames * height * width` video
    tokens in raster order (time outermost, width innermost), then `after` extra tokens.

    Args:
        frames: Token rows in time (clip frames / tubelet length), >= 1.
        height: Token rows in space, >= 1.
        width: Token columns in space, >= 1.
        before: Tokens in front of the video tokens, >= 0.
        after: Tokens behind them (text, padding), >= 0.

    Raises:
        ShapeError: A count is not an integer or is below its minimum.
    """

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("frames", 1),
            ("height", 1),
            ("width", 1),
            ("before", 0),
            ("after", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ShapeError(f"TokenGrid {name} must be an integer >= {least}, got {value!r}")

    @property
    def per_frame(self) -> int:
        """Video tokens in one frame."""
        return self.height * self.width

    @property
    def num_video(self) -> int:
        """Video tokens in total."""
        return self.frames * self.per_frame

    @property
    def num_tokens(self) -> int:
        """All tokens, extra ones included."""
        return self.before + self.num_video + self.after

    def protected(self, device: torch.device | str | None = None) -> Bool[Tensor, "n"]:
        """True for tokens that are not video tokens: no recipe may drop or merge them."""
        mask = torch.ones(self.num_tokens, dtype=torch.bool, device=device)
        mask[self.before : self.before + self.num_video] = False
        return mask

    def frame_index(self, device: torch.device | str | None = None) -> Int[Tensor, "n"]:
        """Frame of each token, -1 for tokens outside the video."""
        index = torch.full((self.num_tokens,), -1, dtype=torch.int64, device=device)
        frames = torch.arange(self.frames, device=device).repeat_interleave(self.per_frame)
        index[self.before : self.before + self.num_video] = frames
        return index

    def coordinates(self, device: torch.device | str | None = None) -> Int[Tensor, "v 3"]:
        """(t, h, w) of each video token, in raster order."""
        axes = [torch.arange(n, device=device) for n in (self.frames, self.height, self.width)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TokenGrid":
        """Inverse of `to_dict`."""
        return cls(**data)

    def __str__(self) -> str:
        extra = f" + {self.before + self.after}" if self.before + self.after else ""
        return f"{self.frames}x{self.height}x{self.width}{extra}"
