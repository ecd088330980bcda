"""Token reduction for prompts by groups of any shape: quadtrees, chains, connected components."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.prompt import LayerContext, PromptContext
from tubelet.core.recipe import LayerReduction, Paper, PromptReduction, param
from tubelet.ops.components import link


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

    def acts_on(self, site: Site) -> bool:
        return site.kind == "llm" and site.layer == self.layer

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        if ctx.num_tokens != ctx.num_original:
            raise UnsupportedError(
                f"{self.name} needs all {ctx.num_original} video tokens, but another recipe has "
                f"left {ctx.num_tokens}; use it alone"
            )
        labels, weights, start = [], [], 0
        for grid in ctx.grids:
            tokens = ctx.hidden[0, start : start + grid.num_video].float()
            label, weight = self._groups(tokens, grid)
            labels.append(label + start)
            weights.append(weight)
            start += grid.num_video
        return _grouped(torch.cat(labels), torch.cat(weights))

    def _groups(self, tokens: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """[N] first token of each token's group, and its weight in the group's mean."""
        frames = tokens.unflatten(0, (grid.frames, grid.per_frame))
        corner, mean = self._squares(frames, grid)
        row = torch.arange(grid.frames, device=tokens.device)[:, None] * grid.per_frame
        square = (corner + row).flatten()
        # Quadtrees nest: at any place, the squares of two frames lie one inside the other.
        alike = F.cosine_similarity(mean[1:], mean[:-1], dim=-1) >= self.temporal
        pairs = (alike & (self.temporal < 1)).flatten()
        late, early = square[grid.per_frame :][pairs], square[: -grid.per_frame][pairs]
        group = link(late, early, grid.num_video)
        return group[square], _means_of_means(square, group)

    def _squares(self, frames: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """[T, P] first place of each place's square, and [T, P, C] the square's mean."""
        levels = _quadtree(grid, frames.device)
        places = torch.arange(grid.per_frame, device=frames.device)
        corner, mean = places.expand(frames.shape[:2]), frames
        if self.spatial == 1:
            return corner, mean
        finer = frames
        for box in levels[1 : max(1, len(levels) - self.root)]:
            coarse = _box_means(frames, box)
            like = F.cosine_similarity(coarse, finer, dim=-1)
            index = box.expand_as(like)
            worst = torch.full_like(like, torch.inf).scatter_reduce(1, index, like, "amin")
            whole = worst.gather(1, index) >= self.spatial
            first = torch.full_like(places, len(places)).scatter_reduce(0, box, places, "amin")
            # Coarser levels come later, so a whole square hides what is inside it.
            corner = torch.where(whole, first[box], corner)
            mean = torch.where(whole[..., None], coarse, mean)
            finer = coarse
        return corner, mean


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


def _box_means(frames: Tensor, box: Tensor) -> Tensor:
    """[T, P, C] mean of the box that each place of [T, P, C] lies in."""
    sums = torch.zeros_like(frames).index_add(1, box, frames)
    count = torch.bincount(box, minlength=len(box)).clamp(min=1)
    return (sums / count[:, None])[:, box]


def _means_of_means(part: Tensor, group: Tensor) -> Tensor:
    """[N] weight of each token in the mean over a group of the means of its parts.

    Args:
        part: [N] first token of each token's part.
        group: [N] first token of each part's group, read at first tokens of parts.
    """
    first = part == torch.arange(len(part), device=part.device)
    sizes = torch.bincount(part, minlength=len(part))
    parts = torch.bincount(group[first], minlength=len(part))
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
        unit = F.normalize(ctx.frames.float(), dim=-1)
        frame, first, second = (unit @ unit.transpose(1, 2) > self.threshold).nonzero().T
        row = frame * ctx.grid.per_frame
        part = link(first + row, second + row, ctx.num_tokens)
        group = self._over_frames(ctx.hidden, part)
        own = torch.arange(ctx.num_tokens, device=part.device)
        roots = (group[part] == own).nonzero()[:, 0]
        if len(roots) == ctx.num_tokens:
            return None
        share = _means_of_means(part, group)
        shares = ctx.hidden[0].float() * share[:, None]
        means = torch.zeros_like(shares).index_add(0, group[part], shares)[roots]
        label = roots[_most_similar(unit.flatten(0, 1), F.normalize(means, dim=-1))]
        label = label.scatter(0, roots, roots)
        count = torch.bincount(label, minlength=len(own))[label]
        home = share * (label == group[part])
        left = torch.zeros_like(share).index_add(0, label, home)[label]
        return _grouped(label, (1 + home / left) / (count + 1))

    def _over_frames(self, hidden: Tensor, part: Tensor) -> Tensor:
        """[N] first token of the component of each part of a frame, read at first tokens."""
        own = torch.arange(len(part), device=part.device)
        first = (part == own).nonzero()[:, 0]
        ones = torch.ones(1, len(part), device=part.device)
        means = TokenAssignment.merge(part[None], first[None], ones).reduce(hidden.float())[0]
        unit = F.normalize(means, dim=-1)
        ends = []
        for start in range(0, len(unit), CHUNK):
            row, column = (unit[start : start + CHUNK] @ unit.T > self.threshold).nonzero().T
            ends.append(torch.stack([row + start, column]))
        late, early = torch.cat(ends, dim=1)
        return own.scatter(0, first, first[link(late, early, len(first))])


CHUNK = 1024
"""Rows of a matrix of similarities that exist at once."""


def _most_similar(unit: Tensor, means: Tensor) -> Tensor:
    """[N] which of [R, C] unit vectors each of [N, C] is most like; the first of equals."""
    parts = [(unit[s : s + CHUNK] @ means.T).argmax(1) for s in range(0, len(unit), CHUNK)]
    return torch.cat(parts)
