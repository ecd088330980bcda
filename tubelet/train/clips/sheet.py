"""Clips laid out for people to look at."""

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

_GAP = 4
_PAPER = 1.0


def tile_clips(pixels: Float[Tensor, "b t 3 h w"], zoom: int) -> UInt8[Tensor, "t 3 tall wide"]:
    """All clips side by side in one video, first row first, enlarged without blurring."""
    columns = math.ceil(math.sqrt(len(pixels)))
    return _join(pixels, columns, zoom)


def film_strips(pixels: Float[Tensor, "b t 3 h w"], zoom: int) -> UInt8[Tensor, "1 3 tall wide"]:
    """One picture with a row per clip and a column per frame."""
    return _join(pixels.flatten(0, 1)[:, None], pixels.shape[1], zoom)


def _join(pixels: Tensor, columns: int, zoom: int) -> Tensor:
    clips = pixels.mul(255).round().to(torch.uint8)
    clips = clips.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    paper = round(_PAPER * 255)
    clips = pad(clips, (0, _GAP, 0, _GAP), value=paper)
    clips = pad(clips, (0,) * 8 + (0, -len(clips) % columns), value=paper)
    # [r, c, t, 3, h, w] to [t, 3, r, h, c, w]: rows of clips below each other.
    sheet = clips.unflatten(0, (-1, columns)).permute(2, 3, 0, 4, 1, 5)
    return sheet.flatten(4).flatten(2, 3).contiguous()
