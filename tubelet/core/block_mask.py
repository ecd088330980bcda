"""Which (query block, key block) pairs an attention call computes."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.core.tensors import decode_tensor, encode_tensor


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Lists of key blocks per query block; the last block of either axis may be ragged.

    Args:
        counts: [B, H, Mq] int32, key blocks computed for each query block; 0 is allowed and
            gives zero output and a log-sum-exp of -inf.
        indices: [B, H, Mq, K] int32, key block numbers; entries at and after `counts` are
            ignored. The first `counts` entries of a row are distinct.
        block: (query, key) block sizes in tokens.
        num_queries: Query tokens; the last query block holds what is left.
        num_keys: Key tokens.

    B and H may be 1 to share one mask. Raises ShapeError when the shapes do not fit.
    """

    counts: Int[Tensor, "b h mq"]
    indices: Int[Tensor, "b h mq k"]
    block: tuple[int, int]
    num_queries: int
    num_keys: int

    def __post_init__(self) -> None:
        if min(*self.block, self.num_queries, self.num_keys) < 1:
            raise ShapeError(
                f"BlockMask needs positive sizes, got block {self.block} for "
                f"{self.num_queries} x {self.num_keys} tokens"
            )
        if self.indices.ndim != 4 or self.indices.shape[:3] != self.counts.shape:
            raise ShapeError(
                "BlockMask needs counts [B, H, Mq] and indices [B, H, Mq, K], got "
                f"{tuple(self.counts.shape)} and {tuple(self.indices.shape)}"
            )
        rows, columns = self.grid
        if self.counts.shape[2] != rows or self.indices.shape[3] > columns:
            raise ShapeError(
                f"{self.num_queries} x {self.num_keys} tokens in blocks of {self.block} are "
                f"{rows} x {columns} blocks, but the lists have {self.counts.shape[2]} rows and "
                f"{self.indices.shape[3]} entries"
            )
        if self.counts.dtype != torch.int32 or self.indices.dtype != torch.int32:
            raise ShapeError("BlockMask lists must be int32")

    @property
    def grid(self) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return -(-self.num_queries // self.block[0]), -(-self.num_keys // self.block[1])

    @classmethod
    def from_dense(
        cls,
        kept: Bool[Tensor, "b h mq mk"],
        *,
        block: tuple[int, int],
        num_queries: int,
        num_keys: int,
    ) -> "BlockMask":
        """Lists from a boolean table; each list is in ascending order."""
        order = torch.argsort(~kept, dim=-1, stable=True)
        return cls(
            counts=kept.sum(-1).to(torch.int32),
            indices=order.to(torch.int32),
            block=block,
            num_queries=num_queries,
            num_keys=num_keys,
        )

    def to_dense(self) -> Bool[Tensor, "b h mq mk"]:
        """Boolean table of the computed pairs."""
        live = (
            torch.arange(self.indices.shape[3], device=self.counts.device) < self.counts[..., None]
        )
        # Ignored entries are sent to a spare column, so that stale numbers cannot hit.
        columns = self.grid[1]
        slots = torch.where(live, self.indices, columns).long()
        table = torch.zeros(*self.counts.shape, columns + 1, dtype=torch.bool, device=slots.device)
        return table.scatter(3, slots, True)[..., :columns]

    def token_mask(self) -> Bool[Tensor, "b h nq nk"]:
        """The mask on single tokens: N x N memory, for references and tests."""
        rows = torch.arange(self.num_queries, device=self.counts.device) // self.block[0]
        columns = torch.arange(self.num_keys, device=self.counts.device) // self.block[1]
        return self.to_dense()[:, :, rows[:, None], columns[None, :]]

    @property
    def density(self) -> float:
        """Share of token pairs computed, in [0, 1]; ragged tails count by their real size."""
        rows, columns = (self._sizes(axis) for axis in (0, 1))
        pairs = self.to_dense().double() * rows[:, None] * columns[None, :]
        total = self.counts.shape[0] * self.counts.shape[1] * self.num_queries * self.num_keys
        return float(pairs.sum() / total)

    def to_flex(self) -> Any:
        """The same mask as a torch FlexAttention BlockMask."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        dense, (bq, bk) = self.to_dense(), self.block
        # Factors of 0 send every sample or head to a shared mask.
        batch, head = int(dense.shape[0] > 1), int(dense.shape[1] > 1)
        lists = BlockMask.from_dense(
            dense, block=self.block, num_queries=self.num_queries, num_keys=self.num_keys
        )
        return FlexBlockMask.from_kv_blocks(
            lists.counts,
            lists.indices,
            BLOCK_SIZE=self.block,
            mask_mod=lambda b, h, q, k: dense[b * batch, h * head, q // bq, k // bk],
            seq_lengths=(self.num_queries, self.num_keys),
        )

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device."""
        return BlockMask(
            counts=self.counts.to(device),
            indices=self.indices.to(device),
            block=self.block,
            num_queries=self.num_queries,
            num_keys=self.num_keys,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "counts": encode_tensor(self.counts),
            "indices": encode_tensor(self.indices),
            "block": list(self.block),
            "num_queries": self.num_queries,
            "num_keys": self.num_keys,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BlockMask":
        """Inverse of `to_dict`."""
        tensors = {name: decode_tensor(data[name]) for name in ("counts", "indices")}
        sizes = {name: data[name] for name in ("num_queries", "num_keys")}
        return cls(**tensors, block=(data["block"][0], data["block"][1]), **sizes)

    def _sizes(self, axis: int) -> Tensor:
        length = (self.num_queries, self.num_keys)[axis]
        sizes = torch.full((self.grid[axis],), float(self.block[axis]), dtype=torch.float64)
        sizes[-1] = length - (len(sizes) - 1) * self.block[axis]
        return sizes.to(self.counts.device)
