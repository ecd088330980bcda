"""What all trained reducers share."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tubelet.core.assignment import TokenAssignment
from tubelet.core.grid import TokenGrid
from tubelet.core.learned import LearnedPlan
from tubelet.kernels.attention import attention
from tubelet.nn.rotary import apply_rotary, rotary_table


class Reducer(nn.Module):
    """A module that computes K tokens from N video tokens, for any K and N.

    Its recipe calls it at one place of a host; the host carries it as `reducers[name]`, so that
    it is trained, moved and saved with the host.
    """

    @abstractmethod
    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        place: Int[Tensor, "b n"],
        grid: TokenGrid,
        num: int,
        recover: bool = True,
    ) -> LearnedPlan:
        """Reduce the video tokens.

        Args:
            tokens: Video tokens of the residual stream, without class tokens.
            place: Position of each in the raster of the whole clip, ascending.
            grid: Geometry of the whole clip; tokens before and after the video are ignored.
            num: Tokens wanted, in [1, N]; methods on a grid may take slightly fewer.
            recover: Bring the learned way back along, where the method has one.
        """

    def penalty(self) -> Tensor:
        """What training passes since the last call add to the loss, a scalar; mostly zero.

        Call it once per step of training: it forgets what it returned.
        """
        return next(self.parameters()).new_zeros(())


class CrossAttention(nn.Module):
    """Multi-head attention from one token set to another, with rotary positions on both.

    Args:
        width: Channels of the tokens.
        heads: Attention heads.
        per_head: Channels of a head, a multiple of 8; None takes width / heads rounded up to one.
    """

    def __init__(self, width: int, heads: int, per_head: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.per_head = -(-width // heads // 8) * 8 if per_head is None else per_head
        inner = heads * self.per_head
        self.norm_query, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner)
        self.memory = nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)

    def forward(
        self,
        query: Float[Tensor, "b k c"],
        query_at: Float[Tensor, "*b k 3"],
        memory: Float[Tensor, "b n c"],
        memory_at: Float[Tensor, "*b n 3"],
    ) -> Float[Tensor, "b k c"]:
        """What each query reads from the memory; coordinates are in token units."""
        q = split_heads(self.query(self.norm_query(query)), self.heads)
        k, v = self.memory(self.norm_memory(memory)).chunk(2, dim=-1)
        q = rotated(q, query_at)
        k = rotated(split_heads(k, self.heads), memory_at)
        out = attention(q, k, split_heads(v, self.heads))[0]
        return self.out(out.transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """LayerNorm, a hidden layer, GELU; the last layer starts at zero."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        last = nn.Linear(hidden, width if out is None else out)
        nn.init.zeros_(last.weight)
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        nn.init.zeros_(last.bias)


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b h n d"]:
    """Channels into heads."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotated(x: Float[Tensor, "b h n d"], where: Float[Tensor, "*b n 3"]) -> Tensor:
    """Queries or keys turned by their coordinates."""
    return apply_rotary(x, *rotary_table(where, x.shape[-1]))


def carried(
    tokens: Float[Tensor, "b n c"],
    before: Float[Tensor, "b k c"],
    after: Float[Tensor, "b k c"],
    assignment: TokenAssignment,
) -> Float[Tensor, "b n c"]:
    """Each token plus what its main output gained between `before` and `after`."""
    return tokens + assignment.restore(after - before)


def gathered(x: Tensor, rows: Int[Tensor, "b k"]) -> Tensor:
    """Rows of [B, N, C] by index."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def gate(log_score: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Zeros with the gradient of `log_score`."""
    return log_score - log_score.detach()


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of `like`, float32."""
    uniform = torch.rand(like.shape, device=like.device).clamp(1e-6, 1 - 1e-6)
    return -(-uniform.log()).log()
