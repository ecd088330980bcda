"""Prompt reduction that treats frames unlike each other: some whole, some coarse, some gone."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import Paper, PromptReduction, param
from tubelet.ops.frames import cells, evenly_spaced, likeness_to_text, merge_labelled
from tubelet.ops.merge import drop
from tubelet.ops.score import embedding_difference, rank_of
from tubelet.ops.select import apportion, budget, top_k


@dataclass(frozen=True, kw_only=True)
class TSLLaVA(PromptReduction):
    """Put a few frames side by side in one thumbnail and add tokens sampled evenly from the rest.

    The thumbnail holds evenly spaced frames, each pooled so that all together are about as many
    tokens as one frame; the sample is strided over the other frames. The authors tile 6 frames
    and sample 1728 tokens of 50 frames of 576.
    Gap from paper: the thumbnail is pooled from tokens, where the authors encode a picture of
    small frames; the sample leaves the thumbnail's own frames out.
    """

    paper = Paper("TS-LLaVA", "2411.11066", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.08, "share of the video tokens kept", above=0, most=1)
    thumbnail: int = param(6, "frames of the thumbnail", least=1)
    positions: str = param("compact", "keep, compact or anchor")

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        grid, device, num = ctx.grid, ctx.hidden.device, budget(ctx.num_tokens, self.keep_ratio)
        frames = min(self.thumbnail, grid.frames)
        tiles = math.isqrt(frames)
        while frames % tiles:
            tiles -= 1
        rows, columns = max(1, grid.height // tiles), max(1, grid.width * tiles // frames)
        size, others = frames * rows * columns, (grid.frames - frames) * grid.per_frame
        if not size <= num <= size + others:
            raise ShapeError(
                f"{self.name} keeps {size} tokens of a thumbnail and up to {others} of the other "
                f"frames, but was asked for {num} of {ctx.num_tokens}; choose a keep_ratio from "
                f"{size / ctx.num_tokens:.3g} to {(size + others) / ctx.num_tokens:.3g}, or 1"
            )
        chosen = torch.zeros(grid.frames, dtype=torch.bool, device=device)
        chosen[evenly_spaced(frames, grid.frames, device)] = True
        box = cells(grid.height, grid.width, rows, columns, device)
        # Labels are places of the clip, so that a thumbnail's and a sample's never meet.
        start = torch.arange(grid.frames, device=device)[:, None] * grid.per_frame
        label = torch.where(chosen[:, None], start + box, -1).flatten()
        if num > size:
            free = (label < 0).nonzero()[:, 0]
            sampled = free[evenly_spaced(num - size, others, device)]
            label[sampled] = sampled
        return merge_labelled(label)


@dataclass(frozen=True, kw_only=True)
class LFTR(PromptReduction):
    """Keep the frames that differ most from their neighbours, and in each its oddest places.

    A frame's difference is the mean cosine distance of its tokens to the same places in the
    frames before and behind; a place's is that to the four places around it. Frames kept share
    the budget evenly.
    Not settled: read in the abstract only, so this is inspired by the paper: weights of frames
    and patches by differences to their neighbours, time first, then space, without learning. The
    abstract claims 16 times fewer tokens; how it splits them between time and space is open.
    """

    paper = Paper("Learning Free Token Reduction", "2501.17391", year=2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.0625, "share of the video tokens kept", above=0, most=1)
    frame_ratio: float = param(
        0.25, "share of the frames that keep any; more where the budget needs more", above=0, most=1
    )

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        grid, num = ctx.grid, budget(ctx.num_tokens, self.keep_ratio)
        frames = max(budget(grid.frames, self.frame_ratio), -(-num // grid.per_frame))
        frames = min(frames, num)
        x = ctx.frames
        chosen = top_k(_apart(x, 0).mean(1), frames)
        places = x.unflatten(1, (grid.height, grid.width))
        odd = (_apart(places, 1) + _apart(places, 2)).flatten(1)
        quota = torch.full((frames,), num / frames, device=x.device)
        counts = apportion(quota, num, least=1, most=grid.per_frame)
        # The k-th frame kept gets the k-th count, the others none.
        order = (chosen.cumsum(0) - 1).clamp(min=0)
        counts = torch.where(chosen, counts[order], 0)
        return drop((rank_of(odd) < counts[:, None]).reshape(1, -1), num)


def _apart(x: Tensor, dim: int) -> Tensor:
    """Mean cosine distance of each token to its one or two neighbours along `dim`; 0 without."""
    length = x.shape[dim]
    if length == 1:
        return torch.zeros(x.shape[:-1], device=x.device)
    step = embedding_difference(x.narrow(dim, 1, length - 1), x.narrow(dim, 0, length - 1))
    step = step.movedim(dim, -1)
    total = F.pad(step, (1, 0)) + F.pad(step, (0, 1))
    neighbours = torch.full((length,), 2.0, device=x.device)
    neighbours[0] = neighbours[-1] = 1
    return (total / neighbours).movedim(-1, dim)


@dataclass(frozen=True, kw_only=True)
class FTFV(PromptReduction):
    """Keep the tokens of largest weight in every frame, as many in each.

    The authors learn the weights with the model. To bring a trained sampler, derive and override
    `token_weight`; without one, a token weighs its cosine distance to the mean of its frame.
    Gap from paper: that stand-in learns nothing, and kept tokens are not scaled by their weights.
    Not settled: read in the abstract only, so the sampler's form, its tokens per frame (the default
    is a choice made here), and whether tokens are chosen or mixed are open.
    """

    paper = Paper("Fewer Tokens and Fewer Videos", "2406.08024", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.1, "share of each frame's tokens kept", above=0, most=1)
    positions: str = param("compact", "keep, compact or anchor")

    def token_weight(self, ctx: PromptContext) -> Tensor:
        """[T, P] finite; larger is kept first."""
        x = ctx.frames
        middle = x.mean(1, keepdim=True, dtype=torch.float32).to(x.dtype)
        return embedding_difference(x, middle.expand_as(x))

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        weight, shape = self.token_weight(ctx), (ctx.grid.frames, ctx.grid.per_frame)
        if weight.shape != shape or not bool(weight.isfinite().all()):
            raise ShapeError(
                f"{self.name}.token_weight must give {shape} finite numbers, frames by places, got "
                f"{tuple(weight.shape)}"
            )
        num = budget(ctx.grid.per_frame, self.keep_ratio)
        kept = top_k(weight.float().to(ctx.hidden.device), num)
        return drop(kept.reshape(1, -1), num * ctx.grid.frames)


@dataclass(frozen=True, kw_only=True)
class FrameSelection(PromptReduction):
    """Chooses frames by a score that a subclass may replace.

    To bring a score of your own (a dual encoder, a small model that is asked about each frame),
    derive from a recipe and override `frame_score`.
    """

    @abstractmethod
    def frame_score(self, ctx: PromptContext) -> Tensor:
        """[T] finite; higher is chosen first."""

    def checked_score(self, ctx: PromptContext) -> Tensor:
        """`frame_score`, refused unless there is one finite number per frame."""
        score = self.frame_score(ctx)
        if score.shape != (ctx.grid.frames,) or not bool(score.isfinite().all()):
            raise ShapeError(
                f"{self.name}.frame_score must give {ctx.grid.frames} finite numbers, one per "
                f"frame, got {tuple(score.shape)}"
            )
        return score.float().to(ctx.hidden.device)


@dataclass(frozen=True, kw_only=True)
class KFFocus(FrameSelection):
    """Find key frames as a codec does, by what changes, and condense the others more than them.

    The first frame is a key frame; the others are those whose tokens differ most from the frame
    before. All frames stay; each is pooled by boxes, large ones between key frames.
    Gap from paper: the authors' trained module for space and time is not here.
    Not settled: read in the abstract only, so the score, the share of key frames and both boxes
    are choices made here.
    """

    paper = Paper("KFFocus", "2508.08989", year=2025)
    identity: ClassVar = {"key_ratio": 1.0, "key_box": 1}

    key_ratio: float = param(0.25, "share of the frames that are key frames", above=0, most=1)
    key_box: int = param(1, "side of the pooled boxes in key frames, in tokens", least=1)
    box: int = param(4, "side of the pooled boxes in other frames, in tokens", least=1)

    def frame_score(self, ctx: PromptContext) -> Tensor:
        """Mean cosine distance of a frame's tokens to the same places one frame before."""
        x = ctx.frames
        change = embedding_difference(x[1:], x[:-1]).mean(1)
        # More than any distance, so that the first frame is always a key frame.
        return F.pad(change, (1, 0), value=3.0)

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        keys = budget(ctx.grid.frames, self.key_ratio)
        key = top_k(self.checked_score(ctx), keys)
        fine, coarse = _boxed(ctx, self.key_box), _boxed(ctx, self.box)
        label = torch.where(key[:, None], fine, coarse)
        return _merge_frames(ctx, label)


@dataclass(frozen=True, kw_only=True)
class F2C(FrameSelection):
    """Keep short clips about the frames that fit the question, at a lower resolution.

    The best frame is an anchor and takes its neighbours along as one clip; then the best frame
    outside the clips so far, until the budget is spent. A box of side b leaves room for b^2 times
    as many frames, so clips cost what single frames would. Boxes are pooled to their mean. The
    number of tokens is the largest number of whole frames that the budget holds.
    Gap from paper: the score is the cosine of a frame's mean token and the question in the
    language model's own space, where the authors use a dual encoder; override `frame_score`.
    Length and resolution of clips are the user's here and adaptive there.
    Not settled: read in the abstract and in summaries only; anchors by greedy suppression stand
    for the authors' watershed of the score over time.
    """

    paper = Paper("From Frames to Clips", "2510.02262", year=2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.25, "share of the video tokens kept", above=0, most=1)
    clip: int = param(4, "frames of a clip", least=1)
    box: int = param(2, "side of the pooled boxes in tokens; 1 keeps the resolution", least=1)

    def frame_score(self, ctx: PromptContext) -> Tensor:
        """Cosine of a frame's mean token and the question."""
        return likeness_to_text(ctx.frames.mean(1, dtype=torch.float32), ctx.question)

    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        label = _boxed(ctx, self.box)
        cost = -(-ctx.grid.height // self.box) * -(-ctx.grid.width // self.box)
        num = budget(ctx.num_tokens, self.keep_ratio)
        if num < cost:
            raise ShapeError(
                f"{self.name} was asked for {num} tokens, fewer than the {cost} of one frame; "
                f"raise keep_ratio to {cost / ctx.num_tokens:.3g} or more, or box"
            )
        frames = min(ctx.grid.frames, num // cost)
        chosen = _clips(self.checked_score(ctx).tolist(), frames, self.clip)
        kept = torch.zeros(ctx.grid.frames, dtype=torch.bool, device=label.device)
        kept[chosen] = True
        return _merge_frames(ctx, label.masked_fill(~kept[:, None], -1))


def _clips(score: list[float], frames: int, length: int) -> list[int]:
    """`frames` frames in clips of `length` about the best frames, anchors first in each clip.

    Clips at the ends of the video are shifted inwards; a clip that meets others keeps what is
    free; the last may be shorter. Equal scores prefer the earlier frame.
    """
    chosen: list[int] = []
    taken = [False] * len(score)
    for anchor in sorted(range(len(score)), key=lambda t: -score[t]):
        if taken[anchor]:
            continue
        start = min(max(0, anchor - length // 2), max(0, len(score) - length))
        clip = range(start, min(start + length, len(score)))
        nearest = sorted(clip, key=lambda t: abs(t - anchor))
        for frame in nearest:
            if not taken[frame]:
                taken[frame] = True
                chosen.append(frame)
        if len(chosen) >= frames:
            return chosen[:frames]
    return chosen


def _boxed(ctx: PromptContext, box: int) -> Tensor:
    """[T, P] number of the box of side `box` that holds each token, in raster order of frames."""
    height, width = ctx.grid.height, ctx.grid.width
    rows, columns = -(-height // box), -(-width // box)
    start = torch.arange(ctx.grid.frames, device=ctx.hidden.device)[:, None] * ctx.grid.per_frame
    return start + cells(height, width, rows, columns, ctx.hidden.device)


def _merge_frames(ctx: PromptContext, label: Tensor) -> TokenAssignment | None:
    plan = merge_labelled(label.flatten())
    return None if plan.num_out == ctx.num_tokens else plan
