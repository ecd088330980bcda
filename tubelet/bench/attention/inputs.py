"""Queries, keys, values and block lists to measure on; the same for the same seed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.bench.attention.shapes import Shape
from tubelet.core.block_mask import BlockMask

FIELDS = ("structured", "random")
"""What queries and keys look like; see `make_inputs`."""

CHANNELS = 32
"""Independent features of a place; fewer make attention peakier."""

SCALES = ((4, 8, 8), (21, 6, 6), (2, 12, 12))
"""Cells along (frames, height, width) of the coarse fields: heads of one field attend near in
space and time, those of the next mainly in space, those of the last mainly in time."""

OWN = 0.1
"""Share of a token's variance that no neighbour shares."""

PROMPT_SCALES = ((16, 8, 8), (64, 6, 6), (2, 16, 16))
"""The same for prompts of language models, which have many more frames."""

SINKS = 4
"""First tokens of a prompt that all queries are drawn to."""

DRAWN = 0.9
"""How much of a prompt's queries, sinks and lines points one way, relative to their own part."""

Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(
    shape: Shape, kind: str, *, seed: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Queries [1, H, N, D], keys and values [1, G, N, D], in the memory order of hosts.

    That is [1, N, H, D]. Queries and keys have unit mean square, as after the query-key norm of
    current models. "random": Gaussian, without structure. "structured": random projections of
    smooth random fields over the video, so that attention falls off with distance, differently
    from head to head. In prompts, heads of a key head share a field, and what video language
    models are reported to have is added: all queries are drawn to the first tokens, and to
    evenly spaced lines of video tokens, one place of every frame or one column of every row in
    turn, from key head to key head. It is made to be like real attention, not taken from it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    full = (shape.tokens, shape.heads, shape.width)
    few = (shape.tokens, shape.key_heads or shape.heads, shape.width)
    v = torch.randn(few, generator=generator, device=device, dtype=dtype)
    if kind == "random":
        q, k = (
            torch.randn(size, generator=generator, device=device, dtype=dtype)
            for size in (full, few)
        )
    elif shape.causal:
        q, k = _prompt(shape, generator, device, dtype)
    else:
        q, k = _structured(shape, generator, device, dtype)
    return tuple(x[None].transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]


def _structured(
    shape: Shape, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    fields = [_field(shape, cells, generator, device) for cells in SCALES]
    q, k = (
        torch.empty(shape.tokens, shape.heads, shape.width, device=device, dtype=dtype)
        for _ in range(2)
    )
    for head in range(shape.heads):
        features = fields[head % len(fields)]
        weight = torch.randn(CHANNELS, shape.width, generator=generator, device=device)
        change = torch.randn(CHANNELS, shape.width, generator=generator, device=device)
        for target, part in ((q, weight), (k, 0.9 * weight + 0.44 * change)):
            projected = features @ part
            target[:, head] = F.rms_norm(projected, (shape.width,)).to(dtype)
    return q, k


def _prompt(
    shape: Shape, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    groups, width, grid = shape.heads // shape.groups, shape.width, shape.grid
    fields = [_field(shape, cells, generator, device) for cells in PROMPT_SCALES]
    video, place = shape.layout(device)
    q = torch.empty(shape.tokens, shape.heads, width, device=device, dtype=dtype)
    k = torch.empty(shape.tokens, groups, width, device=device, dtype=dtype)

    def unit(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    for group in range(groups):
        features = fields[group % len(fields)]
        weight, away = unit(CHANNELS, width), DRAWN * F.rms_norm(unit(width), (width,))
        spacing = grid.per_frame if group % 2 == 0 else grid.width
        phase = torch.randint(spacing, (), generator=generator, device=device)
        line = (video == 0) & (place % spacing == phase)
        line[:SINKS] = True
        own = F.rms_norm(features @ weight, (width,)) + line[:, None] * away
        k[:, group] = F.rms_norm(own, (width,)).to(dtype)
        for head in range(group * shape.groups, (group + 1) * shape.groups):
            mixed = 0.9 * weight + 0.44 * unit(CHANNELS, width)
            own = F.rms_norm(features @ mixed, (width,)) + away
            q[:, head] = F.rms_norm(own, (width,)).to(dtype)
    return q, k


def _field(
    shape: Shape, cells: tuple[int, int, int], generator: torch.Generator, device: torch.device
) -> Tensor:
    """[N, CHANNELS] features of unit variance, smooth over the video; text gets noise only."""
    grid = shape.grid
    noise = torch.randn(shape.tokens, CHANNELS, generator=generator, device=device)
    coarse = torch.randn(1, CHANNELS, *cells, generator=generator, device=device)
    size = (grid.frames, grid.height, grid.width)
    fine = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)[0]
    fine = fine.flatten(1).transpose(0, 1)
    video = shape.video_places(device)
    noise[video] = OWN**0.5 * noise[video] + (1 - OWN) ** 0.5 * fine / fine.std()
    return noise


def random_lists(
    shape: Shape, block: tuple[int, int], density: float, *, seed: int, device: torch.device
) -> BlockMask:
    """Random key blocks for every query block of every head, the same number everywhere.

    Lists are in ascending order, as kernels like them and policies return them.

    Args:
        shape: Of the call.
        block: (query, key) block sizes in tokens.
        density: Share of the key blocks, in (0, 1]; at least one is kept.
        seed: Of the choice.
        device: Where the lists live.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows, columns = (-(-shape.tokens // size) for size in block)
    keep = max(1, round(density * columns))
    lists = torch.empty(1, shape.heads, rows, keep, dtype=torch.int32, device=device)
    # Head by head: scores of all heads at once would take gigabytes.
    for head in range(shape.heads):
        scores = torch.rand(rows, columns, generator=generator, device=device)
        lists[0, head] = scores.topk(keep, dim=-1).indices.sort(dim=-1).values.to(torch.int32)
    counts = torch.full(lists.shape[:3], keep, dtype=torch.int32, device=device)
    return BlockMask(
        counts=counts, indices=lists, block=block, num_queries=shape.tokens, num_keys=shape.tokens
    )
