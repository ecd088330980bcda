"""The tokens of a forward pass in progress, while their number changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import UnsupportedError
from tubelet.core.learned import LearnedPlan, Recover


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """Samples that hold the same number of tokens.

    A batch is one group as long as all samples keep equal counts: hidden states are [B, N, C].
    Behind a ragged recipe each sample is a group and hidden states are packed to [1, sum N, C].

    Args:
        first: First sample of the group.
        batch: Samples in it.
        start: First row of the group in the packed sequence; 0 for a whole batch.
        num: Tokens per sample.
        size: [batch, num] float32, originals per token.
        anchor: [batch, num] int64, original position of each token.
        origin: From the original tokens to these; None while nothing was reduced.
        stages: Each plan with a way back of its own, first to last: what was reduced since the
            stage before it (None: nothing), and its way back.
        tail: What was reduced since the last of these stages; None for nothing.
        log_weight: [batch, num] added to later logits of a key; None for nothing.
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

    @classmethod
    def whole(cls, batch: int, num: int, device: torch.device) -> "TokenGroup":
        """A batch before any reduction."""
        anchor = torch.arange(num, device=device).expand(batch, num)
        size = torch.ones(batch, num, device=device)
        return cls(first=0, batch=batch, start=0, num=num, size=size, anchor=anchor)

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

    def split(self) -> "list[TokenGroup]":
        """One group per sample, laid out one after the other.

        Raises:
            UnsupportedError: A learned reduction with a way back for the whole batch came before.
        """
        if self.stages and self.batch > 1:
            raise UnsupportedError(
                "a recipe that keeps another number of tokens per sample cannot follow a learned "
                "reduction that restores the full length; put it first, or use recover=False"
            )

        def sample(b: int) -> TokenGroup:
            weight = self.log_weight
            return replace(
                self,
                first=self.first + b,
                batch=1,
                start=b * self.num,
                size=self.size[b : b + 1],
                anchor=self.anchor[b : b + 1],
                origin=_sample(self.origin, b),
                tail=_sample(self.tail, b),
                log_weight=None if weight is None else weight[b : b + 1],
            )

        return [sample(b) for b in range(self.batch)]


def _composed(first: TokenAssignment | None, then: TokenAssignment) -> TokenAssignment:
    return then if first is None else first.compose(then)


def _sample(assignment: TokenAssignment | None, b: int) -> TokenAssignment | None:
    if assignment is None:
        return None
    return replace(assignment, **{n: getattr(assignment, n)[b : b + 1] for n in assignment.TENSORS})


def unpack(hidden: Tensor, origins: Sequence[TokenAssignment]) -> Tensor:
    """[1, sum K, C] packed samples to [B, N, C]: what `restore` does, for all samples at once.

    Args:
        hidden: Samples one after the other, in the order of `origins`.
        origins: One per sample, from N originals to its K tokens.
    """
    lengths = torch.tensor([origin.num_out for origin in origins], device=hidden.device)
    starts = lengths.cumsum(0) - lengths
    index = torch.cat([origin.index for origin in origins])
    slots = (index.clamp(min=0) + starts[:, None]).flatten()
    rows = hidden[0].index_select(0, slots).unflatten(0, index.shape)
    share = torch.cat([(origin.size / origin.size.sum())[0] for origin in origins])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    every = torch.arange(hidden.shape[1], device=hidden.device)
    mean = F.embedding_bag(
        every, hidden[0].to(dtype), starts, mode="sum", per_sample_weights=share.to(dtype)
    )
    return torch.where((index < 0)[..., None], mean[:, None].to(hidden.dtype), rows)
