"""What `make_clips` returns: pixels, labels and what the simulator knows about every pixel."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool3d

from tubelet.core.errors import ShapeError

MIN_COVER = 0.25
"""Share of a token's pixels that objects must cover for its dense label to be true."""


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one task.

    Attributes:
        task: Name in `TASKS`.
        pixels: float32 `[B, T, 3, H, W]`, RGB in [0, 1].
        labels: int64 `[B]`, the answer; zeros for the dense task `mask`.
        objects: bool `[B, T, H, W]`, pixels of any simulated object, seen or covered by another.
        relevant: bool `[B, T, H, W]`, pixels of the objects that the answer depends on.
        backgrounds: int64 `[B]`, index into `BACKGROUNDS`.
    """

    task: str
    pixels: Float[Tensor, "b t 3 h w"]
    labels: Int[Tensor, " b"]
    objects: Bool[Tensor, "b t h w"]
    relevant: Bool[Tensor, "b t h w"]
    backgrounds: Int[Tensor, " b"]

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def to(self, device: torch.device | str) -> "ClipBatch":
        """The same batch on another device."""
        return ClipBatch(
            self.task,
            self.pixels.to(device),
            self.labels.to(device),
            self.objects.to(device),
            self.relevant.to(device),
            self.backgrounds.to(device),
        )

    def token_mask(self, which: str, tubelet: tuple[int, int, int]) -> Bool[Tensor, "b n"]:
        """Tokens that hold any pixel of the objects, in raster order (t, h, w).

        Args:
            which: `objects` or `relevant`.
            tubelet: Frames, rows and columns of a token. A moving object counts wherever it was
                in any of these frames.

        Raises:
            ShapeError: An unknown `which`, or a tubelet that does not divide the clip.
        """
        return self._cover(which, tubelet) > 0

    def dense_labels(self, tubelet: tuple[int, int, int]) -> Bool[Tensor, "b n"]:
        """Tokens of which objects cover at least `MIN_COVER`, in raster order (t, h, w).

        Raises:
            ShapeError: A tubelet that does not divide the clip.
        """
        return self._cover("objects", tubelet) >= MIN_COVER - 1e-6

    def _cover(self, which: str, tubelet: tuple[int, int, int]) -> Float[Tensor, "b n"]:
        if which not in ("objects", "relevant"):
            raise ShapeError(f"unknown mask {which!r}; choose objects or relevant")
        mask = self.objects if which == "objects" else self.relevant
        size = tuple(mask.shape[1:])
        if len(tubelet) != 3 or any(p < 1 or n % p for n, p in zip(size, tubelet, strict=True)):
            raise ShapeError(
                f"a tubelet must divide the clip of {size} frames, rows, columns, got {tubelet}"
            )
        return avg_pool3d(mask[:, None].float(), tubelet).flatten(1)
