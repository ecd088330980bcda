"""Reducers that keep cluster centres."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.assignment import TokenAssignment
from tubelet.core.grid import TokenGrid
from tubelet.core.learned import LearnedPlan
from tubelet.nn.reducers.base import CrossAttention, Mlp, Reducer, carried, gathered
from tubelet.nn.reducers.geometry import PLACE_FEATURES, coordinates, place_features
from tubelet.ops.select import kept_positions, top_k

NEIGHBOURS = 2


def density_peaks(
    tokens: Float[Tensor, "b n c"], neighbours: int = NEIGHBOURS
) -> Float[Tensor, "b n"]:
    """How much each token is the centre of a cluster: local density times distance to a denser one.

    Args:
        tokens: Features; compared after normalising each to mean 0 and variance 1.
        neighbours: Nearest other tokens that tell the density, >= 1; capped at N - 1.

    Returns:
        Scores >= 0, float32. The densest token takes its largest distance; of equally dense tokens
        the first counts as denser.

    Source:
        Density peaks (Rodriguez and Laio, 2014) with k nearest neighbours (Du et al., 2016).
    """
    x = F.layer_norm(tokens.float(), tokens.shape[-1:])
    num = tokens.shape[1]
    # Matrix products would blur the distance of near duplicates.
    gaps = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    near = gaps.topk(min(neighbours, num - 1) + 1, largest=False).values[..., 1:]
    density = (-near.square().mean(-1)).exp() if num > 1 else torch.ones_like(gaps[..., 0])
    order = torch.arange(num, device=x.device)
    mine, other = density[:, :, None], density[:, None, :]
    denser = (other > mine) | ((other == mine) & (order < order[:, None]))
    apart = torch.where(denser, gaps, torch.inf).amin(-1)
    apart = torch.where(apart.isinf(), gaps.amax(-1), apart)
    return density * apart


class ClusterKeeper(Reducer):
    """Keep cluster centres in their order, add learned positions; recover by cross-attention.

    The selection is exact and has nothing to learn: no noise, ties by index. The queries of the
    way back are the tokens before the reduction plus learned positions.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.place = nn.Linear(PLACE_FEATURES, width)
        self.query_place = nn.Linear(PLACE_FEATURES, width)
        for table in (self.place, self.query_place):
            nn.init.zeros_(table.weight)
            nn.init.zeros_(table.bias)
        self.back = CrossAttention(width, heads)
        nn.init.zeros_(self.back.out.weight)
        nn.init.zeros_(self.back.out.bias)
        self.mlp = Mlp(width, width // 2)

    @staticmethod
    def select(tokens: Float[Tensor, "b n c"], num: int) -> TokenAssignment:
        """The `num` best centres; every other token belongs to the most similar of them."""
        with torch.no_grad():
            kept = kept_positions(top_k(density_peaks(tokens), num), num)
            x = F.layer_norm(tokens.float(), tokens.shape[-1:])
            gaps = torch.cdist(x, gathered(x, kept), compute_mode="donot_use_mm_for_euclid_dist")
            slots = torch.arange(num, device=kept.device).expand_as(kept)
            index = gaps.argmin(-1).scatter(1, kept, slots)
            ones = torch.ones(index.shape, device=index.device)
            size = torch.zeros(kept.shape, device=kept.device).scatter_add(1, index, ones)
            weight = torch.zeros_like(ones).scatter(1, kept, 1.0)
        return TokenAssignment(index=index, weight=weight, anchor=kept, size=size)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = True,
    ) -> LearnedPlan:
        """Keep `num` centres."""
        assignment, where = self.select(tokens, num), coordinates(place, grid)
        kept_at = gathered(where, assignment.anchor)
        hidden = gathered(tokens, assignment.anchor)
        hidden = hidden + self.place(place_features(kept_at, grid, tokens))

        def back(final: Tensor) -> Tensor:
            x = carried(tokens, hidden, final, assignment)
            query = x + self.query_place(place_features(where, grid, tokens))
            x = x + self.back(query, where, final, kept_at)
            return x + self.mlp(x)

        return LearnedPlan(assignment=assignment, hidden=hidden, recover=back if recover else None)
