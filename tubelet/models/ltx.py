"""LTX-Video in diffusers: video arrives packed, and conditioning tokens stand in front of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.models.diffusion import DiffusionAdapter, Stack


def _layout(config: Any, arguments: Mapping[str, Any]) -> tuple[TokenGrid, None]:
    tokens, coordinates = arguments["hidden_states"].shape[1], arguments.get("video_coords")
    if coordinates is not None:
        frames, height, width = box(coordinates)
    elif {"num_frames", "height", "width"} <= arguments.keys():
        frames, height, width = (arguments[name] for name in ("num_frames", "height", "width"))
    else:
        raise ShapeError("LTX tells its grid by num_frames, height and width, or by video_coords")
    extra = tokens - frames * height * width
    if extra < 0:
        raise ShapeError(
            f"the LTX call has {tokens} tokens, fewer than its grid of {frames}x{height}x{width}"
        )
    return TokenGrid(frames=frames, height=height, width=width, before=extra), None


def box(coordinates: Tensor) -> tuple[int, int, int]:
    """Frames, height and width of the video that ends a token sequence.

    Args:
        coordinates: [B, 3, S] time, height and width of each token, alike in all samples. The
            video's tokens are the last ones, in raster order, and its frames begin at the lowest
            time; conditioning tokens of any frame come before.
    """
    time, rows, _ = coordinates[0].tolist()
    plane = _run(time, 1)
    width = _run(rows[-plane:], 1)
    starts = time[::-plane]
    frames = next((i for i in range(1, len(starts)) if starts[i] >= starts[i - 1]), len(starts))
    return frames, plane // width, width


def _run(values: list[float], least: int) -> int:
    """How many entries at the end equal the last one."""
    count = least
    while count < len(values) and values[-count - 1] == values[-1]:
        count += 1
    return count


ADAPTER = DiffusionAdapter(
    family="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    stacks=(Stack(blocks="transformer_blocks", attention="attn1"),),
    processor="LTXVideoAttnProcessor",
    layout=_layout,
)
