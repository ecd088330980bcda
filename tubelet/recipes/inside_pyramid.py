"""Token reduction inside a language model, a part at each of several layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import BlockTools, Site
from tubelet.core.prompt import LayerContext, LayerStatistics, PromptContext
from tubelet.core.recipe import LayerReduction, Paper, PromptReduction, param
from tubelet.ops.merge import alternate_similarity, bipartite_match, drop
from tubelet.ops.select import budget, top_k
from tubelet.ops.tools import PLAIN

_AIM = Paper("AIM: Adaptive Inference via Token Merging and Pruning", "2412.03248", "ICCV", 2025)


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(LayerReduction):
    """Halve the video tokens at a few depths, by what the last prompt token attends to there.

    Shallow layers see all tokens, deep ones an eighth. The authors cut in front of layers 8, 16
    and 24 of 32 and renumber positions behind each cut.
    Gap from paper: the score is the attention of the layer before, which has been computed; the
    authors' code projects the hidden states once more, with the weights of the layer behind.
    Not settled: the authors floor the share of the original count, here each cut rounds up.
    """

    paper = Paper("PyramidDrop", "2410.17247", "CVPR", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}
    statistics: ClassVar[bool] = True

    keep_ratio: float = param(0.5, "share of the video tokens kept at each layer", above=0, most=1)
    layers: tuple[int, ...] = param((8, 16, 24), "where tokens go, 0-based", least=1)
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        num = budget(ctx.num_tokens, self.keep_ratio)
        if num == ctx.num_tokens:
            return None
        score = ctx.statistics().rows([-1]).mean((0, 1))
        return drop(top_k(score[None], num), num)


@dataclass(frozen=True, kw_only=True)
class AIMMerging(PromptReduction):
    """Merge similar tokens of each frame in pairs until a quarter is left: the first half of AIM.

    Each round matches every second token of a frame to its most similar other one and averages
    the most similar half of the frame, weighted by how many tokens each stands for. The second
    half of the method is `AIMPruning`; they compose.
    """

    paper = _AIM
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(
        0.25, "share of each frame's tokens kept, rounded up", above=0, most=1
    )
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        left = budget(ctx.grid.per_frame, self.keep_ratio)
        if left == ctx.grid.per_frame:
            return None
        x = ctx.frames
        plan = TokenAssignment.identity(len(x), x.shape[1], x.device)
        while x.shape[1] > left:
            target, kept = bipartite_match(
                alternate_similarity(x), min(x.shape[1] // 2, x.shape[1] - left), x.shape[1]
            )
            merged = TokenAssignment.merge(target, kept, plan.size)
            plan, x = plan.compose(merged), merged.reduce(x)
        return _frames_in_a_row(plan)


@dataclass(frozen=True, kw_only=True)
class AIMPruning(LayerReduction):
    """Let fewer video tokens into each deep layer, by their PageRank: the second half of AIM.

    The graph is the attention of the layer before, sharpened, among all tokens of the prompt, so
    that text votes too. Rank starts even and flows along attention a few times, without damping;
    heads count by their root mean square. From `layer` on each layer sees a fixed share of the
    video tokens less, until one is left.
    The authors mask tokens, which saves nothing; here they are gone. Their last layers see no
    video token at all.
    Gap from paper: one token stays, since no plan may empty a prompt of its video.
    Not settled: whether keys behind the query take part in the graph; here they do not.
    Each decision computes the attention of a layer `rounds` + 1 times, quadratic in the prompt.
    """

    paper = _AIM
    identity: ClassVar = {"slope": 0.0}
    statistics: ClassVar[bool] = True

    layer: int = param(14, "first layer that sees fewer tokens, 0-based", least=1)
    slope: float = param(
        0.125, "share of the video tokens of the first layer lost at each layer", least=0, most=1
    )
    rounds: int = param(5, "times that rank flows along attention", least=1)
    temperature: float = param(0.1, "of the softmax that makes the graph", above=0)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "llm" and site.layer >= self.layer

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        share = 1 - self.slope * (ctx.site.layer - self.layer + 1)
        num = max(1, round(ctx.num_entered * share))
        if num >= ctx.num_tokens:
            return None
        stats, tools = ctx.statistics(), ctx.tools or PLAIN
        score = _page_rank(stats, self.rounds, self.temperature, tools)
        return drop(top_k(score[None], num), num)


def _frames_in_a_row(plan: TokenAssignment) -> TokenAssignment:
    """A plan [T, P] that treats each frame as a sample, as one [1, T * P] for the clip."""
    frame = torch.arange(plan.batch, device=plan.index.device)[:, None]
    return TokenAssignment(
        index=(plan.index + frame * plan.num_out).reshape(1, -1),
        weight=plan.weight.reshape(1, -1),
        anchor=(plan.anchor + frame * plan.num_in).reshape(1, -1),
        size=plan.size.reshape(1, -1),
    )


def _page_rank(
    stats: LayerStatistics, rounds: int, temperature: float, tools: BlockTools
) -> Tensor:
    """[N] rank of the video tokens in the graph of sharpened attention among all tokens."""
    q, k, scale = stats.queries(), stats.keys(), stats.scale / temperature
    heads, num = q.shape[:2]
    places = torch.arange(num, device=q.device)
    totals = tools.row_totals(q, k, places, scale)
    rank = torch.full((heads, num), 1 / num, device=q.device)
    for _ in range(rounds):
        rank = tools.received(q, k, places, scale, totals, rank)
    return rank.square().mean(0).sqrt()[stats.video_places()]
