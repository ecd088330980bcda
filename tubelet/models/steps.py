"""Which denoising step a forward pass belongs to, and when a run begins."""

from collections.abc import Callable

from tubelet.core.context import StepContext


class StepTracker:
    """Counts the denoising steps of one pipeline; all its transformers share one tracker.

    Hosts that tell the step are believed. For the others a smaller timestep is the next step, a
    larger one begins a new run, and the same one is the same step: another guidance branch, or
    the second evaluation of a second-order sampler. Samplers that go back up within a run are
    therefore taken for several runs.

    Args:
        on_run: Called when a run begins, before its first context is returned.
    """

    def __init__(self, on_run: Callable[[], object]) -> None:
        self._on_run = on_run
        self._step = 0
        self._timestep: float | None = None

    def observe(
        self,
        timestep: float,
        step_index: int | None = None,
        num_steps: int | None = None,
        branch: str | None = None,
    ) -> StepContext:
        """The step of a forward pass.

        Args:
            timestep: Falling within a run; any scale.
            step_index: Index of the step, 0-based, when the host tells it.
            num_steps: Steps of the run, when the host tells it.
            branch: Guidance branch; None is "cond".
        """
        last = self._timestep
        if step_index is None:
            begins = last is None or timestep > last
            step = 0 if last is None or begins else self._step + (timestep < last)
        else:
            begins = last is None or step_index < self._step
            step = step_index
        if begins:
            self._on_run()
        self._step, self._timestep = step, timestep
        return StepContext(step=step, num_steps=num_steps, branch=branch or "cond")

    def reset(self) -> None:
        """The next observation begins a run."""
        self._timestep = None
