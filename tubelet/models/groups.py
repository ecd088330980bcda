"""The tokens of a forward pass in progress, while their number changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.assignment import TokenAssignment


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
    """

    first: int
    batch: int
    start: int
    num: int
    size: Tensor
    anchor: Tensor
    origin: TokenAssignment | None = None

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

    def after(self, plan: TokenAssignment | None, start: int) -> "TokenGroup":
        """The group once `plan` was applied (None: nothing), beginning at row `start`."""
        if plan is None:
            return replace(self, start=start)
        origin = plan if self.origin is None else self.origin.compose(plan)
        return replace(
            self,
            start=start,
            num=plan.num_out,
            size=origin.size,
            anchor=self.anchor.gather(1, plan.anchor),
            origin=origin,
        )

    def view(self, x: Tensor, packed: bool, axis: int = 1) -> Tensor:
        """This group's part of a batched or packed tensor with tokens on `axis`."""
        return x.narrow(axis, self.start, self.num) if packed else x

    def split(self) -> "list[TokenGroup]":
        """One group per sample, laid out one after the other."""

        def sample(b: int) -> TokenGroup:
            origin = self.origin
            if origin is not None:
                part = {n: getattr(origin, n)[b : b + 1] for n in origin.TENSORS}
                origin = replace(origin, **part)
            return replace(
                self,
                first=self.first + b,
                batch=1,
                start=b * self.num,
                size=self.size[b : b + 1],
                anchor=self.anchor[b : b + 1],
                origin=origin,
            )

        return [sample(b) for b in range(self.batch)]


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
