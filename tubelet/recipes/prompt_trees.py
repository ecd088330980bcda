"""Token reduction for prompts by groups of any shape: quadtrees, chains, connected components."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.prompt import LayerContext, PromptContext
from tubelet.core.recipe import LayerReduction, Paper, PromptReduction, param
from tubelet.ops.components import link
from tubelet.ops.cosine import PART, cosine, cosines, inverse_length, products


@dataclass(frozen=True, kw_only=True)
class STTM(LayerReduction):
    """Merge uniform squares of a frame by a quadtree, then chains of alike squares over time.

    From coarse to fine, a square stays whole if its mean is like the mean of each of its four
    parts. Squares of consecutive frames of which one lies inside the other are linked if their
    means are alike; what is linked, also through others, becomes the mean of its squares,
    whatever their sizes, in the place of the earliest. How many tokens stay depends on the clip.
    The authors tune both thresholds for each model, data set and budget, within 0.75 to 0.95 and
    0.5 to 0.65; the defaults lie between. Where they merge in front of the first layer (72B
    models), layer 1 is the earliest here. All video tokens must be there: recipes that shorten
    the prompt do not go with it.
    Gap from paper: the authors renumber the tokens of LLaVA models, but go on behind the longer
    prompt when decoding; here positions are kept, as they do for Qwen2-VL.
    Not settled: whether the root level is counted from the top, as here. A square's mean is over
    its tokens; the authors pool level by level, which differs where sides are odd.
    """

    paper = Paper("Multi-Granular Spatio-Temporal Token Merging", "2507.07990", "ICCV", 2025)
    identity: ClassVar = {"spatial": 1.0, "temporal": 1.0}

    spatial: float = param(
        0.85, "cosine from which a part is like its square; 1 merges no squares", least=-1, most=1
    )
    temporal: float = param(
        0.6, "cosine from which squares of two frames are alike; 1 links none", least=-1, most=1
    )
    root: int = param(1, "level of the largest squares; 0 is the whole frame", least=0)
    layer: int = param(2, "first layer that sees fewer tokens, 0-based", least=1)

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        if ctx.num_tokens != ctx.num_original:
            raise UnsupportedError(
                f"{self.name} needs all {ctx.num_original} video tokens, but another recipe has "
                f"left {ctx.num_tokens}; use it alone"
            )
        labels, weights, start = [], [], 0
        for grid in ctx.grids:
            tokens = ctx.hidden[0, start : start + grid.num_video]
            label, weight = self._groups(tokens, grid)
            labels.append(label + start)
            weights.append(weight)
            start += grid.num_video
        return _grouped(torch.cat(labels), torch.cat(weights))

    def _groups(self, tokens: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """[N] first token of each token's group, and its weight in the group's mean."""
        frames = tokens.unflatten(0, (grid.frames, grid.height, grid.width))
        corner, node, nodes = self._squares(frames, grid)
        row = torch.arange(grid.frames, device=tokens.device)[:, None] * grid.per_frame
        square = (corner + row).flatten()
        if self.temporal == 1:
            return square, _means_of_means(square, square)
        # Quadtrees nest: at any place, the squares of two frames lie one inside the other.
        alike = (_cosine_of(nodes, node[1:], node[:-1]) >= self.temporal).flatten()
        late, early = square[grid.per_frame :], square[: -grid.per_frame]
        # A link to itself changes nothing.
        group = link(late, torch.where(alike, early, late), grid.num_video)
        return group[square], _means_of_means(square, group)

    def _squares(self, frames: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """[T, P] first place of each place's square, [T, P] row of its mean, and [R, C] means."""
        boxes = _quadtree(grid, frames.device)
        boxes = boxes[: max(1, len(boxes) - self.root)] if self.spatial < 1 else boxes[:1]
        nodes, rows = _pyramid(frames, len(boxes))
        places = boxes[0]
        corner, node = places.expand(len(frames), -1), rows[0]
        for level in range(1, len(boxes)):
            box, coarse, finer = boxes[level], rows[level], rows[level - 1]
            coarse, finer = coarse[:, box], finer[:, boxes[level - 1]]
            like = _cosine_of(nodes, coarse, finer)
            index = box.expand_as(like)
            worst = torch.full_like(like, torch.inf).scatter_reduce(1, index, like, "amin")
            whole = worst.gather(1, index) >= self.spatial
            first = torch.full_like(places, len(places)).scatter_reduce(0, box, places, "amin")
            # Coarser levels come later, so a whole square hides what is inside it.
            corner = torch.where(whole, first[box], corner)
            node = torch.where(whole, coarse, node)
        return corner, node, nodes


def _quadtree(grid: TokenGrid, device: torch.device) -> list[Tensor]:
    """[P] box of each place of a frame, level by level from single places to the whole frame.

    Where a side is odd, its first row or column has no partner.
    """
    rows = torch.arange(grid.height, device=device)
    columns = torch.arange(grid.width, device=device)
    height, width, levels = grid.height, grid.width, []
    while True:
        levels.append((rows[:, None] * width + columns).flatten())
        if height == width == 1:
            return levels
        rows, columns = (rows + height % 2) // 2, (columns + width % 2) // 2
        height, width = (height + 1) // 2, (width + 1) // 2


def _pyramid(frames: Tensor, levels: int) -> tuple[Tensor, list[Tensor]]:
    """[R, C] float32 means of the boxes of all levels, and for each level the rows [T, boxes].

    Sums of neighbours, in a fixed order: adding by index would depend on the device's timing.
    """
    sums, count = frames, torch.ones_like(frames[:1, ..., :1], dtype=torch.float32)
    means = [frames.flatten(0, 2)]
    rows = [torch.arange(len(means[0]), device=frames.device).view(len(frames), -1)]
    for _ in range(levels - 1):
        sums, count = _fours(sums), _fours(count)
        start = sum(len(mean) for mean in means)
        means.append((sums / count).flatten(0, 2))
        own = torch.arange(len(means[-1]), device=frames.device)
        rows.append((start + own).view(len(frames), -1))
    return torch.cat(means).float(), rows


def _fours(x: Tensor) -> Tensor:
    """float32 sums of 2 x 2 places of [T, H, W, C]; an odd side is filled up in front."""
    x = F.pad(x, (0, 0, x.shape[2] % 2, 0, x.shape[1] % 2, 0))
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4), dtype=torch.float32)


def _cosine_of(nodes: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Cosines of rows of [R, C] with others, in the shape of `one`, a part at a time."""
    step = max(1, PART // nodes.shape[1])
    pairs = zip(one.flatten().split(step), other.flatten().split(step), strict=True)
    return torch.cat([cosine(nodes[a], nodes[b]) for a, b in pairs]).view_as(one)


def _means_of_means(part: Tensor, group: Tensor) -> Tensor:
    """[N] weight of each token in the mean over a group of the means of its parts.

    Args:
        part: [N] first token of each token's part.
        group: [N] first token of each part's group, read at first tokens of parts.
    """
    own = torch.arange(len(part), device=part.device)
    zeros, ones = torch.zeros_like(part), torch.ones_like(part)
    sizes = zeros.scatter_add(0, part, ones)
    parts = zeros.scatter_add(0, group, (part == own).long())
    return 1 / (sizes[part] * parts[group[part]]).float()


def _grouped(label: Tensor, weight: Tensor) -> TokenAssignment | None:
    """Weighted sums of groups named by their first token; None where each token is one."""
    own = torch.arange(len(label), device=label.device)
    kept = (label == own).nonzero()[:, 0]
    if len(kept) == len(label):
        return None
    plan = TokenAssignment.merge(label[None], kept[None], torch.ones_like(weight)[None])
    return replace(plan, weight=weight[None])


@dataclass(frozen=True, kw_only=True)
class LLaVAScissor(PromptReduction):
    """Replace tokens by the connected components of their similarity, per frame, then per clip.

    Tokens of a frame are linked if their cosine passes a threshold; each component becomes its
    mean. The means of all frames are linked and averaged in the same way. Then every token of
    the clip is added to the most similar of these, and the sum divided by one more than their
    number. How many tokens stay depends on the clip. Positions are renumbered.
    Means are compared in the host's precision, all pairs of them: where little is alike, a clip of
    thousands of tokens costs a good part of what a layer of the model does.
    Gap from paper: components are exact; the authors sample nodes at random without a seed, and
    may lose tokens. A token goes to one output only: where it is more like another component
    than its own, the mean of its own is that of the tokens left there, of which the first always
    stays.
    Not settled: the paper's threshold is 0.9, the code's 0.95.
    """

    paper = Paper("LLaVA-Scissor: Semantic Connected Components", "2506.21862", "arXiv", 2025)
    identity: ClassVar = {"threshold": 1.0}

    threshold: float = param(0.9, "cosine above which tokens are linked", least=-1, most=1)
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.threshold == 1:
            return None
        part = self._in_frames(ctx.frames)
        group = self._over_frames(ctx.hidden, part)
        share = _means_of_means(part, group)
        parted = _grouped(group[part], share)
        if parted is None:
            return None
        roots = parted.anchor[0]
        nearest = [best.argmax(2) for _, best in cosines(ctx.hidden, parted.reduce(ctx.hidden))]
        label = roots[torch.cat(nearest, 1)[0]].scatter(0, roots, roots)
        ones = torch.ones_like(share)[None]
        plan = TokenAssignment.merge(label[None], parted.anchor, ones)
        home = share * (label == group[part])
        left = replace(plan, weight=ones).reduce(home[None, :, None])[0, :, 0]
        weight = (1 + home / left[plan.index[0]]) / (plan.size[0, plan.index[0]] + 1)
        return replace(plan, weight=weight[None])

    def _in_frames(self, frames: Tensor) -> Tensor:
        """[N] first token of the component of each token in its frame."""
        ends = []
        for start, part in cosines(frames, frames):
            frame, row, column = (part > self.threshold).triu(start + 1).nonzero().T
            before = frame * frames.shape[1]
            ends.append(torch.stack([before + row + start, before + column]))
        first, second = torch.cat(ends, dim=1)
        return link(first, second, frames.shape[:2].numel())

    def _over_frames(self, hidden: Tensor, part: Tensor) -> Tensor:
        """[N] first token of the component of each part of a frame, read at first tokens."""
        own = torch.arange(len(part), device=part.device)
        first = (part == own).nonzero()[:, 0]
        ones = torch.ones(1, len(part), device=part.device)
        means = TokenAssignment.merge(part[None], first[None], ones).reduce(hidden)
        length, ends = inverse_length(means)[0], []
        for start in range(0, len(first), ROWS):
            # Each pair once.
            part, rest = means[:, start : start + ROWS], means[:, start:]
            cosine = products(part, rest)[0] * length[start : start + ROWS, None] * length[start:]
            row, column = (cosine > self.threshold).triu(1).nonzero().T
            ends.append(torch.stack([row, column]) + start)
        late, early = torch.cat(ends, dim=1)
        return own.scatter(0, first, first[link(late, early, len(first))])


ROWS = 2048
"""Rows of a matrix of similarities that are searched at once; each search waits for the device."""
