"""Where the time up to the first token goes: marks on the device's queue, none waited for."""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tubelet.bench.measure import seconds
from tubelet.core.recipe import LayerReduction, PromptReduction, Recipe, SparsePrefill

ENCODERS = ("get_video_features", "get_image_features")
"""Methods of a host that run its vision tower and projector; one may call another."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Seconds of one answer's first token.

    Args:
        total: All of it.
        vision: Vision tower and projector, with what recipes ask of the tower.
        plan: Recipes deciding: scores and selection.
        prompt: Everything else outside of the language model: embeddings, positions, gathering
            what is kept, and what `generate` does around it.
        llm: The language model up to its last layer, without the plans made inside.
    """

    total: float
    vision: float
    plan: float
    prompt: float
    llm: float


@dataclass
class StageClock:
    """Watches one model; attach once, run as often as wanted, detach.

    Args:
        model: A video language model.
        text: Its language model.
        device: Where both are.
    """

    model: Any
    text: Any
    device: torch.device
    _marks: list[tuple[str, Any, Any]] = field(default_factory=list)
    _inside: int = 0
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def watched(self, recipe: Recipe) -> Recipe:
        """The same recipe, its decisions timed here; other stages pass through."""
        if not isinstance(recipe, PromptReduction | LayerReduction | SparsePrefill):
            return recipe
        timed, decide = copy.copy(recipe), recipe.plan

        def plan(context: Any) -> Any:
            return self._timed("plan", lambda: decide(context))

        object.__setattr__(timed, "plan", plan)
        return timed

    def __enter__(self) -> "StageClock":
        base = self.model.model
        for name in ENCODERS:
            if hasattr(base, name):
                self._wrap(base, name)
        starts: list[Any] = []
        before = self.text.register_forward_pre_hook(lambda *call: starts.append(self._now()))
        after = self.text.register_forward_hook(
            lambda *call: self._marks.append(("llm", starts.pop(), self._now()))
        )
        self._undo += [before.remove, after.remove]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def first_token(self, generate: Callable[[], Any]) -> Split:
        """Run `generate`, which makes a single token, and take its time apart."""
        self._marks.clear()
        total = seconds(generate, self.device)
        spent = dict.fromkeys(("vision", "plan", "llm"), 0.0)
        ranges = {name: (a, b) for name, a, b in self._marks}
        for name, start, end in self._marks:
            spent[name] += self._between(start, end)
        inner = sum(
            self._between(start, end)
            for name, start, end in self._marks
            if name == "plan" and self._between(ranges["llm"][0], start) >= 0
        )
        spent["llm"] -= inner
        return Split(total=total, prompt=total - sum(spent.values()), **spent)

    def _wrap(self, base: Any, name: str) -> None:
        encode = getattr(base, name)

        @functools.wraps(encode)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return encode(*args, **kwargs)
            self._inside += 1
            try:
                return self._timed("vision", lambda: encode(*args, **kwargs))
            finally:
                self._inside -= 1

        # An instance attribute hides the class's method; one may be there already.
        hidden = vars(base).get(name)
        setattr(base, name, timed)
        self._undo.append(
            lambda: delattr(base, name) if hidden is None else setattr(base, name, hidden)
        )

    def _timed(self, name: str, run: Callable[[], Any]) -> Any:
        start = self._now()
        result = run()
        self._marks.append((name, start, self._now()))
        return result

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - start
        return start.elapsed_time(end) / 1000
