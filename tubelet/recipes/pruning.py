"""Token pruning: methods that score tokens and keep the best."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site, TokenContext
from tubelet.core.recipe import Paper, RaggedReduction, TokenReduction, param
from tubelet.ops.merge import drop
from tubelet.ops.score import class_attention, pixel_difference, tubelet_frames
from tubelet.ops.segment import run_starts
from tubelet.ops.select import budget, cdf_sample, top_k


@dataclass(frozen=True, kw_only=True)
class RLT(RaggedReduction):
    """Drop tubelets that repeat what their place showed before, judged on pixels.

    A tubelet is compared with the last *kept* one at its place (mean absolute difference of the
    first frame there and the last frame here), so slow fades add up; the paper compares with the
    previous tubelet, kept or not. A difference equal to the threshold keeps the tubelet, so that
    0 keeps all.
    Gap from paper: no run-length embedding, which is off in the authors' defaults as well.
    """

    paper = Paper("Run-Length Tokenization", "2411.05222", "NeurIPS", 2024)
    identity: ClassVar = {"threshold": 0.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "pixels"})

    threshold: float = param(
        0.1, "smallest change that keeps a tubelet, in the model's normalised pixel units", least=0
    )

    def acts_on(self, site: Site) -> bool:
        return site.kind == "input"

    def keep(self, ctx: TokenContext) -> Tensor | None:
        assert ctx.pixels is not None
        grid, (depth, tall, wide) = ctx.grid, ctx.tubelet
        if grid.frames == 1:
            return None
        # What is left over at the ends of a clip never reaches the host's embedding.
        seen = ctx.pixels[:, : grid.frames * depth, :, : grid.height * tall, : grid.width * wide]
        cut = tubelet_frames(seen.float(), ctx.tubelet)
        starts = run_starts(cut, pixel_difference, self.threshold)
        return F.pad(starts.flatten(1), (grid.before, grid.after), value=True)


@dataclass(frozen=True, kw_only=True)
class ATS(RaggedReduction):
    """Keep the tokens that inverse-transform sampling of the class token's attention picks.

    Significance is the class token's attention times the value norm, summed over heads. Evenly
    spaced levels of its cumulative distribution each pick the nearest token; levels that pick
    the same token keep it once, so the count adapts to the input. Keys and values of the layer
    stay full: tokens leave after its attention.
    """

    paper = Paper("Adaptive Token Sampling", "2111.15667", "ECCV", 2022)
    identity: ClassVar = {"min_tokens": 2**31}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "class token"})
    statistics: ClassVar[frozenset[str]] = frozenset({"rows"})
    takes_padding: ClassVar[bool] = True

    first_layer: int = param(3, "first layer that samples, 0-based", least=0)
    samples: float = param(
        1.0, "sampling levels as a share of the model's video tokens", above=0, most=1
    )
    min_tokens: int = param(8, "a layer that would keep fewer video tokens keeps all", least=1)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer >= self.first_layer

    def keep(self, ctx: TokenContext) -> Tensor | None:
        if ctx.num_tokens - ctx.protected <= self.min_tokens:
            return None
        stats = ctx.statistics()
        row = stats.rows([0])[:, :, 0, ctx.protected :]
        score = class_attention(row, stats.value_norm()[:, :, ctx.protected :])
        video = None if ctx.valid is None else ctx.valid[:, ctx.protected :]
        picked = cdf_sample(score, budget(ctx.grid.num_video, self.samples), video)
        few = picked.sum(1, keepdim=True) < self.min_tokens
        return F.pad(picked | few, (ctx.protected, 0), value=True)


@dataclass(frozen=True, kw_only=True)
class EVAD(TokenReduction):
    """Keep the middle frame and the tokens that receive most attention, at three depths.

    Importance is the attention a token receives, averaged over heads; queries of the keyframe
    count `keyframe_weight` times. The authors use a ratio of 0.7 with weight 1 or 0.6 with 4,
    in layers 3, 6 and 9 of 12.
    The method is trained in the paper together with a decoder that re-inserts mask tokens;
    only its token dropping is here, training-free.
    Never fewer tokens stay than a whole frame has; behind a recipe that thinned the keyframe
    before, that keeps more than the ratio asks for.
    """

    paper = Paper("Efficient Video Action Detection with Token Dropout", "2304.08451", "ICCV", 2023)
    identity: ClassVar = {"keep_ratio": 1.0}
    statistics: ClassVar[frozenset[str]] = frozenset({"received"})

    keep_ratio: float = param(0.7, "share of the tokens kept each time", above=0, most=1)
    keyframe_weight: float = param(1.0, "weight of the keyframe's queries", above=0)
    depths: tuple[float, ...] = param(
        (0.25, 0.5, 0.75), "where tokens are dropped, as shares of the depth", least=0, below=1
    )

    def acts_on(self, site: Site) -> bool:
        layers = {int(depth * site.num_layers) for depth in self.depths}
        return site.kind == "joint" and site.layer in layers

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        frame = ctx.grid.frame_index(ctx.hidden.device)[ctx.anchor]
        keyframe = frame == ctx.grid.frames // 2
        weight = torch.where(keyframe, self.keyframe_weight, 1.0)
        importance = ctx.statistics().received(weight)
        guarded = keyframe | (frame < 0)
        # The keyframe is never reduced, so every sample guards the same number of tokens.
        least = min(ctx.num_tokens, ctx.protected + ctx.grid.per_frame)
        num = budget(ctx.num_tokens, self.keep_ratio, least)
        if num == ctx.num_tokens:
            return None
        kept = top_k(torch.where(guarded, torch.inf, importance), num)
        return drop(kept, num)
