"""The ceiling: a reducer that is told which tokens the answer needs."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site, TokenContext
from tubelet.core.errors import ShapeError
from tubelet.core.recipe import TokenReduction, param
from tubelet.ops.merge import drop
from tubelet.ops.score import white_noise
from tubelet.ops.select import budget, top_k


class Answers:
    """The masks of the batch that runs next.

    `relevant` is [B, N video tokens], True where a token shows something that the answer needs.
    """

    relevant: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Oracle(TokenReduction):
    """Keep the tokens that the answer needs, known from the simulator, after the embedding.

    A budget with room to spare is filled with random tokens, and of more needed tokens than the
    budget holds a random subset stays. Not a method: it reads the labels of the test.
    """

    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.5, "share of the video tokens kept", above=0, most=1)
    seed: int = param(0, "which random choice")
    answers: Answers = field(
        default_factory=Answers, metadata={"doc": "masks of the running batch", "bounds": {}}
    )

    def acts_on(self, site: Site) -> bool:
        return site.kind == "input"

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        grid, relevant = ctx.grid, self.answers.relevant
        shape = (ctx.hidden.shape[0], grid.num_video)
        if relevant is None or relevant.shape != shape:
            found = "none" if relevant is None else tuple(relevant.shape)
            raise ShapeError(f"the oracle needs masks {shape} of the running batch, has {found}")
        # Noise lies in [0, 1), so a needed token always comes before one that is not.
        noise = white_noise(grid.num_video, self.seed, ctx.hidden.device)[None]
        num = budget(grid.num_video, self.keep_ratio)
        kept = top_k(relevant.to(noise.dtype) + noise, num)
        stays = F.pad(kept, (grid.before, grid.after), value=True)
        return drop(stays, num + grid.before + grid.after)

    def __str__(self) -> str:
        return f"Oracle(keep_ratio={self.keep_ratio:g})"


@dataclass(frozen=True, kw_only=True)
class KeepFrames(TokenReduction):
    """Keep whole token frames, evenly spaced, at their own times."""

    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.5, "share of the token frames kept", above=0, most=1)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "input"

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        grid = ctx.grid
        chosen = evenly(grid.frames, self.keep_ratio)
        if len(chosen) == grid.frames:
            return None
        device = ctx.hidden.device
        frame = grid.frame_index(device)
        stays = torch.isin(frame, torch.tensor(chosen, device=device)) | (frame < 0)
        num = len(chosen) * grid.per_frame + grid.before + grid.after
        return drop(stays.expand(ctx.hidden.shape[0], -1), num)


def evenly(num: int, share: float) -> list[int]:
    """Places of round(share * num), at least one, of `num` things, in the middles of equal runs."""
    count = max(round(share * num), 1)
    return [int((i + 0.5) * num / count) for i in range(count)]
