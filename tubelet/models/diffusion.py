"""Facts about video transformers in diffusers, and how recipes are put on one or two of them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tubelet.core.context import Site, SiteKind, StepContext
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import CAPABILITIES, Handle
from tubelet.core.recipe import Recipe
from tubelet.models import diffusion_hooks
from tubelet.models.attend_op import CurrentCall, Place, close_place, open_place, sdpa
from tubelet.models.attention_runtime import AttentionRuntime
from tubelet.models.steps import StepTracker

Layout = Callable[[Any, Mapping[str, Any]], tuple[TokenGrid, list[int] | None]]
"""Geometry of a forward pass and the real tokens of each sample, from config and arguments."""

Processor = Callable[[Any, Tensor], Any]
"""tubelet's processor for a place, from the host's processor and the number of the place."""

Clock = Callable[[], tuple[float | None, int | None]]
"""Timestep and number of steps that a pipeline tells, None where it does not."""

OFFERED = {"attention", "joint", "generator"}
"""Capabilities of generators, unless a family says otherwise."""

NO_TOKENS = "recipes that change tokens do not run on generators yet"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One list of blocks.

    Args:
        blocks: Path of the list in the model.
        attention: Path of the video self-attention in a block.
        kind: What it attends over.
    """

    blocks: str
    attention: str
    kind: SiteKind = "joint"


def through_dispatcher(processor: Any, number: Tensor) -> Any:
    """The host's own processor, sent to tubelet by diffusers' attention dispatcher.

    A processor hands two values of its own to the dispatcher: the back-end, and what it calls
    its parallel configuration, which goes to the back-end unread. The latter takes the number of
    the place, so no code of the processor is copied or wrapped, and no argument can get lost.
    Families whose processors call torch themselves, or build an N x N mask first (CogVideoX,
    Mochi, Allegro, HunyuanVideo-1.5), bring a processor of tubelet's instead.
    """
    routed = copy.copy(processor)
    routed._attention_backend = diffusion_hooks.backend()
    routed._parallel_config = number
    return routed


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapter:
    """Facts about a family of video transformers in diffusers.

    Args:
        family: Name for people.
        classes: Model classes it serves.
        stacks: Block lists in the order they run; layers count through all of them.
        processor: Class name of the attention processor that the host comes with.
        layout: Geometry of a forward pass; None for families that take no attention recipe.
        route: How the attention of a place reaches tubelet.
        ascending: Timesteps rise within a run.
        missing: Capabilities the family lacks beside those on tokens, with reasons.
    """

    family: str
    classes: tuple[str, ...]
    stacks: tuple[Stack, ...]
    processor: str
    layout: Layout | None = None
    route: Processor = through_dispatcher
    ascending: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)
    fused_by_tubelet: bool = False

    def variants(self) -> dict[str, dict[str, str]]:
        """What the family lacks, by its name."""
        tokens = dict.fromkeys(CAPABILITIES.keys() - OFFERED, NO_TOKENS)
        return {self.family: {**tokens, **self.missing}}

    def lacks(self, model: Any) -> dict[str, str]:
        """Capabilities that this model does not offer, each with the reason."""
        stated = self.variants()[self.family]
        reason = None if "attention" in self.missing else self._foreign(model)
        return stated if reason is None else {**stated, "attention": reason}

    def _foreign(self, model: Any) -> str | None:
        """What keeps the attention of this very model from being replaced, or None."""
        for site in self.sites(model):
            processor = model.get_submodule(site.name).processor
            if type(processor).__name__ != self.processor:
                return (
                    f"{site.name} has the processor {type(processor).__name__} instead of "
                    f"{self.processor}; put that back (unfuse projections, unload adapters) first"
                )
            if getattr(processor, "_parallel_config", None) is not None:
                return "context parallelism is enabled, and recipes need whole sequences"
        return None

    def sites(self, model: Any) -> list[Site]:
        """The self-attention of every video block; refiners and cross-attention are left out."""
        paths: list[tuple[str, SiteKind]] = [
            (f"{stack.blocks}.{index}.{stack.attention}", stack.kind)
            for stack in self.stacks
            for index in range(len(model.get_submodule(stack.blocks)))
        ]
        return [
            Site(name=path, layer=layer, num_layers=len(paths), kind=kind)
            for layer, (path, kind) in enumerate(paths)
        ]

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        """Hook the recipes in."""
        install({"": (self, model)}, recipes, handle)


def install(
    parts: Mapping[str, tuple[DiffusionAdapter, Any]],
    recipes: Sequence[Recipe],
    handle: Handle,
    clock: Clock = lambda: (None, None),
) -> None:
    """Hook recipes into the transformers of one pipeline, which share runs, steps and state.

    Args:
        parts: Adapter and transformer by the prefix of their sites.
        recipes: What decides.
        handle: Learns how to undo it all.
        clock: What the pipeline tells about the step at hand.
    """
    sites = {prefix: prefixed(prefix, *part) for prefix, part in parts.items()}
    runtime = AttentionRuntime(recipes, [s for group in sites.values() for s in group], handle)
    tracker = StepTracker(runtime.end_run)
    handle.on_remove(runtime.end_run)
    for prefix, (adapter, model) in parts.items():
        host = _Host(adapter, model, runtime, tracker, handle, clock)
        host.take_over(sites[prefix], prefix)


def prefixed(prefix: str, adapter: DiffusionAdapter, model: Any) -> list[Site]:
    """Sites of a part, named by their paths in the whole."""
    return [replace(site, name=prefix + site.name) for site in adapter.sites(model)]


class _Host:
    """One transformer while recipes are on it."""

    def __init__(
        self,
        adapter: DiffusionAdapter,
        model: Any,
        runtime: AttentionRuntime,
        tracker: StepTracker,
        handle: Handle,
        clock: Clock,
    ) -> None:
        self.adapter, self.model, self.handle, self.clock = adapter, model, handle, clock
        self.runtime, self.tracker = runtime, tracker
        self.call = CurrentCall()
        self.processors: list[tuple[nn.Module, Any]] = []

    def take_over(self, sites: list[Site], prefix: str) -> None:
        """Put tubelet's processors in and the hook on; each registers its own undo."""
        for site in sites:
            module = self.model.get_submodule(site.name.removeprefix(prefix))
            before = module.processor
            place = self._open(site, before)
            module.processor = self.adapter.route(before, place.number)
            self.processors.append((module, module.processor))
            self.handle.on_remove(lambda m=module, p=before: setattr(m, "processor", p))
        self.handle.on_remove(diffusion_hooks.hook(self.model, self.begin, self.end_run))
        # Called after errors too, with None instead of a result.
        left = self.model.register_forward_hook(self.leave, always_call=True)
        self.handle.on_remove(left.remove)

    def _open(self, site: Site, processor: Any) -> Place:
        dispatched = hasattr(processor, "_attention_backend")
        dense = diffusion_hooks.dispatcher(processor._attention_backend) if dispatched else sdpa
        place = open_place(site, self.call, self.runtime, dense)
        self.handle.on_remove(lambda: close_place(place))
        return place

    def begin(self, arguments: Mapping[str, Any], context: Any) -> None:
        """A forward pass begins with these arguments."""
        self._check_processors()
        assert self.adapter.layout is not None
        grid, lengths = self.adapter.layout(self.model.config, arguments)
        self.tracker.see((grid.frames, grid.height, grid.width))
        self.call.grid, self.call.lengths = grid, lengths
        self.runtime.begin(grid, self._step(arguments["timestep"], context), lengths)

    def _step(self, timestep: Tensor, context: Any) -> StepContext:
        told, num_steps = self.clock()
        if told is None:
            # Tokens that condition (a first frame) have timestep 0 among their own.
            told = float(timestep.max())
            told = -told if self.adapter.ascending else told
        index = getattr(context, "step_index", None)
        given = getattr(context, "num_inference_steps", None)
        count = given or num_steps or self.handle.options.num_steps
        return self.tracker.observe(told, index, count, getattr(context, "name", None))

    def _check_processors(self) -> None:
        member = diffusion_hooks.backend()
        for module, ours in self.processors:
            changed = module.processor is not ours
            if hasattr(ours, "_attention_backend"):
                parallel = not isinstance(ours._parallel_config, Tensor)
                changed |= ours._attention_backend != member or parallel
            if changed:
                raise UnsupportedError(
                    f"the attention processors or back-end of this {type(self.model).__name__} "
                    "were changed under recipes; remove() the recipes first"
                )

    def leave(self, model: Any, given: Any, result: Any) -> None:
        """A forward pass is over; one that failed breaks its run off."""
        self.call.grid = self.call.lengths = None
        if result is None:
            self.end_run()

    def end_run(self) -> None:
        """The pipeline is done."""
        self.tracker.reset()
        self.call.grid = self.call.lengths = None
        self.runtime.end_run()


def patched(shape: Sequence[int], patch: Sequence[int], **extra: int) -> TokenGrid:
    """Grid of latents (frames, height, width) cut into patches of that size."""
    frames, height, width = (n // p for n, p in zip(shape, patch, strict=True))
    return TokenGrid(frames=frames, height=height, width=width, **extra)


def real_tokens(grid: TokenGrid, text: Tensor) -> list[int] | None:
    """Video and text tokens that are real in each sample; None when all are.

    Args:
        grid: Video first, then text.
        text: [B] int64, real text tokens.
    """
    lengths = [grid.num_video + n for n in text.tolist()]
    return None if all(n == grid.num_tokens for n in lengths) else lengths


def needs_valid_first(mask: Tensor, what: str) -> None:
    """Refuse a [B, N] mask with real tokens behind padding.

    Raises:
        ShapeError: It has some.
    """
    if mask.ndim != 2 or bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ShapeError(f"{what} must be [batch, tokens] with all padding behind the real tokens")
