"""The runtime that shortens prompts of a video language model.

The host is called with physically fewer tokens. Its placeholders are written over by tubelet's
own embeddings, so a call may be a whole prompt, a chunk of it, the whole prompt again (without a
cache) or an answer's next token, for one or several beams of each prompt: what has to be written
follows from the columns of the call alone.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.handle import Handle
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import LayerReduction, PromptReduction
from tubelet.kernels.selection import TOOLS
from tubelet.models.layer_runtime import Cut, LayerRuntime
from tubelet.models.prompt import (
    Prompt,
    VideoPlace,
    VideoRows,
    shortened,
    side_by_side,
    text_positions,
    unreduced,
)
from tubelet.models.vision_statistics import VisionWatch
from tubelet.models.whole_prompt import WholePrompt, asked, inferred_mask

if TYPE_CHECKING:
    from tubelet.models.video_llm import VideoLLMAdapter

STATE = "_tubelet_run"
"""Attribute of a key-value cache: the run that filled it."""


class Run:
    """One prompt from its first token to the last of its answer, under some recipes."""

    def __init__(self, prompt: Prompt, recipes: tuple[str, ...]) -> None:
        self.prompt, self.recipes = prompt, recipes
        self.cuts: dict[int, Cut] = {}
        self.assigned: dict[int, TokenAssignment] = {}
        """Where the video tokens of each prompt that has any went so far."""
        self.vision: dict[int, dict[tuple[str, int], Tensor]] = {}
        """Statistics [1, N] or [1, N, C] of the original video tokens of each prompt."""
        self.encoding: tuple[Sequence[VideoPlace], Mapping[str, Any]] | None = None
        """Videos whose statistics are still to come."""
        self.reported = False

    def see(
        self, places: Sequence[VideoPlace], seen: Sequence[dict[tuple[str, int], Tensor]]
    ) -> None:
        """Keep the statistics of all videos, those of one prompt one behind the other."""
        for row in {place.sample for place in places}:
            own = [v for p, v in zip(places, seen, strict=True) if p.sample == row]
            self.vision[row] = {key: torch.cat([v[key] for v in own], 1) for key in own[0]}

    def assign(self, places: Sequence[VideoPlace], plans: Sequence[TokenAssignment | None]) -> None:
        """Start with the plans of all videos."""
        device = self.prompt.ids.device
        for row in dict.fromkeys(place.sample for place in places):
            self.assigned[row] = side_by_side(
                [
                    plan or TokenAssignment.identity(1, place.grid.num_video, device)
                    for place, plan in zip(places, plans, strict=True)
                    if place.sample == row
                ]
            )


class PromptRuntime:
    """Recipes at work on one model."""

    def __init__(
        self,
        adapter: "VideoLLMAdapter",
        model: Any,
        prompt_recipes: Sequence[PromptReduction],
        layer_recipes: Sequence[LayerReduction],
        handle: Handle,
        takes_text: bool = False,
    ) -> None:
        self.adapter, self.model, self.handle = adapter, model, handle
        self.recipe = prompt_recipes[0] if prompt_recipes else None
        self.sites = adapter.sites(model)
        self.text = adapter.text_model(model)
        self.layers = LayerRuntime(adapter, model, layer_recipes, self.sites[1:], handle)
        wanted = self.layers.vision | (frozenset() if self.recipe is None else self.recipe.vision)
        self.vision = VisionWatch(adapter.tower, model.model, wanted, handle)
        self.run: Run | None = None
        self.takes_text = takes_text
        """Whether a prompt may go without a video, or have images beside it."""
        self.checks: list[Callable[[Mapping[str, Any], Mapping[str, Any]], None]] = []
        """What else may refuse a generation: other arguments of `generate`, then its inputs."""
        self.endings: list[Callable[[], None]] = [self.layers.leave, self.vision.stop]
        """What forgets a generation, also one that was interrupted."""
        self.generating: int | None = None
        """Thread of the generation that runs."""
        self._turn = threading.Lock()
        self._entered = False
        """Whether a direct call has begun that has not reached the base model yet."""
        self.written: tuple[Tensor, Tensor] | None = None

    # Hooks

    def hook(self) -> None:
        """Put everything on; each change registers its own undo."""
        self._replace_generate()
        hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            # Called after errors too, with None instead of a result.
            self.model.register_forward_hook(self._leave, always_call=True),
            self.model.model.register_forward_pre_hook(self._write, with_kwargs=True),
            self.text.register_forward_pre_hook(self._enter_text, with_kwargs=True),
        ]
        hooks.append(
            self.text.register_forward_hook(lambda *call: self.layers.leave(), always_call=True)
        )
        for registered in hooks:
            self.handle.on_remove(registered.remove)
        self.layers.hook()

    def _replace_generate(self) -> None:
        original = self.model.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self.generate(original, args, kwargs)

        # An instance attribute hides the class's method until it is deleted.
        self.model.generate = generate
        self.handle.on_remove(lambda: delattr(self.model, "generate"))

    # Generation

    @torch.no_grad()
    def generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`generate` on the shorter prompt; the sequences it returns hold the whole prompt."""
        bound = inspect.signature(original).bind(*args, **kwargs)
        given = dict(bound.arguments)
        inputs = given.pop("kwargs", {})
        if given.get("inputs") is not None:
            inputs["input_ids"] = given.pop("inputs")
        if not self._turn.acquire(blocking=False):
            raise UnsupportedError(
                "this model is generating already; its recipes remember one prompt at a time"
            )
        try:
            self._check_generation(given, inputs)
            inputs |= inferred_mask(self.model, given, inputs)
            ids = inputs.get("input_ids")
            run, inputs = self._begin(inputs)
            whole = WholePrompt(ids, run.prompt)
            if run.prompt.features is not None:
                inputs |= whole.lengths(self.model, given, inputs)
                given = whole.shown(given)
            self._attach(run, (inputs.get("past_key_values"),))
            self.run, self.generating = run, threading.get_ident()
            return self._with_whole_prompt(run, whole, original(**given, **inputs))
        finally:
            self.generating = None
            self._forget()
            self._turn.release()

    def _forget(self) -> None:
        """No call runs; hooks that end one are not called when the user interrupts it."""
        self.run = None
        for end in self.endings:
            end()

    def _check_generation(self, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        if _past(inputs.get("past_key_values")) > 0:
            raise UnsupportedError(
                "generate() from a cache that is filled already cannot be shortened: its tokens "
                "and those of the prompt do not match; start from an empty cache"
            )
        if given.get("assistant_model") is not None:
            raise UnsupportedError(
                "a draft model would get the shortened prompt without its video; use "
                "prompt_lookup_num_tokens for assisted decoding, or remove() the recipes"
            )
        if asked(self.model, given, inputs, "guidance_scale") not in (None, 1):
            raise UnsupportedError(
                "guidance_scale runs a second prompt beside that with the video; leave it out, or "
                "remove() the recipes"
            )
        self.layers.check_generation(given.get("generation_config"), inputs)
        for check in self.checks:
            check(given, inputs)

    def _with_whole_prompt(self, run: Run, whole: WholePrompt, result: Any) -> Any:
        """What `generate` returned, with the prompt as the user gave it in front."""
        if isinstance(result, Tensor):
            return whole.in_front(result)
        result.sequences = whole.in_front(result.sequences)
        self._attach(run, result)
        return result

    def _attach(self, run: Run, result: Any) -> None:
        parts = result if isinstance(result, tuple) else [getattr(result, "past_key_values", None)]
        for part in parts:
            if hasattr(part, "get_seq_length"):
                setattr(part, STATE, run)

    # Direct calls

    def _enter(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.generating == threading.get_ident():
            return None
        if self.generating is not None:
            raise UnsupportedError(
                "this model is generating in another thread; its recipes remember one prompt at a "
                "time"
            )
        self._entered = True
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if _past(cache) > 0:
            self.run = getattr(cache, STATE, None)
            if self.run is None and self.checks:
                raise UnsupportedError(
                    "this cache was filled without the recipes; start from an empty one"
                )
            return None if self.run is None else ((), self._continued(self.run, kwargs))
        if self.layers.recipes and kwargs.get("labels") is not None:
            raise UnsupportedError(
                "recipes inside the language model drop tokens that labels are for; leave labels "
                "out, or shorten prompts in front of it"
            )
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise UnsupportedError(
                "logits_to_keep names places that a shortened prompt no longer has; give the "
                "number of places at its end"
            )
        self.run, kwargs = self._begin(kwargs)
        return (), kwargs

    def _leave(self, model: Any, args: Any, result: Any) -> None:
        if self.generating is not None:
            return
        if self.run is not None:
            self._attach(self.run, result)
        self._entered = False
        self._forget()

    def _continued(self, run: Run, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call that goes on behind a prompt: its mask and positions know the shorter one."""
        self._check_continued(run, kwargs)
        prompt, ids = run.prompt, kwargs["input_ids"]
        past, num = _past(kwargs["past_key_values"]), ids.shape[1]
        copies, gone = len(ids) // prompt.batch, prompt.width - prompt.length
        mask = kwargs.get("attention_mask")
        if mask is None and prompt.features is not None and not prompt.full:
            # Padding that the user does not know of.
            mask = ids.new_ones(len(ids), past + gone + num, dtype=torch.long)
        if mask is not None and mask.shape[1] == past + gone + num:
            front = prompt.mask[:, :past].repeat_interleave(copies, 0).to(mask.dtype)
            mask = torch.cat([front, mask[:, front.shape[1] + gone :]], dim=1)
            kwargs["attention_mask"] = mask
        if kwargs.get("position_ids") is None and prompt.positions is not None:
            steps = torch.arange(num, device=ids.device) + 1 + past - prompt.length
            # The last token of a prompt stands last, but padding may be behind it.
            last = prompt.positions.amax(-1, keepdim=True).repeat_interleave(copies, -2)
            kwargs["position_ids"] = last + steps
        return kwargs

    def _check_continued(self, run: Run, kwargs: Mapping[str, Any]) -> None:
        if run.recipes != self.handle.report().recipes:
            raise UnsupportedError(
                f"this cache was filled under {', '.join(run.recipes)}; go on with the same "
                "recipes, or start from an empty one"
            )
        held = [self.adapter.pixels, self.adapter.image_pixels]
        if not self.takes_text and any(kwargs.get(name) is not None for name in held if name):
            raise UnsupportedError(
                "this cache holds a prompt already, behind which recipes take no further video or "
                "images; give all of them in one prompt"
            )
        past = _past(kwargs["past_key_values"])
        if past < run.prompt.length and bool(run.prompt.written[:, past:].any()):
            raise UnsupportedError(
                "this cache was cut back into its video; start from an empty one"
            )

    # Prompts

    def _begin(self, inputs: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
        """A new run and the inputs of the shorter prompt."""
        whole, places = self._understand(inputs)
        report = self.handle.report()
        report.start_run(float(whole.mask.sum()) / whole.batch)
        if places:
            self.handle.record_grid(places[0].grid)
        plans: list[TokenAssignment | None] = [None] * len(places)
        videos: list[VideoRows] = []
        run = Run(whole, report.recipes)
        if self.recipe is not None:
            videos, seen = self._encode(places, inputs)
            run.see(places, seen)
            plans = self._decide(self.recipe, whole, places, videos, seen)
        elif self.layers.vision:
            # The host encodes by itself; what was asked of its tower is read behind that.
            self.vision.start()
            run.encoding = (places, inputs)
        run.assign(places, plans)
        self.handle.record_assignment(list(run.assigned.values()))
        if all(plan is None for plan in plans):
            return run, inputs
        assert self.recipe is not None
        whole = replace(whole, positions=self._positions(whole, inputs))
        run.prompt = shortened(
            whole, places, videos, plans, policy=self.recipe.positions, pad=self._padding()
        )
        return run, self._short_inputs(run.prompt, inputs)

    def _understand(self, inputs: Mapping[str, Any]) -> tuple[Prompt, list[VideoPlace]]:
        """The prompts as given and where their videos are.

        Raises:
            UnsupportedError: There is nothing to shorten, or what is given cannot be.
            ShapeError: Videos and placeholders do not match.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or inputs.get("inputs_embeds") is not None:
            raise UnsupportedError("recipes need the prompt as input_ids, not as inputs_embeds")
        if inputs.get("mm_encoder_outputs"):
            raise UnsupportedError("recipes need the video as pixels, not as mm_encoder_outputs")
        name = self.adapter.pixels
        if mask is None:
            mask = torch.ones_like(ids)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise ShapeError("attention_mask must be [batch, tokens], as input_ids")
        if inputs.get(name) is None and self.takes_text:
            return unreduced(ids, mask.bool(), []), []
        if inputs.get(name) is None:
            raise UnsupportedError(
                f"the prompt holds no video ({name} is missing); remove() the recipes for prompts "
                "without one"
            )
        images = self.adapter.image_pixels
        if images is not None and inputs.get(images) is not None and not self.takes_text:
            raise UnsupportedError(
                f"the prompt holds images ({images}) beside its video; recipes take videos only"
            )
        found = self.adapter.placeholders(self.model, ids)
        places = self.adapter.places(self.model.model, inputs, found)
        if not places:
            raise ShapeError(f"{name} holds a video, but the prompt holds no placeholder for it")
        whole = unreduced(ids, mask.bool(), places)
        shortens = self.recipe is not None or self.layers.recipes
        if shortens and bool((whole.written & ~whole.mask).any()):
            raise UnsupportedError(
                "attention_mask hides tokens of a video; recipes drop what a prompt can do without"
            )
        return whole, places

    def _encode(
        self, places: Sequence[VideoPlace], inputs: Mapping[str, Any]
    ) -> tuple[list[VideoRows], list[dict[tuple[str, int], Tensor]]]:
        """What the host would write for each video, and what was asked of its tower."""
        self.vision.start()
        try:
            videos = self.adapter.encode(self.model.model, inputs, places)
            return videos, self.vision.finish(inputs, places)
        finally:
            self.vision.stop()

    def _decide(
        self,
        recipe: PromptReduction,
        whole: Prompt,
        places: Sequence[VideoPlace],
        videos: Sequence[VideoRows],
        seen: Sequence[dict[tuple[str, int], Tensor]],
    ) -> list[TokenAssignment | None]:
        plans: list[TokenAssignment | None] = []
        for place, video, vision in zip(places, videos, seen, strict=True):
            plan = recipe.plan(self._context(whole, place, video, vision))
            left = place.grid.num_video if plan is None else plan.num_out
            self.handle.report().change(str(recipe), self.sites[0].name, place.grid.num_video, left)
            plans.append(None if plan is None or _changes_nothing(plan) else plan)
        return plans

    def _context(
        self,
        whole: Prompt,
        place: VideoPlace,
        video: VideoRows,
        vision: dict[tuple[str, int], Tensor],
    ) -> PromptContext:
        row = place.sample
        others = whole.mask[row] & ~whole.written[row]
        last = whole.written[row].nonzero()[-1, 0]
        embed = self.model.get_input_embeddings()
        return PromptContext(
            site=self.sites[0],
            grid=place.grid,
            hidden=video.rows[place.grid_rows][None],
            text=embed(whole.ids[row][others]),
            num_question=int(others[last:].sum()),
            vision=vision,
            tools=TOOLS,
        )

    def _positions(self, whole: Prompt, inputs: Mapping[str, Any]) -> Tensor:
        given = inputs.get("position_ids")
        if given is not None:
            return given
        if self.adapter.positions is None:
            return text_positions(whole.mask)
        return self.adapter.positions(self.model.model, inputs, whole.ids, whole.mask)

    def _padding(self) -> int:
        number = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return 0 if number is None else number

    def _short_inputs(self, prompt: Prompt, inputs: Mapping[str, Any]) -> dict[str, Any]:
        gone = {self.adapter.pixels, *self.adapter.consumed}
        short = {key: value for key, value in inputs.items() if key not in gone}
        mask = inputs.get("attention_mask")
        dtype = torch.long if mask is None else mask.dtype
        short |= {
            "input_ids": prompt.ids,
            "attention_mask": prompt.mask.to(dtype),
            "position_ids": prompt.positions,
        }
        if inputs.get("labels") is not None:
            labels = inputs["labels"].gather(1, prompt.index)
            # -100 is what torch's cross-entropy leaves out.
            short["labels"] = labels.masked_fill(~prompt.mask, -100)
        return short

    # Inside the host

    def _write(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Embeddings of a call on the prompt, with the video's written in."""
        self.written = None
        if self.generating is None and not self._entered:
            # On its own the base model is dense, also behind an interrupted call.
            self._forget()
        self._entered = False
        if self.run is None or kwargs.get("input_ids") is None:
            return None
        prompt, ids = self.run.prompt, kwargs["input_ids"]
        start = _past(kwargs.get("past_key_values"))
        self.written = prompt.rows_of(start, ids.shape[1], ids.shape[0] // prompt.batch)
        if self.written is None:
            return None
        assert prompt.features is not None
        mask, rows = self.written
        embeds = self.model.get_input_embeddings()(ids)
        features = prompt.features[rows].to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(mask[..., None], features)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeds}

    def _enter_text(self, text: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.run is None:
            return None
        prompt, kwargs = self.run.prompt, dict(kwargs)
        if self.run.encoding is not None:
            places, inputs = self.run.encoding
            self.run.see(places, self.vision.finish(inputs, places))
            self.run.encoding = None
        if self.written is not None and prompt.planes:
            mask, rows = self.written
            kwargs["visual_pos_masks"] = mask
            kwargs["deepstack_visual_embeds"] = [plane[rows] for plane in prompt.planes]
        cache = kwargs.get("past_key_values")
        if self.generating is None:
            self._attach(self.run, (cache,))
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if cache is None and mask is None and prompt.features is not None:
            # Without either, gaps between positions would pass for packed sequences.
            kwargs["attention_mask"] = torch.ones(
                embeds.shape[:2], dtype=torch.long, device=embeds.device
            )
        self.layers.enter(self.run, kwargs)
        return args, kwargs


def _past(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _changes_nothing(plan: TokenAssignment) -> bool:
    return plan.copies and plan.num_out == plan.num_in
