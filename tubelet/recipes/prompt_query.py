"""Prompt reduction by the question, before the language model.

Tokens and question are compared in the language model's own embedding space, since hosts carry no
text tower; a published model's dual encoder would compare them better.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.frames import cells, evenly_spaced, likeness_to_text, merge_labelled
from tubelet.ops.score import rank_of
from tubelet.ops.select import top_k


@dataclass(frozen=True, kw_only=True)
class FreeVideoLLM(PromptReduction):
    """Look closely at a few frames, and in them where the question points; skim the others.

    Slow frames are those whose mean token is most like the question, middle frames are evenly
    spaced: of both, a window about the tokens most like the question stays, pooled along its
    height. Fast frames are pooled to a few tokens each. How many tokens stay follows from the
    shape alone.
    Gap from paper: likeness is a cosine in the language model's space, where the authors use
    CLIP's two towers; boxes are pooled to their mean, not their maximum; a frame is in one path
    only, the slowest that chose it; positions are not scaled by 2.
    Not settled: whether the authors' fast frames are pooled to 4 x 4 tokens, as here, or by 4 x 4.
    """

    paper = Paper("Free Video-LLM", "2410.10441", year=2024)
    identity: ClassVar = {"slow": 2**31, "window": 1.0, "pool": 1}

    slow: int = param(3, "frames chosen by the question", least=0)
    middle: int = param(5, "further frames kept as closely, evenly spaced", least=0)
    fast: int = param(50, "frames at most that are skimmed, evenly spaced", least=0)
    window: float = param(0.8, "share of a close frame's area that stays", above=0, most=1)
    pool: int = param(2, "rows of a close frame that become one", least=1)
    side: int = param(4, "rows and columns of tokens of a fast frame", least=1)
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        grid, device = ctx.grid, ctx.hidden.device
        score = likeness_to_text(ctx.frames, ctx.question)
        whole = likeness_to_text(ctx.frames.mean(1, dtype=torch.float32), ctx.question)
        path = self._paths(whole)
        start = torch.arange(grid.frames, device=device)[:, None] * grid.per_frame
        label = torch.full((grid.frames, grid.per_frame), -1, device=device)
        rows, columns = min(self.side, grid.height), min(self.side, grid.width)
        skimmed = cells(grid.height, grid.width, rows, columns, device)
        label = torch.where((path == _FAST)[:, None], start + skimmed, label)
        close = self._window(score.unflatten(1, (grid.height, grid.width)))
        close = torch.where(close < 0, -1, start + close)
        label = torch.where((path == _CLOSE)[:, None], close, label)
        plan = merge_labelled(label.flatten())
        return None if plan.num_out == ctx.num_tokens else plan

    def _paths(self, whole: Tensor) -> Tensor:
        """[T] which frames are looked at closely and which are skimmed."""
        num = len(whole)
        path = torch.zeros(num, dtype=torch.int64, device=whole.device)
        if self.slow:
            path[top_k(whole, min(self.slow, num))] = _CLOSE
        for most, kind in ((self.middle, _CLOSE), (self.fast, _FAST)):
            free = (path == 0).nonzero()[:, 0]
            if most and len(free):
                path[free[evenly_spaced(min(most, len(free)), len(free), free.device)]] = kind
        return path

    def _window(self, score: Tensor) -> Tensor:
        """[T, P] numbers of the boxes of each frame's window, -1 outside it."""
        height, width = score.shape[1:]
        share = self.window**0.5
        tall, wide = max(1, round(height * share)), max(1, round(width * share))
        best = top_k(score.flatten(1), max(1, round(self.window * height * width)))
        place = best.unflatten(1, (height, width)).float()
        y, x = torch.arange(height, device=score.device), torch.arange(width, device=score.device)
        count = place.sum((1, 2))
        top = _corner((place.sum(2) * y).sum(1) / count, tall, height)
        left = _corner((place.sum(1) * x).sum(1) / count, wide, width)
        row, column = y - top[:, None], x - left[:, None]
        inside = ((row >= 0) & (row < tall))[:, :, None] & ((column >= 0) & (column < wide))[
            :, None
        ]
        box = row[:, :, None] // self.pool * wide + column[:, None]
        return torch.where(inside, box, -1).flatten(1)


_CLOSE, _FAST = 1, 2


def _corner(centre: Tensor, length: int, full: int) -> Tensor:
    """[T] first place of windows of `length` about centres, moved inside [0, full)."""
    return (centre - (length - 1) / 2).round().long().clamp(0, full - length)


@dataclass(frozen=True, kw_only=True)
class RecoverableCompression(PromptReduction):
    """Keep what the class token looks at, recover what the question asks for, merge the rest.

    How much of a frame is kept is read off it: the share of its tokens whose score is an outlier
    (local outlier factor above `threshold`). That many stay by the class token's attention; of
    the others, as many as are outliers of likeness to the question are recovered by that
    likeness. Of what is left, the outliers of attention are centres that take up to `members`
    tokens each, those nearest by cosine of keys plus `text_weight` times likeness, weighted by
    attention; the last ones become one token, their attention-weighted mean.
    Gap from paper: a token joins its nearest centre only; likeness is a cosine in the language
    model's space, where the authors use CLIP's two towers.
    Not settled: whether the authors' last token is a mean, as here, or a sum, whose scale would
    be that of an attention weight; which score the centres are outliers of.
    """

    paper = Paper("Recoverable Compression", "2409.01179", "AAAI", 2025)
    identity: ClassVar = {"threshold": 0.0}
    requires: ClassVar[frozenset[str]] = frozenset({"video prompt", "class token"})

    threshold: float = param(
        1.5, "outlier factor from which a token stands out; lower keeps more", least=0
    )
    neighbours: int = param(20, "tokens that a token's density is compared with", least=1)
    members: int = param(32, "tokens that a centre takes at most", least=0)
    text_weight: float = param(50.0, "of the question where centres choose tokens", least=0)
    layer: int = param(-2, "of the vision tower that is looked at; -1 is the last")
    positions: str = param("compact", "keep, compact or anchor")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({("class", self.layer), ("keys", self.layer)})

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.threshold == 0:
            return None
        shape = (ctx.grid.frames, ctx.grid.per_frame)
        attention = ctx.statistic("class", self.layer)[0].unflatten(0, shape)
        keys = ctx.statistic("keys", self.layer)[0].unflatten(0, shape)
        likeness = likeness_to_text(ctx.frames, ctx.question)
        everything = torch.ones_like(attention, dtype=torch.bool)
        kept = self._standing_out(attention, everything)
        kept = kept | self._standing_out(likeness, ~kept)
        centre = self._standing_out(attention, ~kept)
        start = torch.arange(shape[0], device=keys.device)[:, None] * shape[1]
        target = start + torch.arange(shape[1], device=keys.device)
        weight, loose = torch.ones_like(attention), ~kept & ~centre
        nearest, near = self._nearest(centre, keys, likeness)
        joins = _best_of_each(
            (start + nearest).flatten(), near.flatten(), loose.flatten(), self.members
        )
        joins = joins.view_as(loose) & loose & centre.any(1, keepdim=True)
        target = torch.where(joins, start + nearest, target)
        weight = torch.where(joins, attention, weight)
        loose = loose & ~joins
        last = attention.masked_fill(~loose, -torch.inf).argmax(1, keepdim=True)
        total = (attention * loose).sum(1, keepdim=True)
        share = attention / total.clamp(min=torch.finfo(torch.float32).tiny)
        target = torch.where(loose, start + last, target)
        return _sums(target.flatten(), torch.where(loose, share, weight).flatten())

    def _standing_out(self, score: Tensor, among: Tensor) -> Tensor:
        """[T, P] the highest of some of each frame's scores, as many as are outliers among them."""
        outliers = outlier_factor(score, self.neighbours, among) > self.threshold
        order = score.masked_fill(~among, -torch.inf)
        return rank_of(order) < (outliers & among).sum(1, keepdim=True)

    def _nearest(self, centre: Tensor, keys: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor]:
        """[T, P] nearest centre in its frame of each token, and how near it is."""
        unit = F.normalize(keys, dim=-1)
        near = unit @ unit.mT + self.text_weight * likeness[..., None]
        best = near.masked_fill(~centre[:, None], -torch.inf).max(2)
        return best.indices, best.values


def _best_of_each(group: Tensor, score: Tensor, among: Tensor, most: int) -> Tensor:
    """[N] bool, the up to `most` highest scores of each group among some tokens."""
    order = torch.argsort(score.masked_fill(~among, -torch.inf), descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sizes = torch.zeros_like(group).scatter_add(0, group, torch.ones_like(group))
    before = sizes.cumsum(0) - sizes
    every = torch.arange(len(group), device=group.device)
    place = torch.zeros_like(group).scatter(0, order, every - before[group[order]])
    return place < most


def _sums(target: Tensor, weight: Tensor) -> TokenAssignment:
    """Every token [N] times its weight, added up at the place it goes to."""
    num = len(target)
    kept = target.unique()
    base = TokenAssignment.keep(kept[None], num)
    index = base.index[0][target]
    size = torch.zeros_like(base.size[0]).scatter_add(0, index, torch.ones_like(weight))
    return TokenAssignment(
        index=index[None], weight=weight[None], anchor=base.anchor, size=size[None]
    )


def outlier_factor(x: Tensor, neighbours: int, among: Tensor | None = None) -> Tensor:
    """Local outlier factor of numbers [..., N]: about 1 inside a cluster, more outside.

    Args:
        x: Finite numbers; those of a row are compared.
        neighbours: That a density is taken over; of n numbers at most n - 1 are used.
        among: Which numbers take part, [..., N] bool; None for all. The others get any factor.

    Raises:
        ShapeError: `neighbours` is below 1.

    Source:
        LOF (Breunig et al., SIGMOD 2000).
    """
    if neighbours < 1:
        raise ShapeError(f"an outlier factor needs at least one neighbour, got {neighbours}")
    k = min(neighbours, x.shape[-1] - 1)
    if k < 1:
        return torch.ones_like(x)
    there = torch.ones_like(x, dtype=torch.bool) if among is None else among
    distance = (x[..., None] - x[..., None, :]).abs().double()
    own = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    distance = distance.masked_fill(own | ~there[..., None, :], torch.inf)
    near, who = (part[..., :k] for part in distance.sort(dim=-1, stable=True))
    # Rows of few numbers have fewer neighbours, and of one number none.
    most = (there.sum(-1, keepdim=True) - 1).clamp(max=k)
    used = (torch.arange(k, device=x.device) < most)[..., None, :]
    last = (most - 1).clamp(min=0)[..., None].expand(*x.shape, 1)
    radius = near.gather(-1, last)[..., 0]
    reach = torch.maximum(near, _at(radius, who)).masked_fill(~used, 0).sum(-1)
    # A hair keeps duplicates, whose density has no bound, finite and alike.
    density = 1 / (reach / most.clamp(min=1) + 1e-10)
    around = _at(density, who).masked_fill(~used, 0).sum(-1) / most.clamp(min=1)
    return torch.where(most > 0, around / density, 1.0).to(x.dtype)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[..., N, k] entries of each row [..., N] at some places."""
    return values.gather(-1, places.flatten(-2)).view_as(places)
