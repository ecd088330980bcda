"""Attention recipes at work in a generator: plans, warm-up, reuse, compensation, verification."""

from collections.abc import Callable, Sequence

from torch import Tensor

from tubelet.core.context import Site, StepContext
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.recipe import Recipe


class AttentionRuntime:
    """What an adapter of a generator keeps while recipes are on a model.

    The adapter calls `begin` before each forward pass of the host, `attend` in place of each
    attention call at a site, and `end_run` when a run (a call of the pipeline) is over.
    """

    def __init__(self, recipes: Sequence[Recipe], sites: Sequence[Site], handle: Handle) -> None:
        raise NotImplementedError

    def begin(
        self, grid: TokenGrid, step: StepContext | None, lengths: Sequence[int] | None = None
    ) -> None:
        """A forward pass begins; step 0 of a branch begins a new run.

        Args:
            grid: Geometry of the sequence that the attention calls will have.
            step: Denoising step and branch; None when unknown.
            lengths: Real tokens of each sample, the padding being at the end; None without any.
        """
        raise NotImplementedError

    def attend(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, host: Callable[[], Tensor]
    ) -> Tensor:
        """Attention output [B, H, N, D] for q, k, v [B, H, N, D]; `host()` computes it as before."""
        raise NotImplementedError

    def end_run(self) -> None:
        """Forget everything that belongs to the run."""
        raise NotImplementedError
