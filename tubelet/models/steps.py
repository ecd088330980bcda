"""Which denoising step a forward pass belongs to, and when a run begins."""

from collections.abc import Callable

from tubelet.core.context import StepContext


class StepTracker:
    """Counts the denoising steps of one pipeline; all its transformers share one tracker.

    Hosts that tell the step are believed. For the others a smaller timestep is the next step, a
    larger one begins a new run, and the same one is the same step: another guidance branch, or
    the second evaluation of a second-order sampler. Samplers that go back up within a run are
    therefore taken for several runs. Passes without a named branch are numbered within a step, so
    that the branches of loops that name none do not share state.

    Args:
        on_run: Called when a run begins, before its first context is returned.
    """

    def __init__(self, on_run: Callable[[], object]) -> None:
        self._on_run = on_run
        self._step = 0
        self._timestep: float | None = None
        self._video: tuple[int, int, int] | None = None
        self._seen: list[str | None] = []

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
            branch: Guidance branch; None where the host names none.
        """
        last = self._timestep
        if step_index is None:
            begins = last is None or timestep > last
            step = 0 if last is None or begins else self._step + (timestep < last)
        else:
            begins = last is None or step_index < self._step
            step = step_index
        if step == 0 and branch is not None and branch in self._seen:
            # No sampler looks twice at its first step: the run before was broken off.
            begins = True
        if begins or (step, timestep) != (self._step, last):
            self._seen = []
        if begins:
            self._on_run()
        name = f"pass {self._seen.count(None)}" if branch is None else branch
        self._seen.append(branch)
        self._step, self._timestep = step, timestep
        return StepContext(step=step, num_steps=num_steps, branch=name)

    def see(self, video: tuple[int, int, int]) -> None:
        """A pass has this geometry; another one than before begins a run."""
        if video != self._video:
            self.reset()
        self._video = video

    def reset(self) -> None:
        """The next observation begins a run."""
        self._timestep, self._seen = None, []
