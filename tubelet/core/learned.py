"""The plan of a reduction that computes new tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError

Recover = Callable[[Tensor], Tensor]
"""From the [B, K, C] tokens behind the last layer to [B, N, C]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedPlan:
    """New tokens, which of the old ones they stand for, and the way back.

    Args:
        assignment: For order, positions and sizes: `index` is the main output of each input,
            `anchor` the position of each output. Nothing is computed from its weights.
        hidden: [B, K, C] the new tokens; gradients flow.
        recover: Gives back the N tokens; None returns each its main output's value.
        log_weight: [B, K] added to a token's logits as a key in all later attention, so that a
            score that only decided who stays gets a gradient. None adds nothing.

    Raises:
        ShapeError: The tokens do not fit the assignment.
    """

    assignment: TokenAssignment
    hidden: Float[Tensor, "b k c"]
    recover: Recover | None = None
    log_weight: Float[Tensor, "b k"] | None = None

    def __post_init__(self) -> None:
        if self.hidden.shape[:2] != self.assignment.anchor.shape:
            raise ShapeError(
                f"an assignment to {tuple(self.assignment.anchor.shape)} tokens came with "
                f"{tuple(self.hidden.shape[:2])} of them"
            )

    @property
    def num_out(self) -> int:
        """Tokens after."""
        return self.assignment.num_out

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.assignment.batch

    def behind(self, lead: Float[Tensor, "b p c"]) -> "LearnedPlan":
        """The same plan with tokens in front that stay what they are."""
        num = lead.shape[1]
        if num == 0:
            return self
        old, inner = self.assignment, self.recover
        places = torch.arange(num, device=lead.device).expand(len(lead), num)
        ones = torch.ones(places.shape, device=lead.device)
        assignment = TokenAssignment(
            index=torch.cat([places, torch.where(old.index < 0, -1, old.index + num)], dim=1),
            weight=torch.cat([ones, old.weight], dim=1),
            anchor=torch.cat([places, old.anchor + num], dim=1),
            size=torch.cat([ones, old.size], dim=1),
            copies=old.copies,
        )

        def recover(y: Tensor) -> Tensor:
            assert inner is not None
            return torch.cat([y[:, :num], inner(y[:, num:])], dim=1)

        weight = self.log_weight
        return LearnedPlan(
            assignment=assignment,
            hidden=torch.cat([lead, self.hidden], dim=1),
            recover=None if inner is None else recover,
            log_weight=None if weight is None else torch.cat([torch.zeros_like(ones), weight], 1),
        )
