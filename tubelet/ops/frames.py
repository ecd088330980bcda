"""Frames: which of a clip, at what resolution, and what a question makes of them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.ops.cosine import cosine


def evenly_spaced(
    num: int, frames: int, device: torch.device | str | None = None
) -> Int[Tensor, "k"]:
    """Middle frame of each of `num` equal stretches of a clip, ascending.

    Args:
        num: How many, in [1, frames].
        frames: Length of the clip.

    Raises:
        ShapeError: `num` is outside [1, frames].
    """
    if not 1 <= num <= frames:
        raise ShapeError(f"can take between 1 and {frames} frames of the clip, got {num}")
    return (2 * torch.arange(num, device=device) + 1) * frames // (2 * num)


def cells(
    height: int, width: int, rows: int, columns: int, device: torch.device | str | None = None
) -> Int[Tensor, "p"]:
    """Which of rows x columns boxes, in raster order, holds each place of a frame.

    Boxes differ by at most one row and one column of places.

    Args:
        height, width: Places of the frame.
        rows: In [1, height].
        columns: In [1, width].

    Raises:
        ShapeError: A box would be empty.
    """
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ShapeError(
            f"a frame of {height} x {width} places has no {rows} x {columns} boxes of its own"
        )
    row = torch.arange(height, device=device) * rows // height
    column = torch.arange(width, device=device) * columns // width
    return (row[:, None] * columns + column).flatten()


def merge_labelled(label: Int[Tensor, "n"]) -> TokenAssignment:
    """Tokens of one label become their mean, at the place of the first of them.

    Args:
        label: Any numbers >= 0; tokens with -1 are dropped.

    Raises:
        ShapeError: Every token is dropped.

    Notes:
        Reads the number of labels from the device.
    """
    live = (label >= 0).nonzero()[:, 0]
    if not len(live):
        raise ShapeError(f"all {len(label)} tokens would be dropped")
    found, group = label[live].unique(return_inverse=True)
    first = torch.full_like(found, len(label)).scatter_reduce(0, group, live, "amin")
    target = torch.full_like(label, -1).scatter(0, live, first[group])
    size = torch.ones(1, len(label), device=label.device)
    return TokenAssignment.merge(target[None], first.sort().values[None], size)


def likeness_to_text(
    x: Float[Tensor, "*batch c"], text: Float[Tensor, "q c"]
) -> Float[Tensor, "*batch"]:
    """Cosine of tokens and the mean direction of a text, in [-1, 1].

    Args:
        x: Tokens in the space of the text.
        text: Embeddings of any length but zero.

    Raises:
        ShapeError: There is no text.
    """
    if not len(text):
        raise ShapeError("the prompt holds no text to compare its video with; ask a question")
    direction = F.normalize(text.float(), dim=-1).mean(0)
    return cosine(x, direction)
