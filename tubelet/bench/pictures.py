"""What a recipe did to the clip, as pictures: dropped tokens dimmed, merged tokens coloured."""

import base64
import io
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid

DIMMED = 0.22
"""Brightness left to a dropped token."""

TINT = 0.5
"""Share of a merged token's colour."""


@dataclass(frozen=True)
class Strip:
    """The frames of one variant as JPEG data addresses, in time order."""

    name: str
    caption: str
    images: list[str]


def strips(
    frames: UInt8[Tensor, "t 3 h w"],
    grid: TokenGrid,
    assignments: dict[str, list[TokenAssignment]],
) -> list[Strip]:
    """The input and what each variant made of it, for the first sample.

    Args:
        frames: The clip as the model saw it, before normalisation.
        grid: Token geometry of the model on this clip.
        assignments: Where the original tokens ended, by variant.
    """
    step = frames.shape[0] // grid.frames
    shown = frames[::step][: grid.frames].float() / 255
    result = [Strip("input", f"{grid} tokens", [jpeg(image) for image in shown])]
    for name, parts in assignments.items():
        painted = paint(shown, grid, parts[0])
        kept, total = parts[0].num_out, parts[0].num_in
        gone = int((parts[0].index[0] < 0).sum())
        caption = (
            f"{kept} of {total} tokens left; {gone} dropped, {total - gone - kept} merged away"
        )
        result.append(Strip(name, caption, [jpeg(image) for image in painted]))
    return result


def paint(
    frames: Float[Tensor, "f 3 h w"], grid: TokenGrid, assignment: TokenAssignment
) -> Float[Tensor, "f 3 h w"]:
    """Frames in [0, 1] with dropped tokens dimmed and grey, merged tokens in their group's colour.

    Raises:
        ShapeError: The assignment is not for this grid.
    """
    if assignment.num_in != grid.num_tokens or frames.shape[0] != grid.frames:
        raise ShapeError(
            f"the assignment takes {assignment.num_in} tokens, the grid {grid} has "
            f"{grid.num_tokens}"
        )
    video = slice(grid.before, grid.before + grid.num_video)
    index = assignment.index[0, video].cpu().reshape(grid.frames, grid.height, grid.width)
    size = assignment.size[0].cpu()[index.clamp(min=0)]
    dropped, merged = index < 0, (index >= 0) & (size > 1)
    colour = _colours(assignment.num_out)[index.clamp(min=0)].permute(0, 3, 1, 2)
    tall, wide = frames.shape[2] // grid.height, frames.shape[3] // grid.width

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(tall, -2).repeat_interleave(wide, -1)

    frames = frames[..., : grid.height * tall, : grid.width * wide]
    grey = frames.mean(1, keepdim=True).expand_as(frames) * DIMMED
    tinted = frames * (1 - TINT) + spread(colour) * TINT
    out = torch.where(spread(merged)[:, None], tinted, frames)
    return torch.where(spread(dropped)[:, None], grey, out)


def jpeg(image: Float[Tensor, "3 h w"]) -> str:
    """A `data:` address of one RGB image in [0, 1]."""
    import av

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1, options={"qscale": "4"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuvj420p"
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colours(num: int) -> Float[Tensor, "n 3"]:
    # The golden ratio keeps neighbouring numbers far apart in hue.
    hue = torch.arange(num) * 0.61803398875 % 1.0
    phase = torch.tensor([0.0, 1 / 3, 2 / 3])
    return 0.5 + 0.5 * torch.cos(2 * torch.pi * (hue[:, None] - phase))
