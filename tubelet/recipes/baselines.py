"""Baselines that every reducer has to beat: random drop and uniform pooling."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site, TokenContext
from tubelet.core.recipe import Paper, TokenReduction, param
from tubelet.ops.merge import drop, grid_pool
from tubelet.ops.score import white_noise
from tubelet.ops.select import budget, stratified_top_k, top_k


@dataclass(frozen=True, kw_only=True)
class RandomDrop(TokenReduction):
    """Drop random tokens after the embedding.

    The choice depends on the seed and the token's place alone, so every sample of a batch, every
    device and every run drops the same tokens.
    """

    paper = Paper("PatchDropout", arxiv="2208.07220", venue="WACV", year=2023)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.5, "share of the video tokens kept", above=0, most=1)
    per_frame: bool = param(False, "keep the same share of every frame")
    seed: int = param(0, "which random choice")

    def acts_on(self, site: Site) -> bool:
        return site.kind == "input"

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        device, grid = ctx.hidden.device, ctx.grid
        noise = white_noise(grid.num_video, self.seed, device)[None]
        if self.per_frame:
            frames = grid.frame_index(device)[~grid.protected(device)]
            kept = stratified_top_k(noise, frames, grid.frames, self.keep_ratio)
        else:
            kept = top_k(noise, budget(grid.num_video, self.keep_ratio))
        groups = grid.frames if self.per_frame else 1
        num = budget(grid.num_video // groups, self.keep_ratio) * groups
        extra = grid.before + grid.after
        stays = F.pad(kept, (grid.before, grid.after), value=True)
        return drop(stays.expand(ctx.hidden.shape[0], -1), num + extra)


@dataclass(frozen=True, kw_only=True)
class UniformPool(TokenReduction):
    """Average boxes of neighbouring tokens after the embedding; a smaller grid remains."""

    paper = Paper("Token Pooling in Vision Transformers", arxiv="2110.03860", year=2021)
    identity: ClassVar = {"factor": (1, 1, 1)}
    requires: ClassVar[frozenset[str]] = frozenset({"grid"})

    factor: tuple[int, int, int] = param(
        (1, 2, 2), "box of (time, height, width) tokens averaged into one", least=1
    )
    proportional: bool = param(False, "add log(size) to a pooled token's attention logits")

    @property
    def size_bias(self) -> bool:
        return self.proportional

    def acts_on(self, site: Site) -> bool:
        return site.kind == "input"

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        if self.factor == (1, 1, 1):
            return None
        return grid_pool(ctx.grid, self.factor, ctx.hidden.shape[0], ctx.hidden.device)
