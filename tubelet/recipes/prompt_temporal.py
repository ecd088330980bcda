"""Prompt reduction by what changes over time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.cosine import cosine
from tubelet.ops.merge import drop
from tubelet.ops.select import budget, guarded_top_k


@dataclass(frozen=True, kw_only=True)
class EVS(PromptReduction):
    """Keep the first frame and the tokens that differ most from their place one frame before.

    Dissimilarity is one minus the cosine of two projected tokens; the highest of the whole clip
    stay, so a moving frame keeps more than a still one. The paper's own score is the change of
    pixels; its shipped engines compare embeddings, as here.
    Gap from paper: the engines keep the whole first frame even when that is more than was asked
    for; here such a ratio is refused.
    """

    paper = Paper("Efficient Video Sampling", "2510.14624", year=2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.3, "share of the video tokens kept", above=0, most=1)

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        change = 1 - cosine(ctx.frames[1:], ctx.frames[:-1])
        first = torch.zeros(ctx.num_tokens, dtype=torch.bool, device=change.device)
        first[: ctx.grid.per_frame] = True
        score = F.pad(change.flatten(), (ctx.grid.per_frame, 0))
        num = budget(ctx.num_tokens, self.keep_ratio)
        return drop(guarded_top_k(score[None], num, first[None], self.name), num)
