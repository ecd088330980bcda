"""Qwen2.5-VL and Qwen3-VL: what their two adapters share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.prompt import VideoPlace, VideoRows
from tubelet.models.video_llm import call_encoder, in_turn, split_rows

CONSUMED = (
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
    "mm_token_type_ids",
)


def places(base: Any, inputs: Mapping[str, Any], found: Tensor) -> list[VideoPlace]:
    """One video per row of `video_grid_thw`, in merged patches."""
    merge = base.config.vision_config.spatial_merge_size
    sizes = inputs.get("video_grid_thw")
    if sizes is None:
        raise ShapeError("pixel_values_videos needs video_grid_thw beside it")
    grids = [TokenGrid(frames=t, height=h // merge, width=w // merge) for t, h, w in sizes.tolist()]
    counts = [grid.num_video for grid in grids]
    rows = [torch.arange(n, device=found.device) for n in counts]
    return in_turn(found, counts, grids, rows)


def encode(base: Any, inputs: Mapping[str, Any], where: Sequence[VideoPlace]) -> list[VideoRows]:
    """Merged patches in raster order, and DeepStack planes where the tower makes some."""
    out = call_encoder(base, "get_video_features", inputs)
    rows = split_rows(out.pooler_output, where)
    made = getattr(out, "deepstack_features", None) or ()
    planes = zip(*(split_rows(plane, where) for plane in made), strict=True)
    split = list(planes) if made else [()] * len(rows)
    return [VideoRows(rows=x, planes=tuple(p)) for x, p in zip(rows, split, strict=True)]


def positions(base: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
    """[3, B, S] time, height and width positions of the whole prompt."""
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        kinds = (ids == base.config.video_token_id).int() * 2
    timing = {key: inputs[key] for key in ("second_per_grid_ts",) if inputs.get(key) is not None}
    found, _ = base.get_rope_index(
        ids,
        mm_token_type_ids=kinds,
        video_grid_thw=inputs["video_grid_thw"],
        attention_mask=mask.long(),
        **timing,
    )
    if found.shape != (3, *ids.shape):
        raise UnsupportedError(f"get_rope_index gave {tuple(found.shape)} positions, not [3, B, S]")
    return found
