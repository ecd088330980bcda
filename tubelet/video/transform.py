"""Resizing and normalisation of frames, without torchvision."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tubelet.core.errors import ShapeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROPS = ("center", "none")


def resize(frames: Tensor, size: tuple[int, int], crop: str = "center") -> Tensor:
    """Resizes frames with an antialiased bilinear filter.

    Args:
        frames: ``[T, 3, H, W]``, uint8 or floating point.
        size: ``(height, width)`` of the result in pixels.
        crop: ``"center"`` scales until the target is covered and cuts what hangs over, equally on
            both sides; ``"none"`` stretches both axes on their own and keeps every pixel.

    Returns:
        ``[T, 3, height, width]`` of the same dtype and value range as ``frames``.

    Raises:
        ShapeError: wrong shape or dtype, a size below 1, or an unknown ``crop``.
    """
    _check_frames(frames)
    check_size(size, crop)
    target = (int(size[0]), int(size[1]))
    if tuple(frames.shape[2:]) == target:
        return frames
    covered = target if crop == "none" else _covering(tuple(frames.shape[2:]), target)
    # One frame at a time: a float copy of a whole clip is four times its size.
    return torch.stack([_resize_one(frame, covered, target) for frame in frames])


def normalise(
    frames: Tensor,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """Turns bytes into the values that image backbones were trained on.

    Args:
        frames: uint8 ``[T, 3, H, W]``, 0 to 255.
        mean: mean of each channel on the 0 to 1 scale.
        std: standard deviation of each channel on the 0 to 1 scale, above 0.

    Returns:
        float32 ``[T, 3, H, W]``: ``(frames / 255 - mean) / std``.

    Raises:
        ShapeError: ``frames`` is not uint8 ``[T, 3, H, W]``, or the statistics do not fit.
    """
    _check_frames(frames)
    if frames.dtype != torch.uint8:
        raise ShapeError(f"frames must be uint8 (0 to 255), got {frames.dtype}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ShapeError(f"mean and std need three values, std above 0; got {mean} and {std}")
    shift = torch.tensor(mean, dtype=torch.float32, device=frames.device).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=frames.device).view(3, 1, 1)
    return (frames.float() / 255.0 - shift) / scale


def check_size(size: tuple[int, int], crop: str) -> None:
    """Checks a target size and crop mode.

    Args:
        size: ``(height, width)`` in pixels.
        crop: ``"center"`` or ``"none"``.

    Raises:
        ShapeError: a side is below 1 or not an integer, or the mode is unknown.
    """
    if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ShapeError(f"size must be (height, width) in whole pixels from 1, got {size}")
    if crop not in CROPS:
        raise ShapeError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}")


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ShapeError(f"frames must have shape [T, 3, H, W], got {list(frames.shape)}")
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ShapeError(f"frames must be uint8 or floating point, got {frames.dtype}")


def _covering(source: tuple[int, ...], target: tuple[int, int]) -> tuple[int, int]:
    """Size with the shape of ``source`` that covers ``target`` as tightly as possible."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return (
        max(target[0], round(source[0] * scale)),
        max(target[1], round(source[1] * scale)),
    )


def _resize_one(frame: Tensor, covered: tuple[int, int], target: tuple[int, int]) -> Tensor:
    # Half precision has no antialiased kernel on every device, and bytes would round twice.
    work = frame if frame.dtype == torch.float64 else frame.float()
    if tuple(frame.shape[1:]) != covered:
        work = interpolate(work[None], size=covered, mode="bilinear", antialias=True)[0]
    top = (covered[0] - target[0]) // 2
    left = (covered[1] - target[1]) // 2
    work = work[:, top : top + target[0], left : left + target[1]]
    if frame.dtype == torch.uint8:
        return work.round().clamp(0, 255).to(torch.uint8)
    return work.to(frame.dtype)
