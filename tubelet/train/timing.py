"""What a loop measures while it runs: seconds, speed, and sums that stay on the device."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MEASURED_STEPS = 20
"""Timed steps, at least, from which the number of steps is fixed."""


Reading = tuple[dict[str, tuple[float, int]], int | None]
"""Sum and count by name, and the first step that was not finite."""


class Stopwatch:
    """Seconds while running; the device's queue is drained when it starts and stops.

    Args:
        device: Whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | None = None
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far; work that is still queued is not in it."""
        running = time.perf_counter() - self._began if self._began is not None else 0.0
        return self._before + running

    def drained(self) -> float:
        """Seconds once all queued work is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self.seconds

    def resume(self) -> None:
        """Run on."""
        self.drained()
        self._began = time.perf_counter()

    def pause(self) -> bool:
        """Stand still; returns whether it was running."""
        running = self._began is not None
        self._before, self._began = self.drained(), None
        return running

    def add(self, seconds: float) -> None:
        """Count time of an earlier part of the run."""
        self._before += seconds


class SpeedMeasure:
    """How many steps fit a budget, from blocks of 1, 2, 4, ... steps of which the last one counts.

    It takes at least `MEASURED_STEPS` steps and 1 % of the budget (10 s are enough), but ends
    when a tenth of the budget is gone.

    Args:
        minutes: The budget.
    """

    def __init__(self, minutes: float) -> None:
        self._budget = 60 * minutes
        self._steps, self._seconds, self._block = 0, 0.0, 1

    @property
    def next_look(self) -> int:
        """Timed steps at which the block ends."""
        return self._steps + self._block

    def look(self, steps: int, seconds: float) -> int | None:
        """Further steps that fit, at the end of a block; None while it goes on.

        Args:
            steps: Timed steps so far.
            seconds: What they took, the device's queue drained.
        """
        per_step = (seconds - self._seconds) / (steps - self._steps)
        settled = steps >= MEASURED_STEPS and seconds >= min(0.01 * self._budget, 10.0)
        if settled or seconds >= 0.1 * self._budget:
            return max(0, int((self._budget - seconds) / per_step))
        self._steps, self._seconds, self._block = steps, seconds, 2 * self._block
        return None


class Tally:
    """Sums of losses and metrics between two log lines, without waiting for the device.

    Args:
        device: Where they are summed.
    """

    _NEVER = 2**62

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first_bad = torch.full((), self._NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, values: Mapping[str, Tensor], finite: Sequence[str]) -> None:
        """Add 0-dim tensors; those named in `finite` must be, or the step is remembered."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1
        fine = torch.stack([values[name].detach().float() for name in finite]).isfinite().all()
        self._first_bad = torch.where(fine, self._first_bad, self._first_bad.clamp(max=step))

    def read(self) -> Reading:
        """What was added so far. Waits for the device."""
        device = self._first_bad.device
        sums = torch.stack([total.to(device) for total in self._sums.values()]).tolist()
        totals = {
            name: (total, self._counts[name]) for name, total in zip(self._sums, sums, strict=True)
        }
        bad = int(self._first_bad)
        return totals, None if bad == self._NEVER else bad


def merged_means(readings: Sequence[Reading]) -> tuple[dict[str, float], int | None]:
    """Means over steps and processes, and the first step that was not finite in any of them."""
    means = {}
    for name in dict.fromkeys(name for totals, _ in readings for name in totals):
        parts = [totals[name] for totals, _ in readings if name in totals]
        means[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
    return means, min((bad for _, bad in readings if bad is not None), default=None)
