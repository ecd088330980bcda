"""Intervals: of a score, of a paired difference, of the gap closed between random and oracle.

A *sample* is a list with one tensor of per-clip scores in [0, 1] for each task; its value is the
mean over tasks of the mean over clips. All intervals are at 95 %.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959964
"""Half-width of a 95 % interval in standard errors."""

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for 1 to 10 degrees of freedom, two-sided 95 %."""

Sample = Sequence[Tensor]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Args:
        value: The figure.
        low, high: Ends of the interval.
        error: Standard error.
    """

    value: float
    low: float
    high: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}


def score(sample: Sample) -> Estimate:
    """Mean score with the Wilson interval.

    Of several tasks, the intervals are those of the mean of independent means, from Wilson's
    variance of each. Scores between 0 and 1 (IoU) count as fractions of a success, which makes
    their interval wider than it has to be.
    """
    parts = [_wilson(scores) for scores in sample]
    value = sum(float(scores.mean()) for scores in sample) / len(sample)
    centre = sum(middle for middle, _ in parts) / len(parts)
    half = math.sqrt(sum(width**2 for _, width in parts)) / len(parts)
    low, high = min(centre - half, value), max(centre + half, value)
    return Estimate(value, max(low, 0.0), min(high, 1.0), half / Z)


def difference(sample: Sample, reference: Sample) -> Estimate:
    """Paired difference `sample` - `reference` of scores of the same clips.

    One agreeing and one opposing pair are added per task, as Bonett and Price (2012) do for
    proportions, so that few discordant clips do not look like certainty.
    """
    centre = variance = value = 0.0
    for ours, theirs in zip(sample, reference, strict=True):
        gap = (ours - theirs).double()
        num = len(gap) + 2
        middle = float(gap.sum()) / num
        spread = (float(gap.square().sum()) + 2) / num - middle**2
        centre += middle
        value += float(gap.mean())
        variance += spread / num
    tasks = len(sample)
    error = math.sqrt(variance) / tasks
    centre, value = centre / tasks, value / tasks
    return Estimate(value, centre - Z * error, centre + Z * error, error)


def gap_closed(sample: Sample, random: Sample, oracle: Sample) -> Estimate | None:
    """(score - random) / (oracle - random) on the same clips.

    Returns:
        None when oracle - random is below two of its standard errors: there is no gap to close.
        The interval is by the delta method, paired over clips.
    """
    room = difference(oracle, random)
    if room.value < 2 * room.error or room.value <= 0:
        return None
    value = difference(sample, random).value / room.value
    variance = 0.0
    for ours, low, high in zip(sample, random, oracle, strict=True):
        rest = (ours - low).double() - value * (high - low).double()
        variance += float(rest.var(correction=0)) / len(rest)
    error = math.sqrt(variance) / len(sample) / room.value
    return Estimate(value, value - Z * error, value + Z * error, error)


def at_share(curve: Sequence[tuple[float, Tensor]], share: float) -> Tensor | None:
    """Per-clip scores of a curve at a share of tokens, linear between its nearest points.

    Args:
        curve: (measured share, per-clip scores) in any order.
        share: Where to read it.

    Returns:
        None outside the measured range (a hundredth of a share is forgiven at the ends).
    """
    points = sorted(curve, key=lambda point: point[0])
    if not points or not points[0][0] - 0.01 <= share <= points[-1][0] + 0.01:
        return None
    for (left, a), (right, b) in itertools.pairwise(points):
        if left <= share <= right:
            along = 0.0 if right == left else (share - left) / (right - left)
            return a * (1 - along) + b * along
    return points[0][1] if share < points[0][0] else points[-1][1]


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over training seeds with Student's interval; needs at least two."""
    wide = torch.tensor(values, dtype=torch.float64)
    error = float(wide.std()) / math.sqrt(len(values))
    free = len(values) - 1
    t = _T95[free - 1] if free <= len(_T95) else Z
    mean = float(wide.mean())
    return Estimate(mean, mean - t * error, mean + t * error, error)


def _wilson(scores: Tensor) -> tuple[float, float]:
    """Centre and half-width of Wilson's interval."""
    num, share = len(scores), float(scores.double().mean())
    spread = Z**2 / num
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / num + spread / (4 * num)) / (1 + spread)
    return centre, half
