"""What all policies that pick blocks of a video sequence have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import AttentionContext, BlockTools
from tubelet.core.errors import RecipeError
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import SparseAttention, param
from tubelet.ops.block_mask import Blocks
from tubelet.ops.block_score import ordered, pooled_scores
from tubelet.ops.order import LAYOUTS, Layout, token_order
from tubelet.ops.rows import mask_errors, sampled_rows
from tubelet.ops.tools import PLAIN


@dataclass(frozen=True)
class Call:
    """An attention call with its tokens in the order of a policy."""

    ctx: AttentionContext
    blocks: Blocks
    order: Tensor | None

    @property
    def tools(self) -> BlockTools:
        """Block operations for the device of the tensors."""
        return self.ctx.tools or PLAIN

    def means(self, split: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
        """Mean queries and keys of the free blocks, or of their parts, float32."""
        blocks, (bq, bk) = self.blocks, self.blocks.size
        q = self.tools.means(self.ctx.query, bq // split[0], self.order, blocks.free_queries)
        return q, self.tools.means(self.ctx.key, bk // split[1], self.order, blocks.free_keys)

    def scores(self) -> Tensor:
        """Logits between mean queries and mean keys, [B, H, free rows, free columns]."""
        return pooled_scores(*self.means(), self.ctx.scale)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in block order."""
        q, k, v = (ordered(x, self.order) for x in (self.ctx.query, self.ctx.key, self.ctx.value))
        return q, k, v

    def mask(self, kept: Tensor) -> BlockMask:
        """Lists from a table of the free blocks; exempt blocks are added."""
        return self.blocks.mask(kept, self.tools)

    def errors(self, tables: Sequence[Tensor], rows: int, seed: int) -> Tensor:
        """Relative squared error of some sampled video rows under each table of free blocks."""
        picked = sampled_rows(self.ctx.grid.num_video, rows, seed, self.ctx.query.device)
        whole = [self.blocks.keep_exempt(table) for table in tables]
        return mask_errors(*self.tokens(), self.ctx.scale, picked, self.blocks, whole)


@dataclass(frozen=True, kw_only=True)
class BlockPolicy(SparseAttention):
    """Keeps some blocks of the video; blocks with tokens from outside of it are always kept."""

    block: tuple[int, int] = param((128, 128), "tokens per (query, key) block", least=1)

    def layout(self, ctx: AttentionContext) -> Layout:
        """Order of the video tokens."""
        return "thw"

    @abstractmethod
    def choose(self, call: Call) -> BlockMask:
        """The blocks to compute; asked only where there are blocks of video tokens alone."""

    def arrange(self, ctx: AttentionContext) -> Call:
        """The call with its tokens in the order of this policy."""
        blocks = Blocks(
            size=self.block,
            num_video=ctx.grid.num_video,
            num_tokens=ctx.query.shape[2],
            num_keys=ctx.keys,
        )
        return Call(ctx, blocks, token_order(ctx.grid, self.layout(ctx), ctx.query.device))

    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        call = self.arrange(ctx)
        if min(call.blocks.free_rows, call.blocks.free_columns) == 0:
            return AttentionPlan(mask=call.blocks.everything(ctx.query.device), order=call.order)
        return AttentionPlan(mask=self.choose(call), order=call.order)


@dataclass(frozen=True, kw_only=True)
class OrderedPolicy(BlockPolicy):
    """A block policy whose order of the video tokens is a choice."""

    order: str = param("thw", f"order of the video tokens: {', '.join(LAYOUTS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise RecipeError(f"{self.name}.order must be one of {known}, got {self.order!r}")

    def layout(self, ctx: AttentionContext) -> Layout:
        return self.order
