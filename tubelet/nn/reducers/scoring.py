"""Reducers that learn a score: Gumbel keep and saliency merging."""

from collections import deque
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.assignment import TokenAssignment
from tubelet.core.grid import TokenGrid
from tubelet.core.learned import LearnedPlan
from tubelet.nn.reducers.base import Reducer, gate, gathered, gumbel
from tubelet.ops.merge import nearest_anchor
from tubelet.ops.score import white_noise
from tubelet.ops.select import kept_positions, top_k

_PENDING = 64
"""Training passes whose penalty is kept for collection, so that a loop without it does not grow."""


class GumbelKeeper(Reducer):
    """Keep logit of each token from its own feature next to the mean of all.

    The log-odds of the budget are added to every logit, so one module serves all budgets: at first
    tokens stay with probability K / N each, and `penalty` holds that mean there. In training,
    Gumbel noise on the logits picks the K tokens, and those go on times p / p.detach() and with
    log p as a key weight, both without effect on values.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * half), nn.GELU())
        self.score = nn.Sequential(nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, 1))
        self._pending: deque[Tensor] = deque(maxlen=_PENDING)

    def logits(self, tokens: Float[Tensor, "b n c"], num: int) -> Float[Tensor, "b n"]:
        """Log-odds that a token stays, float32."""
        local, common = self.embed(tokens).chunk(2, dim=-1)
        common = common.mean(1, keepdim=True).expand_as(local)
        score = self.score(torch.cat([local, common], dim=-1))[..., 0].float()
        share = min(num / tokens.shape[1], 1 - 1e-4)
        return score + log(share / (1 - share))

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = False,
        context: int = 0,
    ) -> LearnedPlan:
        """Keep `num` tokens, `context` of them at random."""
        logits = self.logits(tokens, num)
        score = logits.detach()
        if self.training:
            gap = logits.sigmoid().mean(1) - num / tokens.shape[1]
            self._pending.append(gap.square().mean())
            score = score + gumbel(score)
        if context:
            noise = torch.rand_like(score) if self.training else _fixed_noise(score)
            score = score.masked_fill(top_k(noise, context), torch.inf)
        kept = kept_positions(top_k(score, num), num)
        assignment = TokenAssignment.keep(kept, tokens.shape[1])
        hidden = assignment.reduce(tokens)
        if not self.training:
            return LearnedPlan(assignment=assignment, hidden=hidden)
        weight = gate(F.logsigmoid(logits.gather(1, kept)))
        hidden = hidden * weight.exp()[..., None].to(hidden.dtype)
        return LearnedPlan(assignment=assignment, hidden=hidden, log_weight=weight)

    def penalty(self) -> Tensor:
        """Squared gap between the mean keep probability and the budget, averaged over calls."""
        values = list(self._pending)
        self._pending.clear()
        return torch.stack(values).mean() if values else super().penalty()

    def __getstate__(self) -> dict[str, Any]:
        # A pending penalty holds a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "_pending": deque(maxlen=_PENDING)}


def _fixed_noise(like: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    return white_noise(like.shape[1], 0, like.device).expand_as(like)


class SalientMerger(Reducer):
    """Saliency of each token; the least salient merge into the most similar salient one.

    In training the saliency of a destination also weighs it as a key, without effect on values.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.saliency = nn.Linear(width, 1)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = False,
    ) -> LearnedPlan:
        """Merge down to `num` tokens."""
        log_saliency = F.logsigmoid(self.saliency(self.norm(tokens))[..., 0].float())
        kept = kept_positions(top_k(log_saliency.detach(), num), num)
        target = nearest_anchor(tokens.detach(), kept)
        merging = TokenAssignment.merge(target, kept, log_saliency.exp())
        hidden = merging.reduce(tokens)
        # What is kept for the record must not hold the graph.
        assignment = TokenAssignment(
            index=merging.index, weight=merging.weight.detach(), anchor=kept, size=merging.size
        )
        weight = gate(gathered(log_saliency[..., None], kept)[..., 0]) if self.training else None
        return LearnedPlan(assignment=assignment, hidden=hidden, log_weight=weight)
