"""Sparse prefill: which keys the tokens of a long video prompt attend to, layer by layer.

Lines of single tokens do not fit lists of blocks, so tokens on a line are gathered first and lie
in blocks of their own; queries and keys keep their places, which causality goes by.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import RecipeError
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.core.recipe import Paper, SparsePrefill, param
from tubelet.ops.tools import PLAIN

BOUNDARIES = ("none", "query", "both")
"""How `GridAttention` treats text among video."""


@dataclass(frozen=True)
class Arranged:
    """A prompt in blocks of an order, and the places that each block holds.

    Args:
        ctx: The call.
        block: (query, key) block sizes in tokens.
        order: [G, N] places in order, one row per key head; None for the order of the prompt.
        first_query, last_query: [G or 1, Mq] places.
        first_key, last_key: [G or 1, Mk] places.
    """

    ctx: PrefillContext
    block: tuple[int, int]
    order: Tensor | None
    first_query: Tensor
    last_query: Tensor
    first_key: Tensor
    last_key: Tensor

    @classmethod
    def of(
        cls, ctx: PrefillContext, block: tuple[int, int], order: Tensor | None = None
    ) -> "Arranged":
        """Blocks of an order; the last one may be ragged."""
        places = torch.arange(ctx.num_tokens, device=ctx.query.device)[None]
        places = places if order is None else order
        return cls(ctx, block, order, *_spans(places, block[0]), *_spans(places, block[1]))

    def near(self, window: int) -> Tensor:
        """[G or 1, Mq, Mk] block pairs that may hold a query and one of the `window` latest tokens
        up to it, itself included."""
        reach = self.first_query[:, :, None] - window
        return (self.last_key[:, None] > reach) & self.visible()

    def visible(self) -> Tensor:
        """[G or 1, Mq, Mk] block pairs that may hold a query and a token up to it."""
        return self.first_key[:, None] <= self.last_query[:, :, None]

    def plan(self, kept: Tensor) -> AttentionPlan:
        """The plan from a table [H, G or 1, Mq, Mk] of block pairs."""
        ctx, visible = self.ctx, self.visible()
        kept = kept & visible.repeat_interleave(len(kept) // len(visible), 0)
        if 1 < len(kept) < ctx.query.shape[1]:
            kept = kept.repeat_interleave(ctx.groups, 0)
        mask = (ctx.tools or PLAIN).mask(
            kept[None], block=self.block, num_queries=ctx.num_tokens, num_keys=ctx.num_tokens
        )
        return AttentionPlan(mask=mask, order=self.order)


def _spans(order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First and last place in each block of an order, [G, M] each."""
    missing = -order.shape[1] % block
    first, last = (
        F.pad(order, (0, missing), value=value).unflatten(1, (-1, block))
        for value in (order.shape[1], -1)
    )
    return first.amin(2), last.amax(2)


def _sorted(kind: Tensor, kinds: int) -> Tensor:
    """[G, N] places in the order of their kind [G, N] below `kinds`, earlier ones first."""
    groups, num = kind.shape
    # One sort of short numbers for all rows: rows on their own are sorted one after another.
    row = torch.arange(groups, device=kind.device)[:, None]
    order = torch.argsort((kind + kinds * row).to(torch.int16).flatten(), stable=True)
    return order.view(groups, num) - num * row


def _any_in_blocks(held: Tensor, block: int) -> Tensor:
    """[G, M] whether any token of a block is held, from [G, N] tokens in order."""
    return F.pad(held, (0, -held.shape[1] % block)).unflatten(1, (-1, block)).any(2)


def attention_rows(ctx: PrefillContext, queries: Tensor, group: int) -> Tensor:
    """Attention of some queries, for the query heads of one key head, [H / G, R, N] float32."""
    heads = slice(group * ctx.groups, (group + 1) * ctx.groups)
    rows = ctx.query[0, heads].index_select(1, queries).flatten(0, 1)
    # Logits of a long prompt are hundreds of megabytes: as few passes over them as can be.
    logits = torch.addmm(
        rows.new_zeros(()), rows, ctx.key[0, group].mT, beta=0, alpha=ctx.scale
    ).unflatten(0, (-1, len(queries)))
    places = torch.arange(ctx.num_tokens, device=queries.device)
    logits.masked_fill_(places > queries[:, None], -torch.inf)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class BlockPrefill(SparsePrefill):
    """A policy in blocks: short prompts are left alone, longer ones get a pattern."""

    block: tuple[int, int] = param((128, 128), "tokens per (query, key) block", least=1)
    window: int = param(1024, "latest tokens that every token sees, itself included", least=1)

    def plan(self, ctx: PrefillContext) -> AttentionPlan:
        return AttentionPlan() if self.window >= ctx.num_tokens else self.choose(ctx)

    @abstractmethod
    def choose(self, ctx: PrefillContext) -> AttentionPlan:
        """The plan for a prompt longer than the window."""


@dataclass(frozen=True, kw_only=True)
class AShape(BlockPrefill):
    """Every token sees the first tokens and the latest ones, the same in all heads.

    With `last`, the last tokens of the prompt, which hold the question, see everything: the
    triangle shape that SCBench (arXiv:2412.10319) adds.
    Not settled: sizes are given per head by a search that is not reproduced here; the defaults
    are those of the streaming baseline of the same paper, from memory.
    """

    paper = Paper("MInference 1.0", "2407.02490", "NeurIPS", 2024)
    identity: ClassVar = {"window": 2**31}

    window: int = param(4096, "latest tokens that every token sees, itself included", least=1)
    sink: int = param(1024, "first tokens that every token sees", least=0)
    last: int = param(0, "last tokens that see everything", least=0)

    def choose(self, ctx: PrefillContext) -> AttentionPlan:
        blocks = Arranged.of(ctx, self.block)
        sink = blocks.first_key < self.sink
        last = blocks.last_query >= ctx.num_tokens - self.last
        return blocks.plan(blocks.near(self.window) | sink[:, None] | last[:, :, None])


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(BlockPrefill):
    """Each head sees the columns and the diagonals that the last tokens of the prompt attend to.

    The attention of the last `rows` queries is summed over each column (a token that all look
    at) and each diagonal (a distance at which all look); the largest of both are kept. Columns
    are gathered into blocks of their own, diagonals are whole blocks along them.
    Gap from paper: query heads that share a key head share their columns, by the sum over them;
    gathered tokens see everything as queries (`vertical` of N rows, at most); every head has this
    pattern with one size, where the authors search pattern and size per head.
    Not settled: that the first 30 columns and the latest 100 diagonals are always kept is from
    memory of the authors' code.
    """

    paper = Paper("MInference 1.0", "2407.02490", "NeurIPS", 2024)
    identity: ClassVar = {"slash": 2**31}

    window: int = param(100, "latest diagonals that are always kept", least=1)
    vertical: int = param(1000, "columns kept", least=1)
    slash: int = param(6096, "diagonals kept", least=1)
    sink: int = param(30, "first columns that are always kept", least=0)
    rows: int = param(64, "last queries that are looked at", least=1)

    def choose(self, ctx: PrefillContext) -> AttentionPlan:
        if max(self.vertical, self.slash) >= ctx.num_tokens:
            return AttentionPlan()
        found = [self._search(ctx, group) for group in range(ctx.key.shape[1])]
        order = _sorted(torch.stack([~columns for columns, _ in found]).long(), 2)
        blocks = Arranged.of(ctx, self.block, order)
        tables = [self._diagonals(blocks, group, kept) for group, (_, kept) in enumerate(found)]
        table = torch.cat(tables)
        gathered = [-(-self.vertical // size) for size in self.block]
        table[:, : gathered[0]] = True
        table[..., : gathered[1]] = True
        return blocks.plan(table)

    def _search(self, ctx: PrefillContext, group: int) -> tuple[Tensor, Tensor]:
        """Kept columns [N] and diagonals [H / G, N], bool; diagonal d is the token d before."""
        num = ctx.num_tokens
        places = torch.arange(num, device=ctx.query.device)
        queries = places[-self.rows :]
        rows = attention_rows(ctx, queries, group)
        back = queries[:, None] - places
        diagonals = rows.gather(2, back.clamp(min=0).expand_as(rows)) * (back >= 0)
        scores = rows.sum((0, 1)), diagonals.sum(1)
        scores[0][: self.sink] = torch.inf
        scores[1][:, : self.window] = torch.inf
        columns, slashes = (
            torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(k).indices, True)
            for score, k in zip(scores, (self.vertical, self.slash), strict=True)
        )
        # Fewer diagonals than the window would leave a token without itself.
        slashes[:, : self.window] = True
        return columns, slashes

    def _diagonals(self, blocks: Arranged, group: int, kept: Tensor) -> Tensor:
        """[H / G, Mq, Mk] block pairs that a kept diagonal may run through."""
        least = blocks.first_query[group][:, None] - blocks.last_key[group]
        most = blocks.last_query[group][:, None] - blocks.first_key[group]
        up_to = F.pad(kept.int().cumsum(1), (1, 0))
        return up_to[:, (most + 1).clamp(min=0)] > up_to[:, least.clamp(min=0)]


@dataclass(frozen=True, kw_only=True)
class GridAttention(BlockPrefill):
    """Every token sees one place of every frame, or one column of every row; text apart.

    Neighbouring frames and rows look alike, so attention to video runs along evenly spaced lines.
    The attention of the last `rows` queries is summed over all lines a frame apart and all lines
    a row apart, as the grid of the video says; per key head the line with most wins. Its tokens
    are gathered: as keys everyone sees them, as queries they see everything.
    With `boundary` "both", video queries do the search, lines are counted among the tokens of a
    video, wherever text stands between and whichever tokens are gone, and text sees and is seen
    by everything. "query" counts lines in the sequence, spaced as in the first video, and lets
    text keys go; "none" treats text as video.
    Gap from paper: heads are not assigned patterns offline, all get this one; heads that share a
    key head share their line; text of a prompt is dense where the paper searches a pattern for
    each pair of modalities.
    Not settled: how lines of different spacing are compared. Here the attention beyond the share
    of the tokens that lie on the line decides, since a wider line always holds more. Sizes of
    window and sink, and whether lines of queries have a phase of their own (here that of keys).
    """

    paper = Paper("MMInference", "2504.16083", "ICML", 2025)
    identity: ClassVar = {"window": 2**31}

    sink: int = param(128, "first tokens that every token sees", least=0)
    rows: int = param(64, "last queries that are looked at", least=1)
    boundary: str = param("both", f"how text is told from video: {', '.join(BOUNDARIES)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary not in BOUNDARIES:
            known = ", ".join(BOUNDARIES)
            raise RecipeError(f"GridAttention.boundary must be one of {known}, got {self.boundary}")

    def choose(self, ctx: PrefillContext) -> AttentionPlan:
        if not ctx.grids:
            return AttentionPlan()
        text = (ctx.video < 0) & (self.boundary != "none")
        line = self._lines(ctx) & ~text
        kind = torch.where(line, 1, 2).masked_fill(text, 0)
        order = _sorted(kind, 3)
        blocks = Arranged.of(ctx, self.block, order)
        held = kind.gather(1, order)
        seeing = _any_in_blocks(held < 2, self.block[0])
        seen = _any_in_blocks(held < 2 if self.boundary == "both" else held == 1, self.block[1])
        seen = seen | (blocks.first_key < self.sink)
        return blocks.plan(blocks.near(self.window) | seeing[:, :, None] | seen[:, None])

    def _lines(self, ctx: PrefillContext) -> Tensor:
        """[G, N] tokens on the line of each key head."""
        places, grids = torch.arange(ctx.num_tokens, device=ctx.query.device), ctx.grids[:1]
        counted = torch.ones_like(places, dtype=torch.bool)
        if self.boundary == "both":
            places, counted, grids = ctx.place, ctx.video >= 0, ctx.grids
        spacings = [(g.width, g.per_frame) for g in grids]
        phases = [places % spacing for spacing in spacings[0]]
        for number, own in enumerate(spacings[1:], 1):
            inside = ctx.video == number
            phases = [
                torch.where(inside, places % spacing, phase)
                for spacing, phase in zip(own, phases, strict=True)
            ]
        sizes = [max(width for width, _ in spacings), max(frame for _, frame in spacings)]
        mass = torch.stack([self._received(ctx, g) for g in range(ctx.key.shape[1])]) * counted
        # What the line would get if all counted tokens got the same.
        extra = mass - mass.sum(1, keepdim=True) * counted / counted.sum().clamp(min=1)
        scores = [
            extra.new_zeros(len(mass), size).index_add(1, phase, extra)
            for phase, size in zip(phases, sizes, strict=True)
        ]
        best = torch.cat(scores, 1).argmax(1, keepdim=True)
        by_row, by_frame = phases[0] == best, phases[1] == best - sizes[0]
        return torch.where(best < sizes[0], by_row, by_frame) & counted

    def _received(self, ctx: PrefillContext, group: int) -> Tensor:
        """[N] attention of the last queries to each token."""
        places = torch.arange(ctx.num_tokens, device=ctx.query.device)
        if self.boundary != "none":
            # Fewer video tokens than rows leave some text among them, at -1.
            places = places.masked_fill(ctx.video < 0, -1)
        queries = places.topk(min(self.rows, len(places))).values
        rows = attention_rows(ctx, queries.clamp(min=0), group)
        return rows.flatten(0, 1).mT @ (queries >= 0).to(rows.dtype).repeat(ctx.groups)
