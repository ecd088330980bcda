"""Prompt reduction that keeps what is unlike the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.merge import drop
from tubelet.ops.score import rank_of
from tubelet.ops.select import apportion, budget
from tubelet.ops.tools import PLAIN


@dataclass(frozen=True, kw_only=True)
class DivPrune(PromptReduction):
    """Keep the tokens that lie farthest apart: greedy max-min of the cosine distance.

    The first token is the one whose nearest neighbour is farthest; then always the one farthest
    from all that are kept. The authors' code renumbers positions.
    Each choice waits for the one before. On a GPU a kernel makes them all behind one product of
    all pairs, and keeps the distances: 1 GiB for 16,384 tokens, half as much for each pair beyond.
    Elsewhere, and beyond 32,768 tokens, the distance to the kept ones is updated token by token
    without a matrix, in some six launches for each.
    Not measured: by arithmetic, an H200 needs about 5 ms for the product of 16,384 tokens of width
    4,096 and 2.5 us for each token kept: 9 ms here, but 15 ms where a quarter is kept, 2.5 % of
    the prefill of an 8B model.
    """

    paper = Paper("DivPrune", "2503.02175", "CVPR", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.098, "share of the video tokens kept", above=0, most=1)
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num = budget(ctx.num_tokens, self.keep_ratio)
        return drop((ctx.tools or PLAIN).max_min(ctx.hidden, num), num)


@dataclass(frozen=True, kw_only=True)
class VidCom2(PromptReduction):
    """Give unusual frames more of the budget, and keep in each the tokens least like its centres.

    Only the half of the channels that vary least is compared, normalised. Likeness to a centre
    is a sum of Gaussian kernels of five widths. A frame's share grows with the softmax of how
    unlike the clip's centre it is; within a frame the tokens least like the clip's and the
    frame's centre stay.
    Gap from paper: counts per frame are reconciled to exactly the budget by largest remainders,
    where the authors round each frame.
    """

    paper = Paper("Video Compression Commander", "2505.14454", "EMNLP", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.25, "share of the video tokens kept", above=0, most=1)
    temperature: float = param(0.01, "of the softmax over frames", above=0)
    widths: tuple[float, ...] = param(
        (0.125, 0.25, 0.5, 1.0, 2.0), "of the Gaussian kernels, as squared distances", above=0
    )

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        grid, num = ctx.grid, budget(ctx.num_tokens, self.keep_ratio)
        x = F.normalize(_steadiest_half(ctx.frames.float()), dim=-1)
        to_clip = self._likeness(x, x.mean((0, 1), keepdim=True))
        to_frame = self._likeness(x, x.mean(1, keepdim=True))
        unusual = (-to_clip.mean(1) / self.temperature).softmax(0)
        ratio = (self.keep_ratio * (1 + unusual - unusual.mean())).clamp(max=1)
        least = min(1, num // grid.frames)
        counts = apportion(ratio * grid.per_frame, num, least=least, most=grid.per_frame)
        kept = rank_of(-(to_clip + to_frame)) < counts[:, None]
        return drop(kept.reshape(1, -1), num)

    def _likeness(self, x: Tensor, centre: Tensor) -> Tensor:
        distance = (x - centre).square().sum(-1)
        return torch.stack([(-distance / (2 * width)).exp() for width in self.widths]).sum(0)


def _steadiest_half(x: Tensor) -> Tensor:
    """The half of the channels whose variance over all tokens [T, P, C] is lowest."""
    spread = x.flatten(0, 1).var(0)
    channels = torch.argsort(spread, stable=True)[: x.shape[-1] // 2]
    return x[..., channels]
