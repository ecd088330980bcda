"""Random draws of one batch of clips, all from one seed and on one device."""

import zlib
from functools import cache

import torch
from torch import Tensor

TEST_SEED = 2**40
"""Seeds from here on are reserved for testing: no training run may use them."""

_STREAMS = 2**31


class Dice:
    """A seeded source of tensors on a device.

    Args:
        name: Each name makes something else of the same seeds.
        seed: From 0.
        device: Where the tensors are drawn.

    Notes:
        The CPU generator of torch reads 32 bits of a seed, so the first 2**31 seeds on either side
        of `TEST_SEED` are told apart, and a test seed never meets a training seed.
    """

    def __init__(self, name: str, seed: int, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device=device)
        stream = (seed ^ zlib.crc32(name.encode())) % _STREAMS
        self._generator.manual_seed(stream + (_STREAMS if seed >= TEST_SEED else 0))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 in [low, high)."""
        unit = torch.rand(shape, generator=self._generator, device=self.device)
        return unit * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """float32 of mean 0 and variance 1."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def integers(self, count: int, *shape: int) -> Tensor:
        """int64 in [0, count)."""
        return torch.randint(count, shape, generator=self._generator, device=self.device)

    def balanced(self, count: int, batch: int) -> Tensor:
        """int64 `[batch]` in [0, count): each equally often, to within one, in random order."""
        values = (torch.arange(batch, device=self.device) + self.integers(count, 1)) % count
        return values[self.uniform(0, 1, batch).argsort(stable=True)]

    def heading(self, *shape: int) -> Tensor:
        """Unit vectors `[*shape, 2]` (x, y) in any direction."""
        return unit_vector(self.uniform(0, 2 * torch.pi, *shape))


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A tensor of fixed numbers; copied to the device only once, because the copy waits for it."""
    return torch.tensor(values, device=device)


def unit_vector(angle: Tensor) -> Tensor:
    """(x, y) of an angle in radians; y points down, as in images."""
    return torch.stack([angle.cos(), angle.sin()], dim=-1)
