"""Where each input token goes: the one value that every token reduction returns."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.core.tensors import check_ascending, decode_tensor, encode_tensor


@dataclass(frozen=True, kw_only=True)
class TokenAssignment:
    """A sparse K x N matrix per sample: input token n adds `weight[n]` to output `index[n]`.

    Dropping, merging and pooling are all of this form. Outputs are ordered by their anchor, so
    a reduced sequence stays in the order of the original one.

    Args:
        index: [B, N] int64, output of each input token in [0, K), or -1 when it is dropped.
        weight: [B, N] float32, entry of the matrix; ignored where `index` is -1.
        anchor: [B, K] int64, input token that gives the output its order and position;
            strictly ascending along K.
        size: [B, K] float32, how many input tokens an output stands for.
        copies: Every output is a plain copy of its anchor, so `reduce` may gather.

    Raises:
        ShapeError: Shapes disagree, or K is 0.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("index", "weight", "anchor", "size")

    index: Int[Tensor, "b n"]
    weight: Float[Tensor, "b n"]
    anchor: Int[Tensor, "b k"]
    size: Float[Tensor, "b k"]
    copies: bool = False

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.shape != self.weight.shape:
            raise ShapeError(
                "TokenAssignment needs index and weight of one shape [B, N], got "
                f"{tuple(self.index.shape)} and {tuple(self.weight.shape)}"
            )
        if self.anchor.shape != self.size.shape or self.anchor.shape[0] != self.index.shape[0]:
            raise ShapeError(
                "TokenAssignment needs anchor and size of one shape [B, K] with the same B, got "
                f"{tuple(self.anchor.shape)} and {tuple(self.size.shape)}"
            )
        if self.anchor.shape[1] == 0 or self.anchor.shape[1] > self.index.shape[1]:
            raise ShapeError(
                f"TokenAssignment of {self.num_in} tokens must keep between 1 and {self.num_in}, "
                f"got {self.num_out}"
            )

    @classmethod
    def identity(
        cls, batch: int, num: int, device: torch.device | str | None = None
    ) -> "TokenAssignment":
        """Every token stays where it is."""
        index = torch.arange(num, device=device).expand(batch, num)
        ones = torch.ones(batch, num, device=device)
        return cls(index=index, weight=ones, anchor=index, size=ones, copies=True)

    @classmethod
    def keep(cls, kept: Int[Tensor, "b k"], num: int) -> "TokenAssignment":
        """Keep the tokens `kept` (ascending positions in [0, num)) and drop the others."""
        batch, num_out = kept.shape
        ranks = torch.arange(num_out, device=kept.device).expand(batch, num_out)
        index = torch.full((batch, num), -1, dtype=torch.int64, device=kept.device)
        index = index.scatter(1, kept, ranks)
        ones = torch.ones(batch, num, device=kept.device)
        return cls(index=index, weight=ones, anchor=kept, size=ones[:, :num_out], copies=True)

    @classmethod
    def keep_where(cls, mask: Bool[Tensor, "b n"]) -> "list[TokenAssignment]":
        """Keep the True tokens of each sample, as many as there are: one assignment per sample.

        Raises:
            ShapeError: A sample keeps nothing.
        """
        plan, lengths = cls.keep_padded(mask)
        return [
            cls(
                index=plan.index[b : b + 1],
                weight=plan.weight[b : b + 1],
                anchor=plan.anchor[b : b + 1, :length],
                size=plan.size[b : b + 1, :length],
                copies=True,
            )
            for b, length in enumerate(lengths)
        ]

    @classmethod
    def keep_padded(cls, mask: Bool[Tensor, "b n"]) -> "tuple[TokenAssignment, tuple[int, ...]]":
        """Keep the True tokens of each sample in one assignment, and how many these are.

        K is the longest sample. Outputs behind the end of a shorter one are padding: their size
        and anchor are 0, and no input goes there. The counts are read from the device at once.

        Raises:
            ShapeError: A sample keeps nothing.
        """
        batch, num = mask.shape
        counts = mask.sum(1)
        lengths = tuple(counts.tolist())
        if min(lengths) < 1:
            raise ShapeError(f"sample {lengths.index(0)} of {batch} keeps none of its {num} tokens")
        longest = max(lengths)
        index = torch.where(mask, mask.cumsum(1) - 1, -1)
        # One slot more takes what is dropped.
        slots = torch.where(mask, index, longest)
        every = torch.arange(num, device=mask.device).expand(batch, num)
        anchor = index.new_zeros(batch, longest + 1).scatter(1, slots, every)[:, :longest]
        plan = cls(
            index=index,
            weight=torch.ones(batch, num, device=mask.device),
            anchor=anchor,
            size=(every[:, :longest] < counts[:, None]).float(),
            copies=True,
        )
        return plan, lengths

    @classmethod
    def merge(
        cls,
        target: Int[Tensor, "b n"],
        kept: Int[Tensor, "b k"],
        size: Float[Tensor, "b n"],
        scale: Float[Tensor, "b n"] | None = None,
    ) -> "TokenAssignment":
        """Merge every token into the kept token `target[n]` by the size-weighted mean.

        Args:
            target: Input position that token n merges into (its own for kept tokens), -1 to drop.
            kept: Kept positions, ascending; every non-negative `target` is one of them.
            size: Mass of each input token, > 0.
            scale: Optional factor on each token's share of the mean; the denominator stays the
                plain sum of sizes, so a scale below 1 shrinks what the token contributes.
        """
        base = cls.keep(kept, target.shape[1])
        index = base.index.gather(1, target.clamp(min=0))
        index = torch.where(target < 0, -1, index)
        live = (index >= 0).to(size.dtype)
        slots = index.clamp(min=0)
        zeros = torch.zeros_like(kept, dtype=size.dtype)
        mass = zeros.scatter_add(1, slots, size * live)
        count = zeros.scatter_add(1, slots, live)
        weight = size / mass.gather(1, slots).clamp(min=torch.finfo(size.dtype).tiny)
        weight = weight if scale is None else weight * scale
        return cls(index=index, weight=weight.float(), anchor=kept, size=count.float())

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.index.shape[0]

    @property
    def num_in(self) -> int:
        """Tokens before."""
        return self.index.shape[1]

    @property
    def num_out(self) -> int:
        """Tokens after."""
        return self.anchor.shape[1]

    def reduce(self, x: Float[Tensor, "b n *c"]) -> Float[Tensor, "b k *c"]:
        """Apply the matrix: weighted sums of the assigned tokens, accumulated in float32.

        Dropped tokens are never read, so NaN or stale memory in them cannot leak.
        """
        if x.shape[:2] != self.index.shape:
            raise ShapeError(
                f"this assignment takes tokens [{self.batch}, {self.num_in}, ...], got "
                f"{tuple(x.shape)}"
            )
        flat = x.reshape(self.batch * self.num_in, -1)
        if self.copies:
            rows = self.anchor + self._offsets(self.num_in)
            out = flat.index_select(0, rows.flatten())
        else:
            out = self._weighted_sums(flat).to(x.dtype)
        return out.reshape(self.batch, self.num_out, *x.shape[2:])

    def restore(
        self,
        y: Float[Tensor, "b k *c"],
        fill: Literal["mean", "zero"] = "mean",
    ) -> Float[Tensor, "b n *c"]:
        """Give each input token its output's value; dropped tokens get `fill`.

        "mean" is the size-weighted mean of the sample's outputs, so that mean pooling over the
        restored sequence equals size-weighted pooling over the survivors.
        """
        if y.shape[:2] != self.anchor.shape:
            raise ShapeError(
                f"this assignment restores tokens [{self.batch}, {self.num_out}, ...], got "
                f"{tuple(y.shape)}"
            )
        flat = y.reshape(self.batch * self.num_out, -1)
        slots = (self.index.clamp(min=0) + self._offsets(self.num_out)).flatten()
        out = flat.index_select(0, slots).reshape(self.batch, self.num_in, -1)
        share = self.size / self.size.sum(1, keepdim=True)
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide = y.reshape(self.batch, self.num_out, -1).to(dtype)
        mean = torch.einsum("bk,bkc->bc", share.to(dtype), wide)
        filler = mean[:, None].to(y.dtype) if fill == "mean" else torch.zeros_like(out[:, :1])
        out = torch.where((self.index < 0)[..., None], filler, out)
        return out.reshape(self.batch, self.num_in, *y.shape[2:])

    def compose(self, later: "TokenAssignment") -> "TokenAssignment":
        """The single assignment that equals applying `self`, then `later`."""
        if (later.batch, later.num_in) != (self.batch, self.num_out):
            raise ShapeError(
                f"cannot compose {self.num_in} -> {self.num_out} tokens (batch {self.batch}) with "
                f"{later.num_in} -> {later.num_out} (batch {later.batch})"
            )
        slots = self.index.clamp(min=0)
        index = torch.where(self.index < 0, -1, later.index.gather(1, slots))
        weight = self.weight * later.weight.gather(1, slots)
        live = (index >= 0).to(weight.dtype)
        size = torch.zeros_like(later.size).scatter_add(1, index.clamp(min=0), live)
        anchor = self.anchor.gather(1, later.anchor)
        copies = self.copies and later.copies
        return TokenAssignment(index=index, weight=weight, anchor=anchor, size=size, copies=copies)

    def matrix(self) -> Float[Tensor, "b k n"]:
        """The matrix itself, dense: for tests and small inputs only."""
        hit = self.index[:, None, :] == torch.arange(
            self.num_out, device=self.index.device
        ).unsqueeze(-1)
        return torch.where(hit, self.weight[:, None, :], 0.0)

    def check(self) -> None:
        """Validate values, which costs a device synchronisation.

        Raises:
            ShapeError: An index is out of range, an output is empty, an anchor is not assigned to
                its own output, anchors are out of order, or a weight is not finite.
        """
        if int(self.index.min()) < -1 or int(self.index.max()) >= self.num_out:
            raise ShapeError(f"assignment index leaves [-1, {self.num_out})")
        check_ascending(self.anchor, self.num_in, "assignment anchor")
        own = self.index.gather(1, self.anchor)
        if not torch.equal(own, torch.arange(self.num_out, device=own.device).expand_as(own)):
            raise ShapeError("an anchor is not assigned to its own output")
        if not bool(torch.isfinite(self.weight[self.index >= 0]).all()):
            raise ShapeError("assignment weights must be finite")

    def to(self, device: torch.device | str) -> "TokenAssignment":
        """The same assignment on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.TENSORS})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        tensors = {name: encode_tensor(getattr(self, name)) for name in self.TENSORS}
        return {**tensors, "copies": self.copies}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TokenAssignment":
        """Inverse of `to_dict`."""
        tensors = {name: decode_tensor(data[name]) for name in cls.TENSORS}
        return cls(**tensors, copies=data["copies"])

    def _offsets(self, stride: int) -> Int[Tensor, "b 1"]:
        return torch.arange(self.batch, device=self.index.device)[:, None] * stride

    def _weighted_sums(self, flat: Tensor) -> Tensor:
        # One bag per output. Dropped tokens go into as many more, whose sums are thrown away: in
        # a single one they would be added up one after the other.
        bags = self.batch * self.num_out
        spares = max(bags, 1)
        slots = (self.index + self._offsets(self.num_out)).flatten()
        spare = bags + torch.arange(slots.numel(), device=slots.device) % spares
        slots = torch.where(self.index.flatten() < 0, spare, slots)
        # 32-bit keys halve the passes of a radix sort.
        ranked, order = torch.sort(slots.int(), stable=True)
        numbers = torch.arange(bags + spares, dtype=torch.int32, device=slots.device)
        starts = torch.searchsorted(ranked, numbers)
        dtype = torch.promote_types(flat.dtype, torch.float32)
        weight = self.weight.flatten()[order].to(dtype)
        sums = F.embedding_bag(order, flat.to(dtype), starts, mode="sum", per_sample_weights=weight)
        return sums[:bags]
