"""Scores: how important, different or salient each token is."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError
from tubelet.ops.cosine import cosine


def tubelet_frames(
    pixels: Float[Tensor, "b t c h w"], tubelet: tuple[int, int, int]
) -> Float[Tensor, "b f p l d"]:
    """Cut a clip into tubelets.

    Args:
        pixels: Clip; T, H and W are multiples of the tubelet.
        tubelet: (frames, height, width) of one tubelet.

    Returns:
        [B, F, P, L, D]: F token rows in time, P places in raster order, L frames in a tubelet,
        D = channels x height x width values of one frame of one tubelet.

    Raises:
        ShapeError: The clip is not a whole number of tubelets.
    """
    batch, frames, channels, height, width = pixels.shape
    depth, tall, wide = tubelet
    if frames % depth or height % tall or width % wide:
        raise ShapeError(f"clip {frames}x{height}x{width} is not a whole number of {tubelet}")
    cut = pixels.reshape(
        batch, frames // depth, depth, channels, height // tall, tall, width // wide, wide
    )
    cut = cut.permute(0, 1, 4, 6, 2, 3, 5, 7)
    return cut.reshape(batch, frames // depth, -1, depth, channels * tall * wide)


def pixel_difference(
    earlier: Float[Tensor, "*batch l d"], later: Float[Tensor, "*batch l d"]
) -> Float[Tensor, "*batch"]:
    """Mean absolute change from the first frame of one tubelet to the last frame of another.

    Args:
        earlier, later: Tubelets as L frames of D values, in any pixel unit.

    Returns:
        The mean over D, in the same unit.

    Source:
        Run-length tokenization (Choudhury et al., 2024, arXiv:2411.05222).
    """
    return (later[..., -1, :] - earlier[..., 0, :]).abs().mean(-1)


def embedding_difference(
    x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    """Cosine distance 1 - cos(x, y), in [0, 2]. A zero vector is at distance 1 from all."""
    return (1 - cosine(x, y)).clamp(0, 2)


def class_attention(
    row: Float[Tensor, "b h n"], value_norm: Float[Tensor, "b h n"]
) -> Float[Tensor, "b n"]:
    """Significance of each token for the class token: sum over heads of A_cls,j * |v_j|.

    Args:
        row: The class token's softmax row.
        value_norm: Euclidean norm of each value vector.

    Returns:
        Non-negative significance, not normalised.

    Source:
        Adaptive token sampling (Fayyaz et al., 2022, arXiv:2111.15667).
    """
    return (row * value_norm).sum(1)


def saliency(entropy: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Focused tokens score high: negative entropy, min-max scaled, background cut to zero.

    Args:
        entropy: Attention entropy of each token in nats.

    Returns:
        [B, N] in [0, 1]; tokens below the mean get 0, the rest (e - mean) / max. A sample in
        which all entropies are equal has no ranking and gets 1 everywhere.

    Source:
        vid-TLDR (Choi et al., 2024, arXiv:2403.13347).
    """
    focus = -entropy
    low, high = focus.amin(1, keepdim=True), focus.amax(1, keepdim=True)
    spread = high - low
    unit = (focus - low) / spread.clamp(min=torch.finfo(focus.dtype).tiny)
    cut = (unit - unit.mean(1, keepdim=True)).clamp(min=0)
    scaled = cut / cut.amax(1, keepdim=True).clamp(min=torch.finfo(focus.dtype).tiny)
    return torch.where(spread > 0, scaled, torch.ones_like(scaled))


def white_noise(num: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    """[num] float32 in [0, 1): the same numbers on every device and under torch.compile.

    Args:
        num: How many, >= 1.
        seed: Any integer.

    Source:
        Integer finaliser of MurmurHash3 on (index, seed), the usual 32-bit avalanche.
    """
    mask = 0xFFFFFFFF
    x = torch.arange(num, dtype=torch.int64, device=device) + (seed * 0x9E3779B1 & mask)
    x = x & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = x ^ (x >> shift)
        # Split so that the 64-bit product cannot overflow.
        low, high = x & 0xFFFF, x >> 16
        x = (low * factor + ((high * factor & 0xFFFF) << 16)) & mask
    return (x >> 8).float() / 2**24


def rank_of(score: Float[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """Rank of each entry, 0 for the highest; equal scores rank in index order."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1)
