"""The attention call of a generator as one opaque operator, `tubelet::attend`.

torch.compile sees a tensor function with a tensor that numbers the place, so all layers of a
model share one graph. What happens inside (the step, the recipe, its state) stays plain Python
that the compiler never traces. The operator has no gradient: its backward pass raises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tubelet.core.context import Site
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.attention_runtime import AttentionRuntime

DenseAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention [B, H, N, D] of queries, keys and values [B, H, N, D] and a scale."""


@dataclass
class CurrentCall:
    """Geometry of the forward pass that a transformer is in; None outside of one."""

    grid: TokenGrid | None = None
    lengths: Sequence[int] | None = None


@dataclass
class Place:
    """One attention module at work.

    Args:
        site: Where it is.
        call: Geometry, shared by all places of one transformer.
        runtime: Takes the calls.
        dense: The host's own attention, without a mask.
    """

    site: Site
    call: CurrentCall
    runtime: AttentionRuntime
    dense: DenseAttention
    number: Tensor = field(init=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention [B, H, N, D] through the runtime.

        Raises:
            UnsupportedError: A block was called outside of its transformer's forward pass.
            ShapeError: The call has other tokens than the geometry says.
        """
        grid = self.call.grid
        if grid is None:
            raise UnsupportedError(
                f"{self.site.name} was called outside of its transformer's forward pass, so the "
                "geometry of its tokens is unknown"
            )
        if not q.shape[2] == k.shape[2] == grid.num_tokens:
            raise ShapeError(
                f"{self.site.name} attends from {q.shape[2]} to {k.shape[2]} tokens, but the "
                f"video is {grid} = {grid.num_tokens} tokens"
            )
        return self.runtime.attend(
            self.site, q, k, v, scale, lambda: self._as_before(q, k, v, scale)
        )

    def _as_before(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        lengths = self.call.lengths
        if lengths is None:
            return self.dense(q, k, v, scale)
        # Padding is at the end: leaving it out equals masking it, and keeps fused kernels.
        if len(set(lengths)) == 1:
            return self.dense(q, k[:, :, : lengths[0]], v[:, :, : lengths[0]], scale)
        rows = [
            self.dense(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], scale)
            for i, n in enumerate(lengths)
        ]
        return torch.cat(rows)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Dense attention of hosts that call torch themselves."""
    return scaled_dot_product_attention(q, k, v, scale=scale)


_PLACES: dict[int, Place] = {}
_NUMBERS = count()


def open_place(
    site: Site, call: CurrentCall, runtime: AttentionRuntime, dense: DenseAttention
) -> Place:
    """Make a place known to the operator; `Place.number` is what the operator takes."""
    place = Place(site=site, call=call, runtime=runtime, dense=dense)
    number = next(_NUMBERS)
    # Explicitly on the CPU: reading it there needs no synchronisation.
    place.number = torch.tensor(number, dtype=torch.int64, device="cpu")
    _PLACES[number] = place
    return place


def close_place(place: Place) -> None:
    """Forget a place."""
    del _PLACES[int(place.number)]


def open_places() -> int:
    """How many places the operator knows."""
    return len(_PLACES)


@torch.library.custom_op(
    "tubelet::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor place) -> Tensor",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, place: Tensor) -> Tensor:
    number = int(place)
    if number not in _PLACES:
        raise UnsupportedError("this attention call belongs to recipes that were removed")
    return _heads_inside(_PLACES[number].attend(q, k, v, scale))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, place: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)


def _no_gradient(ctx: Any, grad: Tensor) -> Any:
    raise UnsupportedError(
        "attention under recipes has no gradient on generators; remove() them before training"
    )


_attend.register_autograd(_no_gradient)


def _heads_inside(out: Tensor) -> Tensor:
    """The layout [B, N, H, D] in memory: the one that every host flattens next."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, number: Tensor, scale: float | None = None) -> Tensor:
    """Attention [B, H, N, D] for q, k, v [B, H, N, D] at the place of that number."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Under autocast norms return float32; fused attention would cast them back.
    q, k = q.to(v.dtype), k.to(v.dtype)
    return torch.ops.tubelet.attend(q, k, v, scale, number)


def in_heads(attn: Any, tokens: Tensor, projections: Sequence[Any]) -> list[Tensor]:
    """[B, N, H, D] of tokens [B, N, C] under each projection of a diffusers attention module."""
    return [project(tokens).unflatten(2, (attn.heads, -1)) for project in projections]


def attend_jointly(
    attn: Any, video: Sequence[Tensor], text: Sequence[Tensor], number: Tensor
) -> tuple[Tensor, Tensor]:
    """Video and text [B, N, C] after attention over both, video first, and their projections.

    Args:
        attn: A diffusers attention module.
        video, text: Queries, keys and values [B, N, H, D], positions applied.
        number: Of the place.
    """
    pairs = zip(video, text, strict=True)
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
    out = attend(q, k, v, number).transpose(1, 2).flatten(2)
    frames, words = out.split([video[0].shape[1], text[0].shape[1]], dim=1)
    frames = attn.to_out[1](attn.to_out[0](frames))
    # A last block has no use for its text and no projection for it.
    return frames, attn.to_add_out(words) if hasattr(attn, "to_add_out") else words
