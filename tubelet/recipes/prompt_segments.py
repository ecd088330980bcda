"""Prompt reduction within short stretches of a clip: groups and segments of similar frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.components import link
from tubelet.ops.cosine import cosine, cosines
from tubelet.ops.density import density_peaks
from tubelet.ops.merge import blend, drop, nearest_anchor
from tubelet.ops.score import rank_of
from tubelet.ops.segment import cut_starts
from tubelet.ops.select import budget, kept_positions
from tubelet.ops.tools import PLAIN

COMPARED = (0, 1, 2, 1)
"""DyCoke: how many frames back each frame of a group of four is compared; the first is not."""


@dataclass(frozen=True, kw_only=True)
class DyCoke(PromptReduction):
    """In groups of four frames, keep the first and what the others do not repeat.

    The second frame is compared with the first, the fourth with the third, place by place, then
    the third with the first; the places of lowest cosine stay. The authors' K is the share
    dropped, 0.7. This is their token merging (which drops, and averages nothing); the pruning of
    the cache while decoding is another recipe's. Positions are renumbered.
    Gap from paper: the code loses the last frame of an odd number, fails on up to four frames,
    leaves the third frame of the last group whole, and puts kept tokens in the order of their
    similarity. Here all frames are treated alike, and tokens stay in order. Counts are rounded
    up, the code's down.
    """

    paper = Paper("DyCoke: Dynamic Compression of Tokens", "2411.15024", "CVPR", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(
        0.3, "share kept of each frame that is not the first of its group", above=0, most=1
    )
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        grid, frames = ctx.grid, ctx.frames
        count = budget(grid.per_frame, self.keep_ratio)
        number = torch.arange(grid.frames, device=frames.device)
        back = torch.tensor(COMPARED, device=frames.device)[number % 4]
        repeated = cosine(frames, frames[number - back])
        kept = (rank_of(-repeated) < count) | (back == 0)[:, None]
        whole = -(-grid.frames // 4)
        num = whole * grid.per_frame + (grid.frames - whole) * count
        return None if num == ctx.num_tokens else drop(kept.reshape(1, -1), num)


@dataclass(frozen=True, kw_only=True)
class FastVID(PromptReduction):
    """Keep salient tokens of every frame, and merge the rest of a segment around dense ones.

    The clip is cut at its least similar transitions. Each frame keeps the tokens that receive
    most attention in the vision tower. What a segment may keep beyond that goes to a few of its
    frames, counted from its end: their density peaks are anchors, and all other tokens of the
    segment are averaged into the nearest anchor by cosine, which keeps at least a share of
    itself. The authors use 0.27 and a threshold of 0.84 for Qwen2.5-VL.
    Gap from paper: frames are compared by their mean token and saliency is the attention received
    in the last layer, on every host; for LLaVA-OneVision the authors use a second pooling head
    that its weights lack. Clips of few frames are cut into single frames, where the code fails;
    shares of frames are reconciled to exactly the budget; where the anchor frames cannot hold a
    segment's share, more frames are taken; no noise breaks ties. The further threshold for
    near-duplicate frames of Qwen2.5-VL is left out.
    """

    paper = Paper("FastVID: Dynamic Density Pruning", "2503.11187", "NeurIPS", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.1, "share of the video tokens kept", above=0, most=1)
    segments: int = param(8, "least number of segments", least=1)
    threshold: float = param(0.9, "cosine of frames below which a clip is cut", least=-1, most=1)
    merged: float = param(0.4, "share of the kept tokens that are anchors", least=0, most=1)
    step: int = param(4, "every such frame of a segment holds anchors", least=1)
    share: float = param(0.6, "least weight of an anchor in its mean", least=0, most=1)
    neighbours: int = param(4, "tokens that a density looks at", least=1)

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("received", -1)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        grid, frames = ctx.grid, ctx.frames
        num = budget(ctx.num_tokens, self.keep_ratio)
        shares = evenly(num, grid.frames)
        merged = [int(share * self.merged + 1e-9) for share in shares]
        salient = [share - part for share, part in zip(shares, merged, strict=True)]
        stretches = segments_of(frames, self.segments, self.threshold)
        anchors = [0] * grid.frames
        for start, end in stretches:
            room = grid.per_frame - max(salient[start:end])
            anchors[start:end] = self._spread(sum(merged[start:end]), end - start, room)
        kept = rank_of(ctx.statistic("received", -1).reshape(frames.shape[:2]))
        kept = kept < torch.tensor(salient, device=frames.device)[:, None]
        peaks = rank_of(density_peaks(frames, self.neighbours, valid=~kept))
        anchor = peaks < torch.tensor(anchors, device=frames.device)[:, None]
        starts = torch.tensor([start for start, _ in stretches], device=frames.device)
        number = torch.arange(grid.frames, device=frames.device)
        segment = torch.searchsorted(starts, number, right=True)
        nearest = _nearest(ctx.hidden, anchor, sum(anchors), segment)
        own = torch.arange(ctx.num_tokens, device=frames.device)
        target = torch.where(kept.flatten(), own, nearest)[None]
        places = kept_positions((kept | anchor).reshape(1, -1), num)
        return blend(target, places, self.share)

    def _spread(self, total: int, length: int, room: int) -> list[int]:
        """Anchors of each frame of a segment, at most `room` per frame, `total` in all."""
        steps = range(min(self.step, length), 0, -1)
        step = next(step for step in steps if -(-length // step) * room >= total)
        counts = [0] * length
        holders = range(length - 1, -1, -step)
        for frame, count in zip(holders, evenly(total, len(holders)), strict=True):
            counts[frame] = count
        return counts


def _nearest(hidden: Tensor, anchor: Tensor, num: int, segment: Tensor) -> Tensor:
    """[N] place of each token's most similar anchor in its segment; -1 where that has none.

    Args:
        hidden: [1, N, C].
        anchor: [T, P] bool, `num` of them; an anchor is its own.
        segment: [T] number of each frame's segment.
    """
    if num == 0:
        return torch.full((anchor.numel(),), -1, device=anchor.device)
    places = kept_positions(anchor.reshape(1, -1), num)[0]
    segment = segment.repeat_interleave(anchor.shape[1], output_size=anchor.numel())
    parts = []
    for start, part in cosines(hidden, hidden[:, places]):
        apart = segment[start : start + part.shape[1], None] != segment[places]
        best = part[0].masked_fill(apart, -torch.inf).max(1)
        parts.append(torch.where(best.values.isinf(), -1, places[best.indices]))
    return torch.cat(parts).scatter(0, places, places)


def evenly(total: int, parts: int) -> list[int]:
    """Whole numbers that differ by at most one and add up to `total`."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def segments_of(frames: Tensor, segments: int, threshold: float) -> list[tuple[int, int]]:
    """(first frame, frame behind the last) of the segments of a clip [T, P, C]."""
    starts = _starts(frames, segments, threshold).nonzero()[:, 0].tolist()
    return list(zip(starts, [*starts[1:], len(frames)], strict=True))


def _starts(frames: Tensor, segments: int, threshold: float) -> Tensor:
    mean = frames.mean(1, dtype=torch.float32)
    return cut_starts(cosine(mean[1:], mean[:-1]), segments, threshold)


@dataclass(frozen=True, kw_only=True)
class FlashVID(PromptReduction):
    """Keep diverse, attended tokens of each frame, and merge the others into trees over time.

    In each frame a share of the budget is chosen greedily by max-min: always the token whose
    attention times distance to those chosen is largest. Every other token hangs on the most
    similar other token of the frame before, wherever that is, if their cosine passes a threshold
    and no cut lies between them; each tree becomes its mean. The authors put 1.25 times the
    budget into the language model and prune to 0.3 of that in front of layer 20: add
    `FastV(layer=20, keep_ratio=0.3)`.
    Gap from paper: attention is what a token receives in the last layer of the vision tower,
    on every host. The count is exact: of more links than the budget needs, the most similar are
    taken.
    Not settled: how too many trees are brought to the budget. Here the largest stay, and the
    others are averaged into the most similar of them. Whether the distances are also weighed by
    relevance to the event is not settled either; they are not.
    """

    paper = Paper("FlashVID: Tree-based Spatiotemporal Token Merging", "2602.08024", "ICLR", 2026)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.1, "share of the video tokens kept", above=0, most=1)
    chosen: float = param(0.7, "share of the kept tokens that are chosen", least=0, most=1)
    similar: float = param(0.8, "cosine above which a token hangs on another", least=-1, most=1)
    segments: int = param(8, "least number of segments", least=1)
    threshold: float = param(0.9, "cosine of frames below which a clip is cut", least=-1, most=1)

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("received", -1)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        grid, frames = ctx.grid, ctx.frames
        num = budget(ctx.num_tokens, self.keep_ratio)
        each = int(num * self.chosen / grid.frames + 1e-9)
        chosen = torch.zeros(frames.shape[:2], dtype=torch.bool, device=frames.device)
        if each:
            attention = ctx.statistic("received", -1).reshape(frames.shape[:2])
            chosen = (ctx.tools or PLAIN).max_min(frames, each, attention)
        trees = num - each * grid.frames
        label = self._link(frames, chosen, ctx.num_tokens - num)
        chosen = chosen.flatten()
        own = torch.arange(ctx.num_tokens, device=frames.device)
        target = _largest(ctx.hidden, label.masked_fill(chosen, -1), trees)
        target = torch.where(chosen, own, target)[None]
        kept = kept_positions(target == own, num)
        return TokenAssignment.merge(target, kept, torch.ones(target.shape, device=own.device))

    def _link(self, frames: Tensor, chosen: Tensor, most: int) -> Tensor:
        """[N] first token of each token's tree, from at most `most` links."""
        cut = _starts(frames, self.segments, self.threshold)[1:, None]
        gone = chosen[:-1, None]
        pairs = [
            part.masked_fill(gone, -torch.inf).max(-1)
            for _, part in cosines(frames[1:], frames[:-1])
        ]
        best, partner = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
        best = best.masked_fill(chosen[1:] | cut | (best <= self.similar), -torch.inf).flatten()
        linked = (rank_of(best) < most) & best.isfinite()
        own = torch.arange(chosen.numel(), device=chosen.device).reshape(chosen.shape)
        late, early = own[1:].flatten(), (own[:-1, :1] + partner).flatten()
        # A link to itself changes nothing.
        return link(late, torch.where(linked, early, late), own.numel())


def _largest(hidden: Tensor, label: Tensor, num: int) -> Tensor:
    """[N] `label` (-1 for none) with all but the `num` largest trees merged into these.

    Args:
        hidden: [1, N, C].
        label: First token of each token's tree; at least `num` trees.
        num: 0 drops all.
    """
    if num == 0:
        return torch.full_like(label, -1)
    roots = (label == torch.arange(len(label), device=label.device)).nonzero()[:, 0]
    if len(roots) == num:
        return label
    plan = TokenAssignment.merge(label[None], roots[None], torch.ones_like(hidden[..., 0]).float())
    largest = kept_positions(rank_of(plan.size) < num, num)
    moved = roots[nearest_anchor(plan.reduce(hidden), largest)[0]]
    return torch.where(label < 0, -1, moved[plan.index[0].clamp(min=0)])
