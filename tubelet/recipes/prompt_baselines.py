"""Controls that every prompt reduction has to beat: random tokens and fewer frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.merge import drop
from tubelet.ops.score import white_noise
from tubelet.ops.select import budget, top_k


@dataclass(frozen=True, kw_only=True)
class RandomPrompt(PromptReduction):
    """Keep random tokens of each video: the control for every choice of tokens.

    The choice depends on the seed and the token's place alone.
    """

    paper = Paper("PatchDropout", arxiv="2208.07220", venue="WACV", year=2023)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.5, "share of the video tokens kept", above=0, most=1)
    seed: int = param(0, "which random choice")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num = budget(ctx.num_tokens, self.keep_ratio)
        noise = white_noise(ctx.num_tokens, self.seed, ctx.hidden.device)[None]
        return drop(top_k(noise, num), num)


@dataclass(frozen=True, kw_only=True)
class UniformFrames(PromptReduction):
    """Keep all tokens of evenly spaced frames: the control for every choice over time.

    The vision tower still sees every frame; sampling fewer frames would save its work too. The
    number of frames is rounded up.
    """

    paper = Paper("Temporal Segment Networks", arxiv="1608.00859", venue="ECCV", year=2016)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.5, "share of the frames kept", above=0, most=1)

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        grid, device = ctx.grid, ctx.hidden.device
        frames = budget(grid.frames, self.keep_ratio)
        if frames == grid.frames:
            return None
        # The middle frame of each of `frames` equal stretches.
        middle = (2 * torch.arange(frames, device=device) + 1) * grid.frames // (2 * frames)
        kept = torch.zeros(grid.frames, dtype=torch.bool, device=device)
        kept[middle] = True
        return drop(kept.repeat_interleave(grid.per_frame)[None], frames * grid.per_frame)
