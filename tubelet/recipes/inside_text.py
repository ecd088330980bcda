"""Token reduction inside a language model, by what the words of the question attend to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import RecipeError
from tubelet.core.prompt import LayerContext
from tubelet.core.recipe import LayerReduction, Paper, param
from tubelet.ops.cosine import products
from tubelet.ops.density import density_peaks
from tubelet.ops.merge import drop
from tubelet.ops.rows import row_parts
from tubelet.ops.select import budget, kept_positions, top_k


@dataclass(frozen=True, kw_only=True)
class SparseVLM(LayerReduction):
    """Let the words that the video is about rate its tokens, and recycle a part of what goes.

    Raters are the words of the question whose embeddings get more than the mean share of a
    softmax of the video's embeddings over words. Their attention logits in the layer before,
    averaged over heads, rate the tokens. Of those that go, the best are joined into a few by
    density peaks, ten to one.
    The authors have a table of counts for 64, 96, 128 and 192 of 576 tokens (the default is that
    for 192) and take single prompts; here any shares and batches.
    Gap from paper: the paper derives how many go from the rank of the attention, the authors'
    code from that table; joined tokens stand at the place of their centre, not behind the video.
    Version 1 without the later corrections of the logits.
    Not settled: whether joined tokens are added or averaged; averaged here.
    """

    paper = Paper("SparseVLM", "2410.04417", "ICML", 2025)
    identity: ClassVar = {"keep_ratios": (1.0,)}
    statistics: ClassVar[bool] = True

    layers: tuple[int, ...] = param((2, 6, 15), "where tokens go, 0-based", least=1)
    keep_ratios: tuple[float, ...] = param(
        (300 / 576, 200 / 576, 110 / 576),
        "share of the video tokens of the first layer kept at each layer, or one for all",
        above=0,
        most=1,
    )
    recycled: float = param(0.3, "share of what goes that is joined instead", least=0, most=1)
    joined: int = param(10, "recycled tokens that become one, about", least=1)
    positions: str = param("compact", "keep, compact or anchor")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.keep_ratios) not in (1, len(self.layers)):
            raise RecipeError(
                f"SparseVLM.keep_ratios must be one share or one for each of {len(self.layers)} "
                f"layers, got {self.keep_ratios}"
            )

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        place = min(self.layers.index(ctx.site.layer), len(self.keep_ratios) - 1)
        num = budget(ctx.num_entered, self.keep_ratios[place])
        if num >= ctx.num_tokens:
            return None
        stats = ctx.statistics()
        behind = stats.question() or [-1]
        raters = [behind[i] for i in _raters(ctx, len(behind))]
        logits = [part.mean(0).sum(0) for part in row_parts(stats.rows, raters, softmax=False)]
        score = torch.stack(logits).sum(0) / len(raters)
        kept = top_k(score[None], num)
        extra = int((ctx.num_tokens - num) * self.recycled)
        if extra == 0:
            return drop(kept, num)
        recycled = kept_positions(top_k(score.masked_fill(kept[0], -torch.inf)[None], extra), extra)
        return _with_joined(ctx.hidden, kept, recycled, extra // self.joined + 1)


@dataclass(frozen=True, kw_only=True)
class MustDrop(LayerReduction):
    """Drop, at several layers, tokens that no word attends to; the tower's key tokens stay.

    A token goes where the attention of all words of the question to it, in the layer before,
    is below a share of their attention to the video, and that of each word is below a bound.
    Never dropped are the tokens that the tower's last layer attends to most. How many stay depends
    on the video; both thresholds were tuned on 576 tokens, and mean more drastic cuts for longer
    videos.
    Gap from paper: the merging of like neighbours inside the vision tower, and dropping tokens
    from the caches of layers before the last cut, are not done. Towers without class token have
    no key tokens in the paper; `saliency` "received" takes the mean over all queries instead.
    """

    paper = Paper("Multi-Stage Vision Token Dropping", "2411.10803", year=2024)
    identity: ClassVar = {"share": 0.0}
    statistics: ClassVar[bool] = True

    layers: tuple[int, ...] = param((2, 6, 10, 14), "where tokens go, 0-based", least=1)
    share: float = param(1e-3, "of all words' attention to the video: below it goes", least=0)
    single: float = param(1e-3, "attention of one word that saves a token", least=0)
    key_ratio: float = param(0.08, "share of the tokens that always stay", above=0, most=1)
    saliency: str = param("received", "what makes key tokens: class (as in the paper) or received")
    positions: str = param("compact", "keep, compact or anchor")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency not in ("class", "received"):
            raise RecipeError(f"MustDrop.saliency must be class or received, got {self.saliency!r}")

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return frozenset({(self.saliency, -1)})

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        stats = ctx.statistics()
        parts = row_parts(stats.rows, stats.question() or [-1])
        words = torch.cat([part.mean(0) for part in parts])
        total = words.sum(0)
        gone = (total < self.share * total.sum()) & (words.amax(0) < self.single)
        saliency = ctx.statistic(self.saliency, -1)
        keys = budget(ctx.num_entered, self.key_ratio)
        kept = ~gone | top_k(saliency, min(keys, ctx.num_tokens))[0]
        return None if bool(kept.all()) else TokenAssignment.keep_where(kept[None])[0]


def _raters(ctx: LayerContext, num: int) -> list[int]:
    """Which of the last `num` words the video is about."""
    video = ctx.hidden if ctx.embeds is None else ctx.embeds
    text = ctx.text if ctx.text_embeds is None else ctx.text_embeds
    share = products(video, text[None, -num:])[0].softmax(1).mean(0)
    raters = (share > share.mean()).nonzero()[:, 0].tolist()
    return raters or list(range(num))


def _with_joined(hidden: Tensor, kept: Tensor, recycled: Tensor, num: int) -> TokenAssignment:
    """The kept tokens [1, N] as they are, the recycled ones [1, R] as means around `num` peaks."""
    x = hidden.gather(1, recycled[..., None].expand(-1, -1, hidden.shape[2]))
    num = min(num, recycled.shape[1])
    centres = kept_positions(top_k(density_peaks(x, 5), num), num)
    gap = torch.cdist(x.float(), x.gather(1, centres[..., None].expand(-1, -1, x.shape[2])).float())
    nearest = centres.gather(1, gap.argmin(2)).scatter(1, centres, centres)
    every = torch.arange(kept.shape[1], device=kept.device)[None]
    target = torch.where(kept, every, -1).scatter(1, recycled, recycled.gather(1, nearest))
    stays = kept.scatter(1, recycled.gather(1, centres), True)
    ones = torch.ones(kept.shape, device=kept.device)
    return TokenAssignment.merge(target, kept_positions(stays, int(kept.sum()) + num), ones)
