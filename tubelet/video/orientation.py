"""The display matrix: how a player turns and flips the stored picture."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tubelet.core.errors import ClipError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

# Cameras round their matrices; one degree off is still meant as a right angle.
_TOLERANCE = math.sin(math.radians(1.0))


@dataclass(frozen=True)
class Orientation:
    """A turn by a multiple of 90 degrees, after an optional mirroring.

    Attributes:
        transpose: swap rows and columns first.
        flip_x: then reverse the columns.
        flip_y: then reverse the rows.
    """

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether text in the picture would read backwards without it."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    @property
    def degrees(self) -> int:
        """Counter-clockwise turn that follows the mirroring: 0, 90, 180 or 270."""
        if self.transpose:
            return 270 if self.flip_x else 90
        return 180 if self.flip_y else 0

    def displayed_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels once applied."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, picture: Tensor) -> Tensor:
        """Turns ``[..., H, W]`` upright; a view where possible."""
        if self.transpose:
            picture = picture.transpose(-1, -2)
        flips = [axis for axis, flip in ((-1, self.flip_x), (-2, self.flip_y)) if flip]
        return picture.flip(flips) if flips else picture


def read_orientation(path: str | os.PathLike[str], frame: "VideoFrame") -> Orientation:
    """Orientation from the display matrix of a decoded frame.

    Args:
        path: the file the frame is from, for the message.
        frame: a frame from a video decoder.

    Returns:
        The turn and flips to apply; none when the frame carries no matrix.

    Raises:
        ClipError: the turn is not a multiple of 90 degrees.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    # Stored column x, row y is shown at a*x + c*y, b*x + d*y.
    a, b, _, c, d = (float(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > _TOLERANCE * max(straight, crossed):
        raise ClipError(
            f"{path}: is shown turned by {math.degrees(math.atan2(c, a)):.0f} degrees;"
            " only multiples of 90 are supported, re-encode it upright"
        )
    if crossed > straight:
        return Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Orientation(flip_x=a < 0, flip_y=d < 0)
