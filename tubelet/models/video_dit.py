"""tubelet's own video diffusion transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.handle import CAPABILITIES, Handle
from tubelet.core.recipe import Recipe
from tubelet.kernels.attention import attention
from tubelet.models.attend_op import CurrentCall, attend, close_place, open_place
from tubelet.models.attention_runtime import AttentionRuntime
from tubelet.models.diffusion import NO_TOKENS, OFFERED
from tubelet.models.steps import StepTracker


@dataclass(frozen=True)
class _Route:
    """Sends the calls of one attention module to its place."""

    number: Tensor

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, host: Any
    ) -> Tensor:
        return attend(q, k, v, self.number, scale).transpose(1, 2)


class VideoDiTAdapter:
    """Attention through the modules' own `runtime` attribute; steps from the time they are given.

    The model is given no number of steps; recipes with a share of dense steps need
    accelerate(..., num_steps=).
    """

    family = "VideoDiT"
    classes = ("VideoDiT",)
    fused_by_tubelet = False

    def variants(self) -> dict[str, dict[str, str]]:
        """What it lacks, by the family's name."""
        return {self.family: dict.fromkeys(CAPABILITIES.keys() - OFFERED, NO_TOKENS)}

    def lacks(self, model: Any) -> dict[str, str]:
        """Capabilities that it does not offer, each with the reason."""
        return self.variants()[self.family]

    def sites(self, model: Any) -> list[Site]:
        """The attention of every block."""
        num = len(model.blocks)
        return [
            Site(name=f"blocks.{i}.attention", layer=i, num_layers=num, kind="joint")
            for i in range(num)
        ]

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        """Hook the recipes in."""
        sites = self.sites(model)
        runtime, call = AttentionRuntime(recipes, sites, handle), CurrentCall()
        tracker = StepTracker(runtime.end_run)
        handle.on_remove(runtime.end_run)
        for site in sites:
            place = open_place(site, call, runtime, _dense)
            handle.on_remove(lambda place=place: close_place(place))
            module = model.get_submodule(site.name)
            module.runtime = _Route(place.number)
            handle.on_remove(lambda module=module: setattr(module, "runtime", None))

        def begin(module: Any, given: tuple[Any, ...]) -> None:
            noisy, time = given[:2]
            grid = model.grid(noisy)
            tracker.see((grid.frames, grid.height, grid.width))
            # Time rises from noise to data; both branches of guidance come as one batch.
            step = tracker.observe(-float(time[0]), None, handle.options.num_steps)
            call.grid = grid
            runtime.begin(grid, step)

        def leave(module: Any, given: Any, result: Any) -> None:
            call.grid = None
            if result is None:
                tracker.reset()
                runtime.end_run()

        for hook in (
            model.register_forward_pre_hook(begin),
            # Called after errors too, with None instead of a result.
            model.register_forward_hook(leave, always_call=True),
        ):
            handle.on_remove(hook.remove)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return attention(q, k, v, scale=scale)[0]


ADAPTER = VideoDiTAdapter()
