"""Head patterns: each head gets the fixed pattern that loses least on some sampled queries."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import AttentionContext
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import Paper, param
from tubelet.ops.block_mask import Blocks, frame_bands
from tubelet.ops.select import budget
from tubelet.recipes.block_policy import BlockPolicy, Call
from tubelet.recipes.profiles import profile_of, save_profile
from tubelet.recipes.windows import first_frame

PATTERNS = ("full", "skip", "diagonal", "multi-diagonal", "stripes")
"""Patterns of `SparseVDiT`, by number."""


def band_width(blocks: Blocks, density: float) -> float:
    """Half width in tokens of a band that covers a share of the map, text counted as kept.

    The band |i - j| <= w covers 1 - (1 - w / L)^2 of L x L, so w = L (1 - sqrt(1 - s)), where s is
    the density less the share of the text rows and columns.
    """
    num = blocks.num_tokens
    rest = max(0.0, density - 2 * (num - blocks.num_video) / num)
    return num * (1 - math.sqrt(1 - rest))


@lru_cache(maxsize=16)
def bands(
    grid: TokenGrid, blocks: Blocks, density: float, sink: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Spatial and temporal band in frame-major order, [free rows, free columns] of blocks.

    Spatial: tokens near each other in frame-major order. Temporal: the same band in token-major
    order, which is a band of places in every pair of frames. Bands are narrowed by half a block
    on either side, so that whole blocks cover about the density.
    """
    spare = sum(blocks.size) / 2
    with torch.inference_mode(False):
        wide = max(0.0, band_width(blocks, density) - spare)
        near = max(0.0, band_width(blocks, density) / grid.frames - spare)
        if density == 1:
            wide = near = float(grid.num_video)
        spatial = frame_bands(blocks, grid.num_video, torch.tensor([wide], device=device))
        temporal = frame_bands(blocks, grid.per_frame, torch.tensor([near], device=device))
        shared = first_frame(grid, blocks, device) & sink
        return spatial | shared, temporal | shared


@dataclass(frozen=True, kw_only=True)
class SVG(BlockPolicy):
    """Sparse VideoGen: every head is spatial or temporal, decided anew at each call.

    Dense attention of some sampled queries is compared with a band in frame-major order (spatial)
    and a band in token-major order (temporal); the smaller squared error decides. Authors'
    settings: density 0.3 and 20 % dense steps for Wan, 0.25 and 10 % for HunyuanVideo.
    Gap from paper: queries are drawn from the whole video, not from its first 10,000 tokens. The
    temporal band is a block list in frame-major order instead of a permutation of the tokens,
    so that samples of a batch decide for themselves and nothing is moved; it cannot be narrower
    than two blocks of places per frame, and is all of a frame that is no larger than that.
    """

    paper = Paper("Sparse VideoGen", "2502.01776", "ICML", 2025)
    identity: ClassVar = {"density": 1.0}

    dense_layers: int = param(1, "first layers that stay dense", least=0)
    dense_steps: float = param(
        0.2, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )
    density: float = param(0.25, "share of the map covered by a band", above=0, most=1)
    rows: int = param(64, "sampled queries per call", least=1)
    sink: bool = param(True, "every token sees the first frame")
    seed: int = param(0, "which queries are sampled")

    def choose(self, call: Call) -> BlockMask:
        device = call.ctx.query.device
        tables = bands(call.ctx.grid, call.blocks, self.density, self.sink, device)
        spatial, temporal = (table[None, None] for table in tables)
        errors = call.errors([spatial, temporal], self.rows, self.seed)
        is_spatial = (errors[0] <= errors[1])[..., None, None]
        return call.mask(torch.where(is_spatial, spatial, temporal))


@dataclass(frozen=True, kw_only=True)
class SparseVDiT(BlockPolicy):
    """Each head gets one of five patterns: full, skip, diagonal, multi-diagonal or stripes.

    The loss of a pattern is its relative squared error on sampled queries plus `weight` times the
    share of blocks it computes; the least loss wins, and when even that exceeds `tolerance` the
    head stays full. Diagonal is a band in frame-major order, multi-diagonal the same in
    token-major order, stripes are the key blocks with the most pooled attention. Searched at the
    first sparse step of a run and kept for the run, or read from a `profile`.
    Gap from paper: relative instead of absolute squared error, so that `tolerance` is portable;
    searched once per run on sampled queries, not offline per denoising step; a skipped head
    keeps its own blocks (and text) instead of returning zero.
    Not settled: the paper gives no widths; bands and stripes follow `density`.
    """

    paper = Paper("Sparse-vDiT", "2506.03065", year=2025)
    identity: ClassVar = {"tolerance": 0.0, "profile": None}

    density: float = param(0.25, "share of the map of a band or of stripes", above=0, most=1)
    tolerance: float = param(1.0, "largest loss of a sparse head", least=0)
    weight: float = param(0.5, "loss of computing everything", least=0)
    rows: int = param(64, "sampled queries of the search", least=1)
    seed: int = param(0, "which queries are sampled")
    profile: str | None = param(None, "file with a pattern per head; replaces the search")

    def choose(self, call: Call) -> BlockMask:
        tables = self._tables(call)
        pattern = self._pattern(call, tables)[..., None, None]
        kept = tables[0].expand(*pattern.shape[:2], *tables[0].shape[2:])
        for number, table in enumerate(tables[1:], start=1):
            kept = torch.where(pattern == number, table, kept)
        return call.mask(kept)

    def search(self, ctx: AttentionContext) -> list[str]:
        """The pattern of each head at a call; the first sample decides. Waits for the device."""
        call = self.arrange(ctx)
        return [PATTERNS[i] for i in self._search(call, self._tables(call))[0].tolist()]

    def save(self, path: str | os.PathLike[str], layers: Mapping[int, list[str]]) -> Path:
        """Write what `search` found per layer to a file for `profile`."""
        return save_profile(path, self.name, layers)

    def _pattern(self, call: Call, tables: list[Tensor]) -> Tensor:
        """[B or 1, H] numbers of patterns."""
        ctx = call.ctx
        if self.profile is not None:
            names = profile_of(self.profile, self.name, ctx.site.layer, ctx.query.shape[1])
            if not set(names) <= set(PATTERNS):
                raise RecipeError(f"{self.profile} must name {', '.join(PATTERNS)}, got {names}")
            # Not waited for, as a plain copy to a device would be.
            found = torch.tensor([[PATTERNS.index(n) for n in names]])
            return found.to(ctx.query.device, non_blocking=True)
        if "pattern" not in ctx.state:
            ctx.state["pattern"] = self._search(call, tables)
        return ctx.state["pattern"]

    def _search(self, call: Call, tables: list[Tensor]) -> Tensor:
        sparse = tables[1:]
        error = call.errors(sparse, self.rows, self.seed)
        # The share is taken over all blocks, so exempt ones count for every pattern.
        cost = [call.blocks.keep_exempt(table).float().mean((2, 3)) for table in sparse]
        loss = torch.stack([e + self.weight * c for e, c in zip(error, cost, strict=True)])
        least, best = loss.min(0)
        return torch.where(least <= self.tolerance, best + 1, 0)

    def _tables(self, call: Call) -> list[Tensor]:
        blocks, device = call.blocks, call.ctx.query.device
        own = blocks.own(device)[None, None]
        tables = bands(call.ctx.grid, blocks, self.density, False, device)
        share = call.scores().softmax(-1).mean(2, keepdim=True)
        best = share.topk(budget(blocks.free_columns, self.density), dim=-1).indices
        stripes = torch.zeros_like(share, dtype=torch.bool).scatter(-1, best, True)
        banded = [table[None, None] | own for table in tables]
        return [torch.ones_like(own), own, *banded, stripes.expand(-1, -1, blocks.free_rows, -1)]
