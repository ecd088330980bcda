"""Token reduction inside a language model that is not taken in by attention sinks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import LayerContext
from tubelet.core.recipe import LayerReduction, Paper, param
from tubelet.ops.cosine import inverse_length
from tubelet.ops.merge import drop
from tubelet.ops.select import budget, top_k


@dataclass(frozen=True, kw_only=True)
class VAR(LayerReduction):
    """Keep what the last prompt token attends to once attention sinks have given theirs away.

    A sink is a video token that is huge in the channels in which the prompt's first token is
    hugest. Heads that look at the video and not mostly at its sinks keep a part of the attention
    to sinks; the rest goes to the other video tokens in proportion.
    Gap from paper: the paper redistributes the attention itself, in almost every layer, and drops
    nothing; here the redistributed row of one layer ranks tokens, as in FastV, whose layer and
    ratio these are. The authors list the channels of each model; here the first token shows them.
    Not settled: whether the model's norm weights take part in telling sinks; left out here.
    """

    paper = Paper("Visual Attention Redistribution", "2503.03321", "ICLR", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}
    statistics: ClassVar[bool] = True

    keep_ratio: float = param(0.5, "share of the video tokens kept", above=0, most=1)
    layer: int = param(2, "first layer that sees fewer tokens, 0-based", least=1)
    channels: int = param(2, "channels that tell sinks", least=1)
    hugeness: float = param(20.0, "normalised magnitude beyond which a token is a sink", above=0)
    left: float = param(0.6, "share of its attention that a sink keeps; 0 rules sinks out", least=0)
    most_on_sinks: float = param(0.5, "share of a head's video attention on sinks", least=0, most=1)
    least_on_video: float = param(0.2, "share of a head's attention on the video", least=0, most=1)

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num = budget(ctx.num_tokens, self.keep_ratio)
        rows = ctx.statistics().rows([-1])[:, 0]
        score = self._redistributed(rows, self._sinks(ctx)).mean(0)
        return drop(top_k(score[None], num), num)

    def _sinks(self, ctx: LayerContext) -> Tensor:
        """[N] True at sinks."""
        first, video = ctx.text[0].float().abs(), ctx.hidden[0]
        channels = first.topk(min(self.channels, len(first))).indices
        # Magnitudes of vectors whose root mean square is one.
        hugest = video[:, channels].float().abs().amax(1)
        return hugest * inverse_length(video) * video.shape[1] ** 0.5 > self.hugeness

    def _redistributed(self, rows: Tensor, sinks: Tensor) -> Tensor:
        """[H, N] attention to video tokens with what sinks give away."""
        on_sinks = (rows * sinks).sum(1, keepdim=True)
        on_video = rows.sum(1, keepdim=True)
        gives = (on_sinks <= self.most_on_sinks * on_video) & (on_video >= self.least_on_video)
        freed = (1 - self.left) * on_sinks
        others = (on_video - on_sinks).clamp(min=torch.finfo(rows.dtype).tiny)
        moved = torch.where(sinks, rows * self.left, rows * (1 + freed / others))
        return torch.where(gives, moved, rows)
