"""Segments: runs of similar tokens along time."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.ops.score import rank_of


def run_starts(
    x: Tensor, difference: Callable[[Tensor, Tensor], Tensor], threshold: float
) -> Bool[Tensor, "b f p"]:
    """Where a new run begins at each place when time runs forward.

    An entry is compared with the *start of its run*, not with its predecessor, so a slow drift
    adds up until it starts a new run.

    Args:
        x: [B, F, P, ...], F steps in time, P places.
        difference: Maps two [B, P, ...] tensors to a [B, P] distance >= 0.
        threshold: A distance at or above it starts a new run; 0 makes every entry a run.

    Returns:
        True at run starts; always True in the first step.
    """
    anchor = x[:, 0]
    starts = [torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)]
    for step in range(1, x.shape[1]):
        fresh = difference(anchor, x[:, step]) >= threshold
        shape = (*fresh.shape, *[1] * (anchor.ndim - 2))
        anchor = torch.where(fresh.reshape(shape), x[:, step], anchor)
        starts.append(fresh)
    return torch.stack(starts, dim=1)


def run_lengths(starts: Bool[Tensor, "b f p"]) -> Int[Tensor, "b f p"]:
    """Length of the run that begins at each entry, 0 where none begins; (f, p) order kept."""
    heads = run_heads(starts)
    zeros = torch.zeros_like(heads)
    return zeros.scatter_add(1, heads, torch.ones_like(heads))


def run_heads(starts: Bool[Tensor, "b f p"]) -> Int[Tensor, "b f p"]:
    """Step at which each entry's run began."""
    steps = torch.arange(starts.shape[1], device=starts.device)[None, :, None]
    return torch.where(starts, steps, 0).cummax(1).values


def cut_starts(
    similarity: Float[Tensor, "f"], segments: int, threshold: float
) -> Bool[Tensor, "t"]:
    """Where a clip is cut into segments: at its least similar transitions.

    Args:
        similarity: Of each of T frames but the last to the next one, T - 1 values.
        segments: At least so many segments, >= 1; every frame is one if there are fewer.
        threshold: Transitions below it are cut whatever their number.

    Returns:
        [T] True at the first frame of each segment; equal similarities are cut at the earlier.

    Source:
        FastVID (Shen et al., 2025, arXiv:2503.11187), DySeg.
    """
    cut = (rank_of(-similarity) < segments - 1) | (similarity < threshold)
    return torch.cat([cut.new_ones(1), cut])
