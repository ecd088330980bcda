"""Prompt reduction that folds what stands still over windows of frames: HoliTom and PruneVid.

Both methods have a second stage inside the language model, which is a recipe of its own; the two
stages compose.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import LayerContext, PromptContext
from tubelet.core.recipe import LayerReduction, Paper, PromptReduction, param
from tubelet.ops.cosine import cosine, inverse_length
from tubelet.ops.density import density_clusters
from tubelet.ops.merge import blend, drop, nearest_anchor
from tubelet.ops.rows import row_parts
from tubelet.ops.score import rank_of
from tubelet.ops.select import apportion, budget, kept_positions, top_k

_HOLITOM = Paper("HoliTom: Holistic Token Merging", "2505.21334", "NeurIPS", 2025)
_PRUNEVID = Paper("PruneVid: Visual Token Pruning", "2412.16117", "ACL Findings", 2025)

_NEVER = -(2**40)
"""Savings of a window that may not be."""


@dataclass(frozen=True, kw_only=True)
class HoliTom(PromptReduction):
    """Fold what stands still over the best windows of frames, then share out what is left.

    A place is static in a window if no token there falls to a threshold of cosine with the one a
    frame before. A dynamic programme cuts the clip into the windows that save most tokens; each
    static place becomes its mean over the window. The budget is shared among static places of
    each window, merged around density peaks, and the other tokens of each frame, of which those
    stay that receive most attention in the vision tower. The second stage is `HoliTomInner`.
    The authors pair ratios of 0.1, 0.15, 0.2 and 0.25 with thresholds of 0.65 and, for the
    others, 0.8. Positions are renumbered.
    Gap from paper: the shares are reconciled to exactly the budget. Where folding alone leaves
    fewer tokens than that, these stay, as in the paper.
    Not settled: which layer of the tower is looked at, here the last; whether a window of one
    frame is static, here it is not.
    """

    paper = _HOLITOM
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.25, "share of the video tokens kept", above=0, most=1)
    threshold: float = param(0.8, "cosine above which a place stands still", least=-1, most=1)
    window: int = param(1024, "most frames of a window", least=1)
    merged: float = param(
        0.0, "share of a frame's other tokens that are merged around peaks", least=0, most=1
    )
    share: float = param(0.6, "least weight of a peak in its mean", least=0, most=1)
    neighbours: int = param(7, "tokens that a density looks at", least=1)
    positions: str = param("compact", "keep, compact or anchor")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("received", -1)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        frames = ctx.frames
        alike = cosine(frames[1:], frames[:-1]) > self.threshold
        until = _still_until(alike)
        starts = _best_windows(until, self.window)
        head, last = _ends(starts, len(frames), frames.device)
        static = (until[head] >= last[:, None]) & (last > head)[:, None]
        folded = _Folded(frames, static, head)
        num = budget(ctx.num_tokens, self.keep_ratio)
        if folded.num <= num:
            return folded.plan if folded.num < ctx.num_tokens else None
        sizes = torch.cat([folded.static.sum(1), folded.other.sum(1)])
        counts = apportion(sizes * (num / folded.num), num, least=0, most=sizes)
        still, loose = counts.chunk(2)
        return self._regroup(folded, ctx.statistic("received", -1), still, loose, num)

    def _regroup(
        self, folded: "_Folded", received: Tensor, still: Tensor, loose: Tensor, num: int
    ) -> TokenAssignment:
        """Keep `still` static tokens of each window and `loose` others of each frame."""
        merged = (loose * self.merged + 1e-6).long()
        score = received.reshape(folded.other.shape).masked_fill(~folded.other, -torch.inf)
        salient = rank_of(score) < (loose - merged)[:, None]
        centre, target = folded.clusters(still, self.neighbours, folded.static)
        centre, target = centre | salient, torch.where(salient, folded.place, target)
        if self.merged:
            left = folded.other & ~salient
            peak, nearest = folded.clusters(merged, self.neighbours, left)
            centre, target = centre | peak, torch.where(left, nearest, target)
        return folded.regroup(centre, target, num, self.share)


@dataclass(frozen=True, kw_only=True)
class HoliTomInner(LayerReduction):
    """The second stage of HoliTom: merge what the last prompt token attends to least.

    The highest half by the attention of the layer before, averaged over heads, stays; every
    other token is averaged into the most similar of these.
    Gap from paper: a mean of all that go to one token; the code halves the sum of two, token
    after token, so that their weights depend on the order.
    """

    paper = _HOLITOM
    identity: ClassVar = {"keep_ratio": 1.0}
    statistics: ClassVar[bool] = True

    keep_ratio: float = param(0.5, "share of the video tokens kept", above=0, most=1)
    layer: int = param(18, "first layer that sees fewer tokens, 0-based", least=1)

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num = budget(ctx.num_tokens, self.keep_ratio)
        score = ctx.statistics().rows([-1]).mean((0, 1))
        kept = kept_positions(top_k(score[None], num), num)
        target = nearest_anchor(ctx.hidden, kept)
        return TokenAssignment.merge(target, kept, torch.ones_like(score)[None])


@dataclass(frozen=True, kw_only=True)
class PruneVid(PromptReduction):
    """Fold static places over segments of similar frames, then merge tokens within each frame.

    Frames are clustered by their mean token; the clusters give the segments. A place is static
    in a segment if the mean cosine of all pairs of its tokens there passes a threshold; it
    becomes their mean. The static places of a segment, and the others of each frame, are merged
    around density peaks. How many tokens stay depends on the clip. The second stage is
    `PruneVidInner`. Positions are renumbered.
    Not settled: how the authors make clusters contiguous; here each keeps its longest run of
    frames, and frames between runs join the run before. Counts are rounded up, and a segment of
    one frame has no static place.
    """

    paper = _PRUNEVID
    identity: ClassVar = {"threshold": 1.0, "keep_ratio": 1.0}

    keep_ratio: float = param(
        0.5, "share kept of a segment's static places, and of a frame's others", above=0, most=1
    )
    threshold: float = param(0.8, "cosine above which a place is static", least=-1, most=1)
    segments: float = param(0.25, "clusters of frames per frame", above=0, most=1)
    small: int = param(14, "sets of at most so many tokens are not merged", least=0)
    neighbours: int = param(7, "tokens that a density looks at", least=1)
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        frames = ctx.frames
        starts = self._segments(frames)
        head, last = _ends(starts, len(frames), frames.device)
        alike = _mean_cosine(frames, starts, head, last)
        length = last - head + 1
        folded = _Folded(frames, (alike > self.threshold) & (length > 1)[:, None], head)
        centre, target = folded.clusters(
            self._counts(folded.static), self.neighbours, folded.static
        )
        peak, nearest = folded.clusters(self._counts(folded.other), self.neighbours, folded.other)
        centre, target = centre | peak, torch.where(folded.other, nearest, target)
        num = int(centre.sum())
        return None if num == ctx.num_tokens else folded.regroup(centre, target, num, 0.0)

    def _segments(self, frames: Tensor) -> list[int]:
        """First frames of the segments."""
        count = torch.tensor([max(1, int(len(frames) * self.segments))], device=frames.device)
        _, label = density_clusters(
            frames.mean(1, dtype=torch.float32)[None], count, self.neighbours
        )
        longest: dict[int, tuple[int, int]] = {}
        frame = 0
        for cluster, run in groupby(label[0].tolist()):
            length = len(list(run))
            if length > longest.get(cluster, (0, 0))[0]:
                longest[cluster] = (length, frame)
            frame += length
        return [0, *sorted(start for _, start in longest.values())[1:]]

    def _counts(self, valid: Tensor) -> Tensor:
        sizes = valid.sum(1)
        fewer = (sizes * self.keep_ratio - 1e-4).ceil().long()
        return torch.where(sizes > self.small, fewer, sizes)


@dataclass(frozen=True, kw_only=True)
class PruneVidInner(LayerReduction):
    """The second stage of PruneVid: keep the video tokens that a word of the question looks at.

    A token's score is the largest attention that any head of any question token gives it, in the
    layer before; without a question behind the video, that of the last token.
    Gap from paper: the authors keep the same share of the static and the other tokens of each
    segment, here of all tokens of the prompt, since segments are not known inside the model; and
    they clear what is dropped from the caches of the layers before, which keep it here.
    """

    paper = _PRUNEVID
    identity: ClassVar = {"keep_ratio": 1.0}
    statistics: ClassVar[bool] = True

    keep_ratio: float = param(0.4, "share of the video tokens kept", above=0, most=1)
    layer: int = param(10, "first layer that sees fewer tokens, 0-based", least=1)

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        stats, num = ctx.statistics(), budget(ctx.num_tokens, self.keep_ratio)
        parts = [part.amax((0, 1)) for part in row_parts(stats.rows, stats.question() or [-1])]
        score = torch.stack(parts).amax(0)
        return drop(top_k(score[None], num), num)


def _mean_cosine(frames: Tensor, starts: list[int], head: Tensor, last: Tensor) -> Tensor:
    """[T, P] mean cosine of all pairs of tokens of a place in each frame's segment; 0 for one."""
    # It follows from the length of the sum of unit vectors, which a product adds up: adding by
    # index would depend on the device's timing.
    first = torch.tensor(starts, device=frames.device)
    unit = (frames * inverse_length(frames)[..., None]).flatten(1)
    sums = ((first[:, None] == head).float() @ unit).view(len(starts), *frames.shape[1:])
    squares = sums.square().sum(-1)[torch.searchsorted(first, head)]
    length = (last - head + 1)[:, None]
    return ((squares - length) / (length * (length - 1)).clamp(min=1)).clamp(max=1)


class _Folded:
    """A clip [T, P, C] whose static places are means over their window, in its first frame.

    Means have the dtype of the clip.

    Args:
        frames: The clip.
        static: [T, P] static places, the same in all frames of a window.
        head: [T] first frame of each frame's window.
    """

    def __init__(self, frames: Tensor, static: Tensor, head: Tensor) -> None:
        number, places = torch.arange(len(frames), device=frames.device), frames.shape[1]
        self.place = torch.arange(places, device=frames.device).expand_as(static)
        first = (number == head)[:, None]
        self.static, self.other = static & first, ~static
        target = torch.where(static, head[:, None], number[:, None]) * places + self.place
        kept = (self.static | self.other).flatten().nonzero()[:, 0]
        ones = torch.ones(1, target.numel(), device=frames.device)
        self.plan = TokenAssignment.merge(target.reshape(1, -1), kept[None], ones)
        flat = frames.flatten(0, 1)
        self.frames = flat.index_copy(0, kept, self.plan.reduce(flat[None])[0]).view_as(frames)

    @property
    def num(self) -> int:
        """Tokens left."""
        return self.plan.num_out

    def clusters(self, count: Tensor, neighbours: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        """`density_clusters` of each frame."""
        return density_clusters(self.frames, count, neighbours, valid=valid)

    def regroup(self, centre: Tensor, target: Tensor, num: int, share: float) -> TokenAssignment:
        """Merge on, from `target` [T, P] (places in the same frame, or -1) to `num` centres."""
        row = torch.arange(len(target), device=target.device)[:, None] * target.shape[1]
        slot = self.plan.index[0]
        kept = slot[kept_positions(centre.reshape(1, -1), num)]
        later = torch.where(target < 0, -1, slot[(target.clamp(min=0) + row)])
        return self.plan.compose(blend(later.flatten()[self.plan.anchor], kept, share))


def _ends(starts: list[int], frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T] first and last frame of each frame's window."""
    ends = [*starts[1:], frames]
    head = [s for s, e in zip(starts, ends, strict=True) for _ in range(s, e)]
    last = [e - 1 for s, e in zip(starts, ends, strict=True) for _ in range(s, e)]
    return torch.tensor(head, device=device), torch.tensor(last, device=device)


def _still_until(alike: Tensor) -> Tensor:
    """[T, P] last frame up to which each place stands still, from [T - 1, P] alike ones."""
    frames = len(alike) + 1
    number = torch.arange(frames, device=alike.device)[:, None]
    stops = torch.where(F.pad(alike, (0, 0, 0, 1)), frames - 1, number)
    return stops.flip(0).cummin(0).values.flip(0)


def _best_windows(until: Tensor, longest: int) -> list[int]:
    """First frames of the windows whose static places save most tokens.

    Of equal savings the longer window, from the end of the clip, wins.
    """
    frames = len(until)
    ending = torch.zeros(frames, frames, dtype=torch.int64, device=until.device)
    ending = ending.scatter_add(1, until, torch.ones_like(until))
    # Read from the device once; numpy takes the many small steps faster than torch.
    static = ending.flip(1).cumsum(1).flip(1).cpu().numpy()
    number = np.arange(frames)
    span = number - number[:, None]
    gain = np.where((span < 0) | (span >= longest), _NEVER, static * span)
    best, start = np.zeros(frames + 1, dtype=np.int64), [0] * frames
    for end in range(frames):
        total = best[: end + 1] + gain[: end + 1, end]
        start[end] = int(total.argmax())
        best[end + 1] = total[start[end]]
    starts, end = [], frames
    while end:
        end = start[end - 1]
        starts.append(end)
    return starts[::-1]
