"""The tokens of a forward pass in progress, while their number changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import UnsupportedError
from tubelet.core.learned import LearnedPlan, Recover
from tubelet.kernels.attention import CallStatistics


@dataclass(frozen=True, eq=False)
class Packing:
    """Samples of different lengths, laid out one after the other or padded to the longest.

    Args:
        lengths: Tokens of each sample.
        valid: Bool [B, longest], False at the padding.
        rows: [sum N] int64, where each packed token lies among the B x longest padded ones.
    """

    lengths: tuple[int, ...]
    valid: Tensor
    rows: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], valid: Tensor) -> "Packing":
        """The packing of samples with these lengths, which the host knows already."""
        total, (batch, longest) = sum(lengths), valid.shape
        counts = valid.sum(1)
        every = torch.arange(max(total, batch), device=valid.device)
        # The stated size saves waiting for the device.
        sample = every[:batch].repeat_interleave(counts, output_size=total)
        skipped = (longest - counts).cumsum(0) - (longest - counts)
        return cls(lengths=lengths, valid=valid, rows=every[:total] + skipped[sample])

    def pad(self, x: Tensor) -> Tensor:
        """[1, sum N, ...] to [B, longest, ...], zeros at the padding."""
        padded = x.new_zeros(self.valid.numel(), *x.shape[2:])
        return padded.index_copy(0, self.rows, x[0]).unflatten(0, self.valid.shape)

    def pack(self, x: Tensor) -> Tensor:
        """[B, longest, ...] to [1, sum N, ...]."""
        return x.flatten(0, 1).index_select(0, self.rows)[None]


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """Samples that went the same way.

    A batch is one group as long as all samples keep equal counts: hidden states are [B, N, C].
    Behind a ragged recipe they are packed to [1, sum N, C], and the batch still is one group, with
    a packing. Another kind of recipe behind it makes each sample a group.

    Args:
        first: First sample of the group.
        batch: Samples in it.
        start: First row of the group in the packed sequence; 0 for a whole batch.
        num: Tokens per sample, of the longest if there is a packing.
        size: [batch, num] float32, originals per token; [1, sum N] with a packing.
        anchor: [batch, num] int64, original position of each token; [1, sum N] with a packing.
        origin: From the original tokens to these (padded, with a packing); None while nothing was
            reduced.
        stages: Each plan with a way back of its own, first to last: what was reduced since the
            stage before it (None: nothing), and its way back.
        tail: What was reduced since the last of these stages; None for nothing.
        log_weight: [batch, num] added to later logits of a key, [1, sum N] with a packing; None
            for nothing.
        packing: How samples of different lengths are laid out; None when all hold `num` tokens.
    """

    first: int
    batch: int
    start: int
    num: int
    size: Tensor
    anchor: Tensor
    origin: TokenAssignment | None = None
    stages: tuple[tuple[TokenAssignment | None, Recover], ...] = ()
    tail: TokenAssignment | None = None
    log_weight: Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def whole(cls, batch: int, num: int, device: torch.device) -> "TokenGroup":
        """A batch before any reduction."""
        anchor = torch.arange(num, device=device).expand(batch, num)
        size = torch.ones(batch, num, device=device)
        return cls(first=0, batch=batch, start=0, num=num, size=size, anchor=anchor)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return (self.num,) * self.batch if self.packing is None else self.packing.lengths

    @property
    def merged(self) -> bool:
        """Whether some token stands for several originals."""
        return self.origin is not None and not self.origin.copies

    def after(self, plan: TokenAssignment | LearnedPlan | None, start: int) -> "TokenGroup":
        """The group once `plan` was applied (None: nothing), beginning at row `start`."""
        if plan is None:
            return replace(self, start=start)
        if isinstance(plan, LearnedPlan):
            return self._after_learned(plan, start)
        weight = self.log_weight
        origin = _composed(self.origin, plan)
        return replace(
            self,
            start=start,
            num=plan.num_out,
            size=origin.size,
            anchor=self.anchor.gather(1, plan.anchor),
            origin=origin,
            tail=_composed(self.tail, plan),
            log_weight=None if weight is None else weight.gather(1, plan.anchor),
        )

    def keep(self, mask: Tensor) -> "tuple[TokenGroup, Tensor] | None":
        """The packed group of the True tokens, and their rows among the padded tokens.

        Args:
            mask: Bool [batch, num]; what it says of padding is ignored.

        Returns:
            None when all tokens stay.

        Raises:
            UnsupportedError: A learned reduction with a way back for the whole batch came before.
            ShapeError: A sample keeps nothing.
        """
        mask = mask if self.packing is None else mask & self.packing.valid
        plan, lengths = TokenAssignment.keep_padded(mask)
        if lengths == self.lengths:
            return None
        self._check_splits()
        packing = Packing.of(lengths, plan.size > 0)
        offsets = torch.arange(self.batch, device=mask.device)[:, None] * self.num
        origin, weight = _composed(self.origin, plan), self.log_weight
        if weight is not None:
            weight = weight if self.packing is None else self.packing.pad(weight)
            weight = packing.pack(weight.gather(1, plan.anchor))
        group = replace(
            self,
            num=plan.num_out,
            size=packing.pack(origin.size),
            anchor=packing.pack(origin.anchor),
            origin=origin,
            tail=origin,
            log_weight=weight,
            packing=packing,
        )
        return group, packing.pack(plan.anchor + offsets)[0]

    def _after_learned(self, plan: LearnedPlan, start: int) -> "TokenGroup":
        group = self.after(plan.assignment, start)
        if plan.log_weight is not None:
            before = 0 if group.log_weight is None else group.log_weight
            group = replace(group, log_weight=plan.log_weight + before)
        if plan.recover is None:
            return group
        return replace(group, stages=(*self.stages, (self.tail, plan.recover)), tail=None)

    def restore(self, y: Tensor) -> Tensor:
        """[batch, num, C] tokens behind the last layer to the original length, stage by stage."""
        y = y if self.tail is None else self.tail.restore(y)
        for before, recover in reversed(self.stages):
            y = recover(y)
            y = y if before is None else before.restore(y)
        return y

    def dropped(self) -> Tensor:
        """Bool [batch, N], originals that no token of these stands for."""
        assert self.origin is not None
        # A way back fills every token that entered its stage.
        first = self.stages[0][0] if self.stages else self.origin
        return (
            torch.zeros_like(self.origin.index, dtype=torch.bool)
            if first is None
            else (first.index < 0)
        )

    def view(self, x: Tensor, packed: bool, axis: int = 1) -> Tensor:
        """This group's part of a batched or packed tensor with tokens on `axis`."""
        return x.narrow(axis, self.start, self.num) if packed else x

    def _check_splits(self) -> None:
        if self.stages and self.batch > 1:
            raise UnsupportedError(
                "a recipe that keeps another number of tokens per sample cannot follow a learned "
                "reduction that restores the full length; put it first, or use recover=False"
            )

    def split(self) -> "list[TokenGroup]":
        """One group per sample, laid out one after the other.

        Raises:
            UnsupportedError: A learned reduction with a way back for the whole batch came before.
        """
        self._check_splits()
        lengths, origin = self.lengths, self.origin
        starts = accumulate(lengths[:-1], initial=self.start)
        sizes, anchors, weights = map(self._by_sample, (self.size, self.anchor, self.log_weight))
        origins: Sequence[TokenAssignment | None] = [None] * self.batch
        if origin is not None:
            parts = zip(origin.index.split(1), origin.weight.split(1), anchors, sizes, strict=True)
            origins = [
                TokenAssignment(index=i, weight=w, anchor=a, size=s, copies=origin.copies)
                for i, w, a, s in parts
            ]
        return [
            replace(
                self,
                first=self.first + b,
                batch=1,
                start=start,
                num=lengths[b],
                size=sizes[b],
                anchor=anchors[b],
                origin=origins[b],
                # A batch that splits has no way back of its own, so its tail is its origin.
                tail=origins[b],
                log_weight=weights[b],
                packing=None,
            )
            for b, start in enumerate(starts)
        ]

    def _by_sample(self, x: Tensor | None) -> Sequence[Any]:
        if x is None:
            return [None] * self.batch
        return x.split(1) if self.packing is None else x.split(list(self.lengths), dim=1)


def _composed(first: TokenAssignment | None, then: TokenAssignment) -> TokenAssignment:
    return then if first is None else first.compose(then)


def unpack(hidden: Tensor, origins: Sequence[TokenAssignment]) -> Tensor:
    """[1, sum K, C] packed samples to [B, N, C]: what `restore` does, for all samples at once.

    Args:
        hidden: Samples one after the other, in the order of `origins`.
        origins: One per sample, from N originals to its K tokens.
    """
    lengths = torch.tensor([origin.num_out for origin in origins], device=hidden.device)
    starts = lengths.cumsum(0) - lengths
    total = hidden.shape[1]
    sample = torch.arange(len(origins), device=hidden.device)
    sample = sample.repeat_interleave(lengths, output_size=total)
    index = torch.cat([origin.index for origin in origins])
    slots = (index.clamp(min=0) + starts[:, None]).flatten()
    rows = hidden[0].index_select(0, slots).unflatten(0, index.shape)
    size = torch.cat([origin.size for origin in origins], dim=1)[0]
    share = size / size.new_zeros(len(origins)).index_add(0, sample, size)[sample]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    every = torch.arange(total, device=hidden.device)
    mean = F.embedding_bag(
        every, hidden[0].to(dtype), starts, mode="sum", per_sample_weights=share.to(dtype)
    )
    return torch.where((index < 0)[..., None], mean[:, None].to(hidden.dtype), rows)


def padded_call(stats: CallStatistics, packing: Packing) -> CallStatistics:
    """The statistics of a packed call as those of a padded one that leaves the padding out."""

    def by_head(x: Tensor) -> Tensor:
        return packing.pad(x.transpose(1, 2)).transpose(1, 2)

    gone, q, bias, lse = ~packing.valid, stats.q, stats.key_bias, stats.lse
    bias = torch.zeros(1, q.shape[2], device=q.device) if bias is None else bias
    if lse is not None:
        # A query with an infinite log-sum-exp gives no attention to anyone.
        lse = by_head(lse).masked_fill(gone[:, None], torch.inf)
    return replace(
        stats,
        q=by_head(q),
        k=by_head(stats.k),
        v=by_head(stats.v),
        lse=lse,
        key_bias=packing.pad(bias).masked_fill(gone, -torch.inf),
    )


def part_of_call(stats: CallStatistics, group: TokenGroup) -> CallStatistics:
    """The statistics of one sample out of a packed call."""
    names = ("q", "k", "v", "lse")
    tensors = {name: group.view(getattr(stats, name), True, axis=2) for name in names}
    bias = None if stats.key_bias is None else group.view(stats.key_bias, True)
    return replace(stats, **tensors, key_bias=bias)
