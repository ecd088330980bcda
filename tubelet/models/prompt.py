"""Prompts of video language models: where their videos are, and the same prompt made shorter."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class VideoPlace:
    """Where one video lies in a batch of prompts.

    A host may put tokens of its own among a video's placeholders (line breaks, class tokens);
    these are placeholders that are not in `grid_rows`.

    Args:
        sample: Prompt of the batch.
        columns: [R] int64, ascending, its placeholders' places in the padded prompt.
        grid: Geometry of the video's own tokens.
        grid_rows: [grid.num_video] int64, ascending, which of the R placeholders these are.
    """

    sample: int
    columns: Tensor
    grid: TokenGrid
    grid_rows: Tensor

    @property
    def grid_columns(self) -> Tensor:
        """[N] places of the video's own tokens in the prompt."""
        return self.columns[self.grid_rows]


@dataclass(frozen=True, kw_only=True)
class VideoRows:
    """What the host would write over one video's placeholders.

    Args:
        rows: [R, C] projected features, in the order of the placeholders.
        planes: More features [R, C] that the host adds behind its first layers.
    """

    rows: Tensor
    planes: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A batch of prompts as the language model gets them.

    Args:
        ids: [B, S] int64.
        mask: [B, S] bool, False at padding.
        positions: [B, S] or [4, B, S] int64 as the host takes them; None leaves them to the host.
        index: [B, S] int64, place of each token in the prompt as the user gave it.
        video: [B, S] bool, video tokens that recipes may drop.
        written: [B, S] bool, placeholders to write over (`video` and what the host puts among
            them).
        original: [B, S] int64, which of its prompt's original video tokens a video token is
            (videos one behind the other, each in raster order); 0 elsewhere.
        size: [B, S] float32, originals that a token stands for.
        features: [M, C] what is written, in order of sample and place; None leaves the host to
            encode.
        planes: More features [M, C].
        grids: Geometry of the videos of each prompt.
        width: Tokens of the prompt as the user gave it, padding included.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    index: Tensor
    video: Tensor
    written: Tensor
    original: Tensor
    size: Tensor
    grids: tuple[tuple[TokenGrid, ...], ...]
    width: int
    features: Tensor | None = None
    planes: tuple[Tensor, ...] = ()

    @property
    def batch(self) -> int:
        """Prompts."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a prompt, padding included."""
        return self.ids.shape[1]

    @cached_property
    def full(self) -> bool:
        """No padding."""
        return bool(self.mask.all())

    def rows_of(self, start: int, num: int, copies: int) -> tuple[Tensor, Tensor] | None:
        """Features that a call on the columns [start, start + num) has to write.

        Args:
            copies: Consecutive rows of the call that are one prompt (beams).

        Returns:
            (mask [B * copies, num] of what is written over, rows [K] of `features` in order), or
            None when there is nothing to write.
        """
        if self.features is None or start >= self.length:
            return None
        table = self.written.flatten().cumsum(0).reshape(self.written.shape) - 1
        part = slice(start, min(start + num, self.length))
        mask = torch.nn.functional.pad(self.written[:, part], (0, num - (part.stop - start)))
        table = torch.nn.functional.pad(table[:, part], (0, num - (part.stop - start)))
        mask, table = (x.repeat_interleave(copies, 0) for x in (mask, table))
        rows = table[mask]
        return (mask, rows) if len(rows) else None


def unreduced(
    ids: Tensor, mask: Tensor, places: Sequence[VideoPlace], positions: Tensor | None = None
) -> Prompt:
    """The prompts as the user gave them, which the host encodes itself."""
    batch, width = ids.shape
    video = torch.zeros_like(mask)
    written, original = torch.zeros_like(mask), torch.zeros_like(ids, dtype=torch.int64)
    for place in places:
        row = place.sample
        first = video[row].sum()
        video[row, place.grid_columns] = True
        written[row, place.columns] = True
        numbers = torch.arange(place.grid.num_video, device=ids.device)
        original[row, place.grid_columns] = first + numbers
    return Prompt(
        ids=ids,
        mask=mask,
        positions=positions,
        index=torch.arange(width, device=ids.device).expand(batch, -1),
        video=video,
        written=written,
        original=original,
        size=torch.ones(batch, width, device=ids.device),
        grids=_grids(places, batch),
        width=width,
    )


def shortened(
    whole: Prompt,
    places: Sequence[VideoPlace],
    videos: Sequence[VideoRows],
    plans: Sequence[TokenAssignment | None],
    *,
    policy: str,
    pad: int,
) -> Prompt:
    """The prompts with what the plans leave of each video.

    Samples that keep different numbers of tokens are padded on the side where the user padded,
    the left one if nowhere.

    Args:
        whole: From `unreduced`, with positions.
        places, videos, plans: One entry per video; plans are [1, N] for its own tokens.
        policy: One of `tubelet.core.recipe.POSITIONS`.
        pad: Token id of padding.

    Raises:
        UnsupportedError: The last token of a prompt is a video token that was dropped, so that
            no token says where the answer stands.
    """
    keep, source = whole.mask.clone(), whole.index.clone()
    size = whole.size.clone()
    features: list[VideoRows] = []
    for place, video, plan in zip(places, videos, plans, strict=True):
        features.append(_reduced(place, video, plan))
        if plan is None:
            continue
        columns, kept = place.grid_columns, plan.anchor[0]
        keep[place.sample, columns] = False
        keep[place.sample, columns[kept]] = True
        size[place.sample, columns[kept]] = plan.size[0].to(size.dtype)
        if policy == "anchor":
            source[place.sample, columns[kept]] = columns[earliest_member(plan)]
    ends = whole.mask.int().cumsum(1).argmax(1, keepdim=True)
    if not bool(keep.gather(1, ends).all()):
        raise UnsupportedError(
            "a prompt ends with its video; put the question behind it, so that the answer has a "
            "place to go on from"
        )
    order = packed_order(keep, whole.mask)
    mask = keep.gather(1, order)

    def picked(x: Tensor) -> Tensor:
        return x.gather(1, order)

    video, written = picked(whole.video) & mask, picked(whole.written) & mask
    return Prompt(
        ids=picked(whole.ids).masked_fill(~mask, pad),
        mask=mask,
        positions=_positions(whole, picked(source), mask, policy),
        index=order,
        video=video,
        written=written,
        original=picked(whole.original) * video,
        size=torch.where(mask, picked(size), 1.0),
        grids=whole.grids,
        width=whole.width,
        features=torch.cat([part.rows for part in features]),
        planes=tuple(torch.cat(part) for part in zip(*(f.planes for f in features), strict=True)),
    )


def side_by_side(plans: Sequence[TokenAssignment]) -> TokenAssignment:
    """Plans [1, N] of several videos as one for all their tokens, video behind video."""
    tokens = outputs = 0
    index, anchor = [], []
    for plan in plans:
        index.append(torch.where(plan.index < 0, -1, plan.index + outputs))
        anchor.append(plan.anchor + tokens)
        tokens, outputs = tokens + plan.num_in, outputs + plan.num_out
    return TokenAssignment(
        index=torch.cat(index, 1),
        weight=torch.cat([plan.weight for plan in plans], 1),
        anchor=torch.cat(anchor, 1),
        size=torch.cat([plan.size for plan in plans], 1),
        copies=all(plan.copies for plan in plans),
    )


def text_positions(mask: Tensor) -> Tensor:
    """[B, S] place of each token among the real ones, 0 at padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) * mask


def packed_order(keep: Tensor, real: Tensor) -> Tensor:
    """[B, n] columns of the kept tokens in order, n those of the longest sample.

    Shorter samples are filled up with columns that are not kept, on the side where `real` is
    padded, the left one if nowhere.

    Args:
        keep: [B, S] bool.
        real: [B, S] bool, False at the padding that is there already.
    """
    longest = int(keep.sum(1).max())
    right = bool(real[:, 0].all()) and not bool(real[:, -1].all())
    order = torch.argsort(~keep if right else keep, dim=1, stable=True)
    return order[:, :longest] if right else order[:, -longest:]


def _grids(places: Sequence[VideoPlace], batch: int) -> tuple[tuple[TokenGrid, ...], ...]:
    return tuple(tuple(p.grid for p in places if p.sample == row) for row in range(batch))


def _reduced(place: VideoPlace, video: VideoRows, plan: TokenAssignment | None) -> VideoRows:
    """Rows of one video behind its plan, host tokens among them, in order of place."""
    if plan is None:
        return video
    whole = len(place.columns)
    others = torch.ones(whole, dtype=torch.bool, device=place.columns.device)
    others[place.grid_rows] = False
    kept = place.grid_rows[plan.anchor[0]]
    order = torch.argsort(torch.cat([kept, others.nonzero()[:, 0]]), stable=True)

    def reduced(x: Tensor) -> Tensor:
        return torch.cat([plan.reduce(x[place.grid_rows][None])[0], x[others]])[order]

    planes = tuple(reduced(plane) for plane in video.planes)
    return VideoRows(rows=reduced(video.rows), planes=planes)


def earliest_member(plan: TokenAssignment) -> Tensor:
    """[K] first member of each output."""
    numbers = torch.arange(plan.num_in, device=plan.index.device)
    live = plan.index[0] >= 0
    first = torch.full((plan.num_out,), plan.num_in, device=numbers.device)
    return first.scatter_reduce(0, plan.index[0][live], numbers[live], "amin")


def _positions(whole: Prompt, source: Tensor, mask: Tensor, policy: str) -> Tensor:
    assert whole.positions is not None
    text = text_positions(mask)
    if policy == "compact":
        return text if whole.positions.ndim == 2 else text.expand(4, -1, -1).clone()
    if whole.positions.ndim == 2:
        return whole.positions.gather(1, source) * mask
    axes = [axis.gather(1, source) * mask for axis in whole.positions[-3:]]
    # The first row only tells packed sequences apart, so it has no gaps.
    return torch.stack([text, *axes])
