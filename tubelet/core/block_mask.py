"""Which (query block, key block) pairs an attention call computes."""

from dataclasses import dataclass, replace
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
        # Ignored entries are sent to a spare column, so that stale numbers cannot hit.
        columns = self.grid[1]
        slots = torch.where(self._live(), self.indices, columns).long()
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
        rows, (bq, bk) = self.grid[0], self.block
        sizes = torch.full((rows,), bq, dtype=torch.int64, device=self.counts.device)
        sizes[-1] = self.num_queries - (rows - 1) * bq
        keys = self.counts.long() * bk - self._reaches_tail() * (-self.num_keys % bk)
        total = self.counts.shape[0] * self.counts.shape[1] * self.num_queries * self.num_keys
        return int((keys * sizes).sum()) / total

    def tail_last(self) -> "BlockMask":
        """The same mask with a ragged last key block at the end of every list that holds it.

        Kernels that look for the end of the keys in one block only rely on it. Nothing is read
        back from the device.
        """
        if self.num_keys % self.block[1] == 0 or self.indices.shape[3] == 0:
            return self
        end = (self.counts.long() - 1).clamp(min=0)[..., None]
        tails = self._tails()
        entries = torch.where(tails, self.indices.gather(3, end), self.indices)
        tail = torch.full_like(entries[..., :1], self.grid[1] - 1)
        swapped = torch.where(tails.any(-1, keepdim=True), tail, self.indices.gather(3, end))
        return replace(self, indices=entries.scatter(3, end, swapped))

    def split(self, block: tuple[int, int]) -> "BlockMask":
        """The same token pairs in smaller blocks; nothing is read back from the device.

        Args:
            block: (query, key) block sizes in tokens that divide those of this mask.

        Raises:
            ShapeError: The sizes do not divide.
        """
        if block == self.block:
            return self
        if min(block) < 1 or self.block[0] % block[0] or self.block[1] % block[1]:
            raise ShapeError(f"blocks of {self.block} tokens cannot be split into {block}")
        per_row, per_column = self.block[0] // block[0], self.block[1] // block[1]
        rows, columns = -(-self.num_queries // block[0]), -(-self.num_keys // block[1])
        lists = self.tail_last()
        parts = torch.arange(per_column, dtype=torch.int32, device=self.counts.device)
        indices = (lists.indices[..., None] * per_column + parts).flatten(3)[..., :columns]
        # Parts of the ragged tail that would begin behind the last key stand at the list's end.
        absent = self.grid[1] * per_column - columns
        counts = self.counts * per_column - self._reaches_tail().int() * absent
        return BlockMask(
            counts=counts.repeat_interleave(per_row, dim=2)[:, :, :rows],
            indices=indices.repeat_interleave(per_row, dim=2)[:, :, :rows],
            block=block,
            num_queries=self.num_queries,
            num_keys=self.num_keys,
        )

    def to_flex(self) -> Any:
        """The same mask as a torch FlexAttention BlockMask.

        Only blocks in a ragged tail ask about single tokens; all others are computed whole.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        dense, (bq, bk) = self.to_dense(), self.block
        # Factors of 0 send every sample or head to a shared mask.
        batch, head = int(dense.shape[0] > 1), int(dense.shape[1] > 1)
        ragged = torch.zeros(self.grid, dtype=torch.bool, device=dense.device)
        ragged[-1] |= self.num_queries % bq != 0
        ragged[:, -1] |= self.num_keys % bk != 0
        sizes = {"num_queries": self.num_queries, "num_keys": self.num_keys}
        partial, full = (
            BlockMask.from_dense(dense & part, block=self.block, **sizes)
            for part in (ragged, ~ragged)
        )
        return FlexBlockMask.from_kv_blocks(
            partial.counts,
            partial.indices,
            full.counts,
            full.indices,
            BLOCK_SIZE=self.block,
            mask_mod=lambda b, h, q, k: dense[b * batch, h * head, q // bq, k // bk],
            seq_lengths=(self.num_queries, self.num_keys),
        )

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device."""
        return replace(self, counts=self.counts.to(device), indices=self.indices.to(device))

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

    def _live(self) -> Tensor:
        places = torch.arange(self.indices.shape[3], device=self.counts.device)
        return places < self.counts[..., None]

    def _tails(self) -> Tensor:
        """True at list entries that name the last key block, [B, H, Mq, K]."""
        return (self.indices == self.grid[1] - 1) & self._live()

    def _reaches_tail(self) -> Tensor:
        return self._tails().any(-1)
