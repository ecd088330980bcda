"""Prompt reduction by what the vision tower itself attends to.

All of these were made for images. Here each frame is such an image, unless a method says
otherwise, and frames share an exact budget. In a layer whose attention is windowed (most layers of
Qwen2.5-VL) only places of one window compare; name one with full attention there.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import RecipeError
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.merge import drop
from tubelet.ops.score import rank_of
from tubelet.ops.select import apportion, budget, kept_positions

CLASS_TOKEN = frozenset({"video prompt", "class token"})


def by_frame(ctx: PromptContext, name: str, layer: int) -> Tensor:
    """A statistic of the vision tower as [frames, tokens per frame, ...]."""
    values = ctx.statistic(name, layer)[0]
    return values.unflatten(0, (ctx.grid.frames, ctx.grid.per_frame))


def frame_counts(num: int, quota: Tensor, most: int) -> Tensor:
    """[T] whole numbers near `quota` that add up to `num`; no frame is empty unless it must be."""
    return apportion(quota, num, least=min(1, num // len(quota)), most=most)


def _even_counts(ctx: PromptContext, num: int, most: int) -> Tensor:
    share = num / ctx.grid.frames
    quota = torch.full((ctx.grid.frames,), share, device=ctx.hidden.device)
    return frame_counts(num, quota, most)


def _strongest(score: Tensor, counts: Tensor, num: int) -> TokenAssignment:
    """Keep the `counts[t]` highest of each frame's scores [T, P], `num` in total."""
    return drop((rank_of(score) < counts[:, None]).reshape(1, -1), num)


@dataclass(frozen=True, kw_only=True)
class VisionZip(PromptReduction):
    """Keep what the vision tower looks at most, and merge the rest of each frame into a few more.

    Dominant tokens are those with most attention from the class token or, in towers without one,
    from all places. Of the others every n-th is a target; the rest are added to the target whose
    key is most like theirs: target + their mean, so such a token weighs two.
    The authors keep 190 dominant and 30 contextual tokens of 576 and renumber positions.
    Gap from paper: where a tower pools its patches, statistics and merging are of pooled tokens.
    Not settled: whether the authors compare the keys of all heads or their mean, as here.
    """

    paper = Paper("VisionZip", "2412.04467", "CVPR", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.38, "share of the video tokens kept", above=0, most=1)
    contextual: float = param(
        0.136, "share of the kept tokens that the rest merges into", least=0, below=1
    )
    layer: int = param(-2, "of the vision tower that is looked at; -1 is the last")
    positions: str = param("compact", "keep, compact or anchor")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("class or received", self.layer), ("keys", self.layer)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num, per_frame = budget(ctx.num_tokens, self.keep_ratio), ctx.grid.per_frame
        counts = _even_counts(ctx, num, per_frame)
        # At least one token of a frame is dominant.
        merged = torch.minimum((counts * self.contextual).round().long(), (counts - 1).clamp(min=0))
        attention = by_frame(ctx, "class or received", self.layer)
        dominant = rank_of(attention) < (counts - merged)[:, None]
        target = _strided(~dominant, merged)
        keys = F.normalize(by_frame(ctx, "keys", self.layer), dim=-1)
        similar = (keys @ keys.mT).masked_fill(~target[:, None], -torch.inf)
        start = torch.arange(ctx.grid.frames, device=keys.device)[:, None] * per_frame
        nearest = similar.argmax(-1) + start
        kept = dominant | target
        takes = ~kept & (merged > 0)[:, None]
        return _added(kept.reshape(1, -1), takes.reshape(1, -1), nearest.reshape(1, -1), num)


def _strided(free: Tensor, counts: Tensor) -> Tensor:
    """[T, P] True at `counts[t]` of the free places of each frame, every n-th from the first."""
    place = free.cumsum(1) - 1
    step = (free.sum(1) // counts.clamp(min=1)).clamp(min=1)[:, None]
    return free & (place % step == 0) & (place // step < counts[:, None])


def _added(kept: Tensor, takes: Tensor, nearest: Tensor, num: int) -> TokenAssignment:
    """Each kept token plus the mean of those that go to it.

    Args:
        kept: [1, N] bool, `num` of them.
        takes: [1, N] bool, tokens that are added to a kept one; the others are dropped.
        nearest: [1, N] place of the kept token that one is added to.
    """
    base = TokenAssignment.keep(kept_positions(kept, num), kept.shape[1])
    index = torch.where(takes, base.index.gather(1, nearest), base.index)
    joined = torch.zeros_like(base.size).scatter_add(1, index.clamp(min=0), takes.float())
    weight = torch.where(takes, 1 / joined.gather(1, index.clamp(min=0)).clamp(min=1), 1.0)
    return TokenAssignment(index=index, weight=weight, anchor=base.anchor, size=1 + joined)


@dataclass(frozen=True, kw_only=True)
class FoPru(PromptReduction):
    """Keep the tokens of each frame that receive most attention in the vision tower.

    `by="rank"` keeps single tokens, `by="row"` whole rows of a frame, those with the highest
    mean, so that neighbours stay together; the number of tokens is then rounded up to whole rows.
    Not settled: read in the abstract only; the ratio and the layer are the usual ones.
    """

    paper = Paper("FoPru", "2411.14164", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.25, "share of the video tokens kept", above=0, most=1)
    by: str = param("rank", "rank: single tokens; row: rows of a frame")
    layer: int = param(-2, "of the vision tower that is looked at; -1 is the last")
    positions: str = param("compact", "keep, compact or anchor")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("rank", "row"):
            raise RecipeError(f"FoPru.by must be rank or row, got {self.by!r}")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("received", self.layer)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        score, grid = by_frame(ctx, "received", self.layer), ctx.grid
        if self.by == "rank":
            num = budget(ctx.num_tokens, self.keep_ratio)
            return _strongest(score, _even_counts(ctx, num, grid.per_frame), num)
        rows = score.unflatten(1, (grid.height, grid.width)).mean(2)
        num = budget(grid.frames * grid.height, self.keep_ratio)
        kept = rank_of(rows) < _even_counts(ctx, num, grid.height)[:, None]
        return drop(kept.repeat_interleave(grid.width, 1).reshape(1, -1), num * grid.width)


@dataclass(frozen=True, kw_only=True)
class VTCCLS(PromptReduction):
    """Keep the tokens of each frame that the class token attends to, summed over several layers.

    The sum ends at the last layer but one. The authors keep 64, 128 or 192 tokens of 576.
    Not settled: where the authors' sum begins, which is an argument of their program.
    """

    paper = Paper("[CLS] Token Tells Everything Needed (VTC-CLS)", "2412.05819", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = CLASS_TOKEN

    keep_ratio: float = param(1 / 3, "share of the video tokens kept", above=0, most=1)
    num_layers: int = param(
        8, "layers of the vision tower that are summed, the last of them the last but one", least=1
    )
    positions: str = param("compact", "keep, compact or anchor")

    @property
    def _layers(self) -> range:
        return range(-1 - self.num_layers, -1)

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset(("class", layer) for layer in self._layers)

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num = budget(ctx.num_tokens, self.keep_ratio)
        score = torch.stack([by_frame(ctx, "class", layer) for layer in self._layers]).sum(0)
        return _strongest(score, _even_counts(ctx, num, ctx.grid.per_frame), num)


@dataclass(frozen=True, kw_only=True)
class HiRED(PromptReduction):
    """Spend the budget where an early layer sees content, on the tokens that a late one looks at.

    One frame of every group gets `key_share` of the group's budget. The others share what is left
    by how many of their strongest places are theirs, the strongest by the class token's attention
    in an early layer. Within a frame, the tokens stay that it attends to most in a late layer.
    Gap from paper: made for one image and its crops. Here the first frame of a group takes the
    place of the whole image, the others that of the crops, and content is counted in the others'
    own attention, since a frame holds no smaller picture of the next. The authors' program counts
    strips of the image where it means quadrants; frames have no such slip.
    """

    paper = Paper("HiRED", "2408.10945", "AAAI", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = CLASS_TOKEN

    keep_ratio: float = param(0.2, "share of the video tokens kept", above=0, most=1)
    key_share: float = param(
        0.5, "share of a group's budget that its first frame gets", above=0, below=1
    )
    group: int = param(5, "frames of a group; the authors' image has 4 crops", least=2)
    early: int = param(0, "layer of the vision tower that tells where content is, 0-based")
    late: int = param(-2, "layer of the vision tower that tells which tokens stay")
    positions: str = param("compact", "keep, compact or anchor")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("class", self.early), ("class", self.late)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num, frames = budget(ctx.num_tokens, self.keep_ratio), ctx.grid.frames
        content = by_frame(ctx, "class", self.early).split(self.group)
        ends = [min(frames, start + self.group) for start in range(0, frames, self.group)]
        spent = [0, *(num * end // frames for end in ends)]
        totals = [end - start for start, end in pairwise(spent)]
        counts = torch.cat([self._counts(*pair) for pair in zip(content, totals, strict=True)])
        return _strongest(by_frame(ctx, "class", self.late), counts, num)

    def _counts(self, content: Tensor, total: int) -> Tensor:
        """Tokens [G] of each frame of a group that keeps `total`."""
        others, most = content.shape[0] - 1, content.shape[1]
        if not others:
            return torch.tensor([total], device=content.device)
        key = max(min(most, round(self.key_share * total)), total - others * most)
        rest = content[1:].flatten()
        strongest = rank_of(rest) < max(1, round((1 - self.key_share) * len(rest)))
        seen = strongest.unflatten(0, (others, most)).sum(1)
        left = total - key
        counts = apportion(seen / seen.sum() * left, left, least=0, most=most)
        return torch.cat([counts.new_tensor([key]), counts])


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(PromptReduction):
    """Let a view of the whole guide both how many tokens each part keeps and which.

    Scores are the class token's attention. A part's ratio is r (1 + softmax(s / T) - mean), s how
    much of the whole view's attention falls on it; its tokens are ranked by their own score plus
    the whole view's at their place.
    Gap from paper: made for one image, its crops and its thumbnail. Here the frames are the
    parts, the mean over the clip is the whole view, and s is how far a frame looks where the clip
    looks: the product of both, summed over places, one for even attention. Counts are reconciled
    to exactly the budget by largest remainders.
    """

    paper = Paper("GlobalCom2", "2501.05179", "AAAI", 2026)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = CLASS_TOKEN

    keep_ratio: float = param(0.25, "share of the video tokens kept", above=0, most=1)
    temperature: float = param(
        10.0, "of the softmax over frames; lower tells them apart more", above=0
    )
    layer: int = param(-1, "of the vision tower that is looked at; -1 is the last")
    positions: str = param("compact", "keep, compact or anchor")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("class", self.layer)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num, per_frame = budget(ctx.num_tokens, self.keep_ratio), ctx.grid.per_frame
        own = by_frame(ctx, "class", self.layer)
        whole = own.mean(0)
        weight = (per_frame * (own * whole).sum(1) / self.temperature).softmax(0)
        ratio = (self.keep_ratio * (1 + weight - weight.mean())).clamp(max=1)
        return _strongest(own + whole, frame_counts(num, ratio * per_frame, per_frame), num)
