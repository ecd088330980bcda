"""Reducers that pool into new tokens: token slimming, two resolutions, semantic tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.grid import TokenGrid
from tubelet.core.learned import LearnedPlan
from tubelet.kernels.attention import attention
from tubelet.nn.reducers.base import (
    CrossAttention,
    Mlp,
    Reducer,
    carried,
    rotated,
    split_heads,
)
from tubelet.nn.reducers.geometry import (
    PLACE_FEATURES,
    Cells,
    coordinates,
    place_features,
    spread,
)


class TokenSlimmer(Reducer):
    """Each slot is a softmax-weighted mean of all tokens; the way back uses the same weights.

    Slots lie on a coarse grid. A slot's row of the last layer comes from a learned table and from
    where the slot lies, and its weights start as a soft window around it, whose sharpness is
    learned: hosts with rotary positions do not tell tokens where they are.
    """

    def __init__(self, width: int, max_slots: int) -> None:
        super().__init__()
        half = width // 2
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, half)
        self.place = nn.Linear(PLACE_FEATURES, half)
        self.slots = nn.Parameter(torch.randn(max_slots, half) * half**-0.5)
        self.slot_place = nn.Linear(PLACE_FEATURES, half)
        self.scale = nn.Parameter(torch.ones(()))
        self.sharpness = nn.Parameter(torch.tensor(0.7))
        self.mix = Mlp(2 * width, half, width)

    def weights(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        cells: Cells,
    ) -> Float[Tensor, "b k n"]:
        """Share of each token in each slot, float32; rows add up to one."""
        where = coordinates(place, grid)
        features = self.inner(self.norm(tokens)) + self.place(place_features(where, grid, tokens))
        rows = spread(self.slots, cells.num)
        rows = rows + self.slot_place(place_features(cells.centre, grid, tokens))
        logits = self.scale * torch.einsum(
            "bnc,kc->bkn", nn.functional.gelu(features).float(), rows.float()
        )
        gap = (where[:, None] - cells.centre[:, None]) / cells.sides
        return (logits - self.sharpness.exp() * gap.square().sum(-1)).softmax(-1)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = True,
    ) -> LearnedPlan:
        """Pool to at most `num` slots."""
        cells = Cells(grid, num, tokens)
        weights = self.weights(tokens, place, grid, cells)
        hidden = weights.to(tokens.dtype) @ tokens

        def expand(slots: Tensor) -> Tensor:
            back = (weights / weights.sum(1, keepdim=True)).to(slots.dtype)
            spread_out = back.transpose(1, 2) @ slots
            return spread_out + self.mix(torch.cat([spread_out, tokens], dim=-1))

        return LearnedPlan(
            assignment=cells.assignment, hidden=hidden, recover=expand if recover else None
        )


class LookupExchange(Reducer):
    """Compressed tokens read from lookup tokens; these are updated over the same logits at the end.

    One projection of each set serves as query and as key, so that the logits of the write are the
    transpose of those of the read.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * (-(-width // heads // 8) * 8)
        self.norm_lookup, self.norm_compressed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_write = nn.LayerNorm(width)
        self.lookup, self.compressed = nn.Linear(width, inner), nn.Linear(width, inner)
        self.value_read, self.value_write = nn.Linear(width, inner), nn.Linear(width, inner)
        self.out_read, self.out_write = nn.Linear(inner, width), nn.Linear(inner, width)
        for out in (self.out_read, self.out_write):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
        self.mlp = Mlp(width, width // 2)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = True,
    ) -> LearnedPlan:
        """Compress to at most `num` tokens."""
        cells = Cells(grid, num, tokens)
        pooled = cells.assignment.reduce(tokens)
        lookup = self.norm_lookup(tokens)
        dense = rotated(split_heads(self.lookup(lookup), self.heads), coordinates(place, grid))
        coarse = split_heads(self.compressed(self.norm_compressed(pooled)), self.heads)
        coarse = rotated(coarse, cells.centre)
        hidden = pooled + self._mixed(coarse, dense, self.value_read(lookup), self.out_read)

        def write(final: Tensor) -> Tensor:
            value = self.value_write(self.norm_write(final))
            x = carried(tokens, hidden, final, cells.assignment)
            x = x + self._mixed(dense, coarse, value, self.out_write)
            return x + self.mlp(x)

        return LearnedPlan(
            assignment=cells.assignment, hidden=hidden, recover=write if recover else None
        )

    def _mixed(self, q: Tensor, k: Tensor, value: Tensor, out: nn.Linear) -> Tensor:
        mixed = attention(q, k, split_heads(value, self.heads))[0]
        return out(mixed.transpose(1, 2).flatten(2))


class SemanticTokens(Reducer):
    """Pooled seeds refined by attention to the tokens, twice; the second time with a global table.

    Attention runs at half the host's width. On the way back each token queries the semantic tokens.
    """

    def __init__(self, width: int, heads: int, max_slots: int) -> None:
        super().__init__()
        per_head = max(8, width // heads // 16 * 8)
        self.position = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.common = nn.Parameter(torch.randn(max_slots, width) * 0.02)
        self.refine = nn.ModuleList(CrossAttention(width, heads, per_head) for _ in range(2))
        self.mlps = nn.ModuleList(Mlp(width, width // 2) for _ in range(2))
        self.layer_scale = nn.ParameterList(torch.full((width,), 1e-5) for _ in range(3))
        self.back = CrossAttention(width, heads, per_head)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = True,
    ) -> LearnedPlan:
        """Form at most `num` semantic tokens."""
        cells, where = Cells(grid, num, tokens), coordinates(place, grid)
        pooled = cells.assignment.reduce(tokens)
        boxes = pooled.transpose(1, 2).unflatten(2, cells.shape)
        hidden = pooled + self.position(boxes).flatten(2).transpose(1, 2)
        around = torch.cat([cells.centre.expand(len(where), -1, -1), where], dim=1)
        for number, (block, mlp) in enumerate(zip(self.refine, self.mlps, strict=True)):
            query = hidden if number == 0 else hidden + spread(self.common, cells.num)
            memory = torch.cat([hidden, tokens], dim=1)
            read = block(query, cells.centre, memory, around)
            hidden = query + self.layer_scale[number] * read
            hidden = hidden + mlp(hidden)

        def back(final: Tensor) -> Tensor:
            x = carried(tokens, hidden, final, cells.assignment)
            return x + self.layer_scale[2] * self.back(x, where, final, cells.centre)

        return LearnedPlan(
            assignment=cells.assignment, hidden=hidden, recover=back if recover else None
        )
