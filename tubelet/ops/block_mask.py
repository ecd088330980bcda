"""Block masks: which blocks exist, which are always kept, and static patterns of them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import BlockTools
from tubelet.core.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a sequence that lists its video tokens first.

    A block that holds a token from outside the video is exempt: always kept, as a row and as a
    column. All others are free: policies decide about those.

    Args:
        size: Tokens per (query, key) block.
        num_video: Video tokens, the first of the sequence.
        num_tokens: All tokens.
        num_keys: Tokens that may be attended to; the rest, padding, is last.

    Raises:
        ShapeError: The sizes do not fit together.
    """

    size: tuple[int, int]
    num_video: int
    num_tokens: int
    num_keys: int

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 1 <= self.num_video <= self.num_keys <= self.num_tokens:
            raise ShapeError(
                f"blocks of {self.size} do not fit {self.num_video} video tokens, "
                f"{self.num_keys} keys and {self.num_tokens} tokens"
            )

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.num_tokens // self.size[0])

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.num_keys // self.size[1])

    @property
    def free_rows(self) -> int:
        """Query blocks of video tokens only; they come first."""
        return self.rows if self.num_tokens == self.num_video else self.num_video // self.size[0]

    @property
    def free_columns(self) -> int:
        """Key blocks of video tokens only; they come first."""
        return self.columns if self.num_keys == self.num_video else self.num_video // self.size[1]

    @property
    def free_queries(self) -> int:
        """Tokens in the free query blocks."""
        return min(self.num_video, self.free_rows * self.size[0])

    @property
    def free_keys(self) -> int:
        """Tokens in the free key blocks."""
        return min(self.num_video, self.free_columns * self.size[1])

    def own(self, device: torch.device | str | None = None) -> Bool[Tensor, "rows columns"]:
        """True where a free query block and a free key block share a token."""
        bq, bk = self.size
        rows = torch.arange(self.free_rows, device=device)[:, None] * bq
        columns = torch.arange(self.free_columns, device=device)[None, :] * bk
        return (rows < columns + bk) & (columns < rows + bq)

    def keep_exempt(self, kept: Bool[Tensor, "*batch rows columns"]) -> Tensor:
        """The table of all blocks from that of the free ones: exempt rows and columns are kept."""
        extra = (0, self.columns - self.free_columns, 0, self.rows - self.free_rows)
        return F.pad(kept, extra, value=True)

    def mask(
        self, kept: Bool[Tensor, "b h rows columns"], tools: BlockTools | None = None
    ) -> BlockMask:
        """Lists from a table of the free blocks; exempt blocks are added."""
        build = BlockMask.from_dense if tools is None else tools.mask
        return build(
            self.keep_exempt(kept),
            block=self.size,
            num_queries=self.num_tokens,
            num_keys=self.num_keys,
        )

    def everything(self, device: torch.device | str | None = None) -> BlockMask:
        """The mask that leaves out padding and nothing else."""
        full = (1, 1, self.free_rows, self.free_columns)
        return self.mask(torch.ones(full, dtype=torch.bool, device=device))

    def lists_from_topk(
        self,
        score: Float[Tensor, "b h rows columns"],
        k: int,
        counts: Int[Tensor, "b h"] | None = None,
    ) -> BlockMask:
        """The `k` best free key blocks of each free query block, and all exempt ones.

        One top-k, no sort of whole rows and no table.

        Args:
            score: Of the free blocks; any scale without NaN.
            k: Blocks kept per row, in [1, columns].
            counts: Keep only so many of the `k`, one number per sample and head, in [1, k].
        """
        batch, heads = score.shape[:2]
        best = score.topk(k, dim=-1).indices.to(torch.int32)
        fixed = torch.arange(
            self.free_columns, self.columns, dtype=torch.int32, device=score.device
        ).expand(batch, heads, self.free_rows, -1)
        # Exempt blocks come first, so that a smaller count cuts off the lowest scores.
        lists = torch.cat([fixed, best], dim=-1)
        number = (
            torch.full((batch, heads, 1), k, device=score.device)
            if counts is None
            else (counts[..., None])
        )
        number = (number + fixed.shape[-1]).to(torch.int32).expand(-1, -1, self.free_rows)
        extra = self.rows - self.free_rows
        if extra:
            lists = F.pad(lists, (0, self.columns - lists.shape[-1]))
            every = torch.arange(self.columns, dtype=torch.int32, device=score.device)
            lists = torch.cat([lists, every.expand(batch, heads, extra, -1)], dim=2)
            number = F.pad(number, (0, extra), value=self.columns)
        return BlockMask(
            counts=number.contiguous(),
            indices=lists.contiguous(),
            block=self.size,
            num_queries=self.num_tokens,
            num_keys=self.num_keys,
        )


def axis_window(
    num: int, window: int, device: torch.device | str | None = None
) -> Bool[Tensor, "num num"]:
    """Each position attends to `window` positions around it, clamped at the ends.

    Near an end the window is moved inwards, so that every position sees equally many. An even
    window reaches one further to the left. A window of `num` or more keeps all.
    """
    window = min(window, num)
    place = torch.arange(num, device=device)
    first = (place - window // 2).clamp(0, num - window)[:, None]
    return (place >= first) & (place < first + window)


def any_per_tile(kept: Bool[Tensor, "n n"], side: int) -> Bool[Tensor, "m m"]:
    """Whether any pair of positions of two tiles is kept; tiles of `side`, the last ragged."""
    tiles = -(-kept.shape[0] // side)
    spare = tiles * side - kept.shape[0]
    return F.pad(kept, (0, spare, 0, spare)).reshape(tiles, side, tiles, side).any(3).any(1)


def box(
    time: Bool[Tensor, "a a"], height: Bool[Tensor, "b b"], width: Bool[Tensor, "c c"]
) -> Bool[Tensor, "u u"]:
    """Pairs of units (tiles, frames) kept along all three axes; units in raster order."""
    parts = (
        time[:, None, None, :, None, None],
        height[None, :, None, None, :, None],
        width[None, None, :, None, None, :],
    )
    num = time.shape[0] * height.shape[0] * width.shape[0]
    return (parts[0] & parts[1] & parts[2]).reshape(num, num)


def units_in_blocks(
    unit: Int[Tensor, "v"], num_units: int, block: int, num: int
) -> Bool[Tensor, "m u"]:
    """Which units (tiles, frames) have tokens in which of the blocks of the first `num` tokens.

    Args:
        unit: Unit of each ordered video token, in [0, num_units).
        block: Tokens per block.
        num: Tokens in blocks, at most v.
    """
    table = torch.zeros(-(-num // block), num_units, dtype=torch.bool, device=unit.device)
    rows = torch.arange(num, device=unit.device) // block
    return table.index_put((rows, unit[:num]), table.new_ones(()))


def spread(kept: Bool[Tensor, "*batch u w"], rows: Bool[Tensor, "m u"]) -> Tensor:
    """Rows of units as rows of blocks: kept when any unit in the block is, never less."""
    return (rows.float() @ kept.float()) > 0


def spread_keys(kept: Bool[Tensor, "*batch m w"], columns: Bool[Tensor, "n w"]) -> Tensor:
    """Columns of units as columns of blocks: kept when any unit in the block is, never less."""
    return (kept.float() @ columns.float().T) > 0


def frame_bands(
    blocks: Blocks, per_frame: int, width: Float[Tensor, "f"]
) -> Bool[Tensor, "rows columns"]:
    """Free block pairs, in frame-major order, with a pair of tokens inside a band.

    Tokens (t, p) and (u, r), p and r being places within a frame, are inside when
    |p - r| <= width[|t - u|]. One frame of all tokens makes a plain band.

    Args:
        blocks: Geometry.
        per_frame: Tokens of a frame.
        width: Half width of the band in tokens by distance in frames; below 0 keeps nothing.
    """
    device = width.device
    frame, low, high = _segments(blocks.free_queries, blocks.size[0], per_frame, device)
    other, left, right = _segments(blocks.free_keys, blocks.size[1], per_frame, device)
    frame, low, high = (x[:, :, None, None] for x in (frame, low, high))
    apart = (frame - other).abs().clamp(max=len(width) - 1)
    gap = torch.maximum(left - high, low - right).clamp(min=0)
    real = (low <= high) & (left <= right)
    return (real & (gap <= width[apart])).any(3).any(1)


def _segments(
    num: int, block: int, per_frame: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, first and last place of each piece of a block that lies in one frame, [M, pieces]."""
    start = torch.arange(0, num, block, device=device)[:, None]
    stop = (start + block).clamp(max=num)
    pieces = min(-(-(block - 1) // per_frame) + 1, -(-num // per_frame))
    # The last pieces of most blocks are empty: their last place is before their first.
    frame = start // per_frame + torch.arange(max(pieces, 1), device=device)
    low = torch.maximum(start, frame * per_frame) - frame * per_frame
    high = torch.minimum(stop, (frame + 1) * per_frame) - 1 - frame * per_frame
    return frame, low, high
