"""One cell: every variant on the same test clips of one task on one background."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.bench.fidelity.budgets import Geometry, OutOfReach
from tubelet.bench.fidelity.oracle import Oracle
from tubelet.bench.fidelity.variants import Variant
from tubelet.bench.measure import count_macs
from tubelet.core.recipe import RaggedReduction, Recipe

CHUNK = 32
"""Clips per generator seed, so that the first N test clips do not depend on the batch size."""

Tick = Callable[[str], None]
MakeClips = Callable[..., Any]
"""(task, batch, seed, *, background, device) -> clips; `tubelet.train.clips.make_clips`."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A batch of test clips with what scoring needs.

    Args:
        task: Name of the task.
        pixels: [B, T, 3, H, W] in [0, 1].
        labels: [B] classes; unused by the dense task.
        relevant: [B, N] tokens that the answer needs.
        mask: [B, N] wanted answer of the dense task, None for others.
    """

    task: str
    pixels: Tensor
    labels: Tensor
    relevant: Tensor
    mask: Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    def cut(self, num: int) -> "Clips":
        """The first `num`."""
        mask = None if self.mask is None else self.mask[:num]
        parts = {n: getattr(self, n)[:num] for n in ("pixels", "labels", "relevant")}
        return Clips(task=self.task, mask=mask, **parts)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one variant scored.

    Args:
        setting: The recipe with its fields.
        share: Mean tokens entering a layer, relative to the dense model.
        macs: Multiply-accumulates per clip.
        scores: [clips] per-clip accuracy (0 or 1), or IoU.
    """

    setting: str
    share: float
    macs: int
    scores: Tensor


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Scores of all variants on one task and background, by the variant's name.

    Args:
        task, background: What was shown.
        chance: Score of guessing.
        floors: Best score without the skill, by control.
        entries: By variant.
    """

    task: str
    background: str
    chance: float
    floors: dict[str, float] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)


def clip_batches(
    make: MakeClips,
    task: str,
    background: str,
    num: int,
    batch: int,
    tubelet: tuple[int, int, int],
    device: torch.device,
    first_seed: int,
) -> Iterator[Clips]:
    """`num` clips in batches of at most `batch` (a multiple of `CHUNK`, or less than it)."""
    seed, left = first_seed, num
    while left > 0:
        chunks = []
        for _ in range(-(-min(batch, left) // CHUNK)):
            made = make(task, CHUNK, seed, background=background, device=device)
            dense = made.dense_labels(tubelet) if is_dense(task) else None
            relevant = made.token_mask("relevant", tubelet)
            chunks.append((made.pixels, made.labels, relevant, dense))
            seed += 1
        pixels, labels, relevant, mask = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)
        )
        whole = Clips(task=task, pixels=pixels, labels=labels, relevant=relevant, mask=mask)
        whole = whole.cut(min(left, batch))
        left -= len(whole)
        yield whole


def is_dense(task: str) -> bool:
    """Whether a task asks for one answer per token."""
    return task == "mask"


def evaluate_cell(
    cell: Cell,
    variants: Sequence[Variant],
    batches: Iterator[Clips],
    geometry_of: Callable[[Variant, Tensor], Geometry],
    known_macs: dict[tuple[str, int], int],
    tick: Tick = lambda name: None,
    watch: Callable[[Clips], None] = lambda clips: None,
) -> Cell:
    """Run every variant on every batch.

    Args:
        cell: The empty cell; its entries are filled in.
        variants: What runs; one that is out of reach at this geometry is left out.
        batches: Test clips.
        geometry_of: Geometry of a variant's model for a clip batch.
        known_macs: MACs per clip by (variant, frames), filled and reused across cells.
        tick: Called with each variant's name before it runs.
        watch: Shown every batch.
    """
    scores: dict[str, list[Tensor]] = {}
    shares: dict[str, list[float]] = {}
    facts: dict[str, tuple[str, int]] = {}
    for clips in batches:
        watch(clips)
        plain: dict[str, tuple[Tensor, float]] = {}
        for variant in variants:
            geometry = geometry_of(variant, clips.pixels)
            recipe = variant.recipe(geometry)
            if isinstance(recipe, OutOfReach):
                continue
            tick(variant.name)
            run = Run(variant, recipe, geometry, clips)
            if variant.name not in facts:
                facts[variant.name] = (variant.setting(geometry), run.macs(known_macs))
            if run.plain and variant.host.name not in plain:
                plain[variant.host.name] = run.answer()
            logits, share = plain[variant.host.name] if run.plain else run.answer()
            scores.setdefault(variant.name, []).append(run.scores(logits).cpu())
            shares.setdefault(variant.name, []).append(share * len(clips))
    for name, parts in scores.items():
        every = torch.cat(parts)
        share = sum(shares[name]) / len(every)
        setting, macs = facts[name]
        cell.entries[name] = Entry(setting=setting, share=share, macs=macs, scores=every)
    return cell


class Run:
    """One variant on one batch."""

    def __init__(
        self, variant: Variant, recipe: Recipe | None, geometry: Geometry, clips: Clips
    ) -> None:
        self.variant, self.recipe, self.geometry, self.clips = variant, recipe, geometry, clips
        change = None if variant.change is None else variant.change(geometry)
        self.pixels = clips.pixels if change is None else change(clips.pixels)

    @property
    def plain(self) -> bool:
        """Whether the model runs as it is on the clip as it is."""
        return self.recipe is None and self.variant.change is None

    def answer(self, num: int | None = None) -> tuple[Tensor, float]:
        """Logits, and the share of tokens entering a layer; of the first `num` clips."""
        host = self.variant.host
        recipes = [] if self.recipe is None else [self.recipe]
        if isinstance(self.recipe, Oracle):
            self.recipe.answers.relevant = self.clips.relevant[:num]
        with torch.inference_mode(), host.with_recipes(recipes) as handle:
            logits = host.answer(self.pixels[:num], self.clips.task)
            if recipes:
                report = handle.report()
                return logits, report.mean_tokens / report.tokens_in
        own = host.geometry(self.pixels.shape[1], tuple(self.pixels.shape[3:])).grid
        return logits, own.num_tokens / self.geometry.grid.num_tokens

    def macs(self, known: dict[tuple[str, int], int]) -> int:
        """Multiply-accumulates per clip; of several clips where they depend on the clip."""
        key = (self.variant.name, self.clips.pixels.shape[1])
        if isinstance(self.recipe, RaggedReduction):
            num = min(len(self.clips), 4)
            return count_macs(lambda: self.answer(num)) // num
        if key not in known:
            known[key] = count_macs(lambda: self.answer(1))
        return known[key]

    def scores(self, logits: Tensor) -> Tensor:
        """[B] accuracy of each clip, or IoU for the dense task."""
        clips = self.clips
        if clips.mask is None:
            return (logits.argmax(-1) == self._wanted(clips.labels)).float()
        grid = self.geometry.grid
        own = self.variant.host.geometry(self.pixels.shape[1], tuple(self.pixels.shape[3:])).grid
        if own != grid:
            boxes = logits.reshape(-1, 1, own.frames, own.height, own.width)
            size = (grid.frames, grid.height, grid.width)
            logits = F.interpolate(boxes, size, mode="trilinear").flatten(1)
        return iou(logits > 0, self._wanted(clips.mask))

    def _wanted(self, labels: Tensor) -> Tensor:
        if not self.variant.shuffled_labels:
            return labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return labels[order.to(labels.device)]


def iou(answer: Tensor, wanted: Tensor) -> Tensor:
    """[B] intersection over union of two [B, N] masks; 1 where both are empty."""
    both = (answer & wanted).sum(1).float()
    either = (answer | wanted).sum(1).float()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
