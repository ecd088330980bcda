"""Frames that sprites are stamped on, together with the masks of what was stamped."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample


class Canvas:
    """Pixels and object masks of a batch while it is being painted.

    Sprites are stamped through a window that is just large enough, so that painting costs little
    next to the frames themselves.

    Attributes:
        pixels: float32 `[B, T, 3, H, W]`.
        objects, relevant: bool `[B, T, H, W]`.
    """

    def __init__(self, pixels: Float[Tensor, "b t 3 h w"]) -> None:
        batch, frames, _, self.size, _ = pixels.shape
        self.pixels = pixels
        self.objects = torch.zeros(
            batch, frames, self.size, self.size, dtype=torch.bool, device=pixels.device
        )
        self.relevant = self.objects.clone()

    def stamp(
        self,
        image: Float[Tensor, "b 4 a a"],
        centre: Float[Tensor, "b t 2"],
        half: Float[Tensor, " b"],
        largest: float,
        *,
        shown: Bool[Tensor, "b t"] | None = None,
        relevant: bool = False,
        is_object: bool = True,
    ) -> None:
        """Paint one sprite per clip over what is there.

        Args:
            image: RGB and opacity of the sprite, transparent at its border.
            centre: Column and row in pixels; 0 is the centre of the first pixel.
            half: Half the side of the image in pixels.
            largest: Upper bound of `half`, known without asking the device.
            shown: Frames in which the sprite exists; all of them if None.
            relevant: Whether the answer depends on this sprite.
            is_object: Whether it counts as an object at all; scenery does not.
        """
        window = min(2 * math.ceil(largest) + 2, self.size)
        where, rows, columns = self._window(centre, window)
        across = (columns - centre[..., :1]) / half[:, None, None]
        down = (rows - centre[..., 1:]) / half[:, None, None]
        grid = torch.stack(
            [
                across[:, :, None, :].expand(-1, -1, window, -1),
                down[:, :, :, None].expand(-1, -1, -1, window),
            ],
            dim=-1,
        ).flatten(1, 2)
        paint = grid_sample(image, grid, align_corners=False)
        paint = paint.unflatten(2, (-1, window)).transpose(1, 2).flatten(3)
        colour, alpha = paint[:, :, :3], paint[:, :, 3:]
        if shown is not None:
            alpha = alpha * shown[:, :, None, None]
        self._blend(where, colour, alpha)
        if is_object:
            self._mark(self.objects, where, alpha)
            if relevant:
                self._mark(self.relevant, where, alpha)

    def _window(self, centre: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flat pixel indices `[b, t, 1, w*w]`, rows and columns `[b, t, w]` around the centres."""
        # Windows are pushed back into the frame, so no index ever needs a check.
        corner = (centre.floor() - (window // 2 - 1)).clamp(0, self.size - window).long()
        offsets = torch.arange(window, device=centre.device)
        columns, rows = corner[..., :1] + offsets, corner[..., 1:] + offsets
        where = rows[..., :, None] * self.size + columns[..., None, :]
        return where.flatten(2)[:, :, None], rows, columns

    def _blend(self, where: Tensor, colour: Tensor, alpha: Tensor) -> None:
        flat = self.pixels.flatten(3)
        where = where.expand(-1, -1, 3, -1)
        below = flat.gather(3, where)
        flat.scatter_(3, where, torch.lerp(below, colour, alpha))

    def _mark(self, mask: Tensor, where: Tensor, alpha: Tensor) -> None:
        flat, where = mask.flatten(2), where[:, :, 0]
        flat.scatter_(2, where, flat.gather(2, where) | (alpha[:, :, 0] > 0.5))
