"""A value that changes over layers or steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tubelet.core.errors import RecipeError


@dataclass(frozen=True)
class Schedule:
    """Layer (or step) `i` of `n` to a value.

    Args:
        points: One value per layer, or with `stretch` the values at evenly spaced depths from
            first to last layer, linear in between.
        stretch: Interpolate `points` over the whole depth. Without it, layers past the end of
            `points` get 0.
    """

    points: tuple[float, ...]
    stretch: bool = True

    def __post_init__(self) -> None:
        if not self.points or not all(math.isfinite(p) for p in self.points):
            raise RecipeError(f"a schedule needs at least one finite value, got {self.points}")

    @classmethod
    def constant(cls, value: float) -> "Schedule":
        """The same value everywhere."""
        return cls((float(value),))

    @classmethod
    def linear(cls, mean: float, inflection: float = 0.0) -> "Schedule":
        """Linear with the given mean: from mean * (1 - inflection) to mean * (1 + inflection).

        -1 spends everything early, +1 late, 0 is constant (the ToMe convention).
        """
        if not -1.0 <= inflection <= 1.0:
            raise RecipeError(f"inflection must lie in [-1, 1], got {inflection}")
        return cls((mean * (1 - inflection), mean * (1 + inflection)))

    @classmethod
    def listed(cls, values: Sequence[float]) -> "Schedule":
        """One value per layer, 0 after the end."""
        return cls(tuple(float(v) for v in values), stretch=False)

    def at(self, i: int, n: int) -> float:
        """Value at position `i` of `n`, 0 <= i < n."""
        if not 0 <= i < n:
            raise IndexError(f"layer {i} of {n}")
        if not self.stretch:
            return self.points[i] if i < len(self.points) else 0.0
        if len(self.points) == 1 or n == 1:
            return sum(self.points) / len(self.points)
        place = i / (n - 1) * (len(self.points) - 1)
        left = min(int(place), len(self.points) - 2)
        share = place - left
        return self.points[left] * (1 - share) + self.points[left + 1] * share
