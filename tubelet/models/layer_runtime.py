"""The runtime that drops tokens inside a language model, in front of some of its layers.

The first layer that sees fewer tokens gathers hidden states and rotary tables and makes one new
mask; the layers behind it get the same objects. Their key-value caches hold fewer tokens. What
is dropped is decided once per prompt, when all of it is there, and kept for every later call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site
from tubelet.core.errors import UnsupportedError
from tubelet.core.handle import Handle
from tubelet.core.prompt import LayerContext
from tubelet.core.recipe import LayerReduction
from tubelet.kernels.selection import TOOLS
from tubelet.models.layer_statistics import PromptStatistics
from tubelet.models.prompt import Prompt, earliest_member, packed_order
from tubelet.models.watched_attention import watch

if TYPE_CHECKING:
    from tubelet.models.prompt_runtime import Run
    from tubelet.models.video_llm import VideoLLMAdapter

CUTTABLE = {"DynamicLayer", "StaticLayer", "StoredLayer"}
"""Layers of transformers' caches that may hold fewer tokens than those before them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The prompt's tokens from some layer on.

    Args:
        columns: [B, n] int64, places in the prompt that the language model got.
        source: [B, n] int64, places whose positions the tokens have.
        mask: [B, n] bool, False at padding.
        video: [B, n] bool, tokens that may be dropped.
        original: [B, n] int64, which original video token a video token is.
        size: [B, n] float32, originals that a token stands for.
        full: No padding, for all that Python knows.
        compact: Positions are renumbered from here on.
    """

    columns: Tensor
    source: Tensor
    mask: Tensor
    video: Tensor
    original: Tensor
    size: Tensor
    full: bool
    compact: bool = False

    @classmethod
    def of(cls, prompt: Prompt) -> "Stage":
        """All of the prompt."""
        columns = torch.arange(prompt.length, device=prompt.ids.device).expand(prompt.batch, -1)
        return cls(
            columns=columns,
            source=columns,
            mask=prompt.mask,
            video=prompt.video,
            original=prompt.original,
            size=prompt.size,
            full=prompt.full,
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What was decided in front of a layer.

    Args:
        plans: One per prompt.
        slots: [B, n] int64, where in the stage before each token stood.
        before, stage: The prompt's tokens on both sides.
    """

    plans: tuple[TokenAssignment | None, ...]
    slots: Tensor
    before: Stage
    stage: Stage


@dataclass
class Call:
    """One call of the language model: which columns it computes, and what its layers get."""

    run: "Run"
    cache: Any
    past: int
    num: int
    copies: int
    answer_mask: Tensor | None
    embeds: Tensor
    given: dict[str, Any] | None = None

    @property
    def whole_prompt(self) -> bool:
        """Whether the call holds all of the prompt."""
        return self.past == 0 and self.num >= self.run.prompt.length


def refuse_replay(text: Any, what: str) -> None:
    """Refuse gradient checkpointing: layers run again when their call is over."""
    if text.training and getattr(text, "gradient_checkpointing", False):
        raise UnsupportedError(f"gradient checkpointing cannot replay {what}")


class LayerRuntime:
    """Layer recipes at work on one language model."""

    def __init__(
        self,
        adapter: "VideoLLMAdapter",
        model: Any,
        recipes: Sequence[LayerReduction],
        sites: Sequence[Site],
        handle: Handle,
    ) -> None:
        self.handle = handle
        self.text = adapter.text_model(model)
        self.three_axes = adapter.positions is not None
        self.sites = {site.layer: site for site in sites}
        self.recipes = {s.layer: r for s in sites for r in recipes if r.acts_on(s)}
        self.first_free = max(1, adapter.deepstack(model.config))
        self.vision = frozenset[tuple[str, int]]().union(*(r.vision for r in recipes))
        """What the recipes ask of the vision tower."""
        self.call: Call | None = None
        self.seen: dict[int, tuple[Tensor, Tensor, float]] = {}

    def hook(self) -> None:
        """Watch the layers whose attention is asked for, and shorten those behind a cut."""
        self._check()
        if not self.recipes:
            return
        wanted = [layer - 1 for layer, r in self.recipes.items() if r.statistics]
        if wanted:
            modules = {self.text.layers[layer].self_attn: layer for layer in wanted}

            def see(
                module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, _: Any
            ) -> None:
                self._see(modules[module], q, k, scale)

            watch(self.text, modules, see, self.handle)
        for layer in range(min(self.recipes), len(self.text.layers)):
            hooked = self.text.layers[layer].register_forward_pre_hook(
                self._before(layer), with_kwargs=True
            )
            self.handle.on_remove(hooked.remove)

    def _check(self) -> None:
        for layer, recipe in self.recipes.items():
            if layer < self.first_free:
                raise UnsupportedError(
                    f"{recipe} acts in front of layer {layer}, but this model can drop tokens "
                    f"from layer {self.first_free} on (visual features are added, or the length "
                    "of the cache is read, in front of it)"
                )
        kinds = set(getattr(self.text.config, "layer_types", None) or ()) - {"full_attention"}
        if self.recipes and kinds:
            raise UnsupportedError(
                f"recipes inside the language model need full attention; it has {', '.join(kinds)}"
            )

    def check_generation(self, config: Any, inputs: Mapping[str, Any]) -> None:
        """Refuse what a decision inside the model does not go with."""
        chunk = inputs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if self.recipes and chunk:
            raise UnsupportedError(
                "recipes inside the language model decide on the whole prompt; leave "
                "prefill_chunk_size out"
            )

    # Calls

    def enter(self, run: "Run", kwargs: dict[str, Any]) -> None:
        """A call of the language model begins."""
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        num, copies = embeds.shape[1], embeds.shape[0] // run.prompt.batch
        mask = kwargs.get("attention_mask")
        answers = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            answers = mask[:, run.prompt.length :].bool()
        self.call = Call(run, cache, past, num, copies, answers, embeds)
        self.seen.clear()
        if self.recipes:
            self._check_call(self.call)
        if past == 0 and not run.reported:
            tokens = float(run.prompt.mask.sum()) / run.prompt.batch
            for layer in range(min(self.recipes, default=len(self.sites))):
                self.handle.report().enter_layer(layer, tokens)
            run.reported = True

    def leave(self) -> None:
        """The call is over; nothing of it is kept."""
        self.call = None
        self.seen.clear()

    def _check_call(self, call: Call) -> None:
        refuse_replay(self.text, "a token reduction")
        if not call.whole_prompt and call.past < call.run.prompt.length:
            raise UnsupportedError(
                "recipes inside the language model decide on the whole prompt, but it came in parts"
            )
        cached = getattr(call.cache, "layers", None) or ()
        odd = {type(layer).__name__ for layer in cached} - CUTTABLE
        kind = getattr(call.cache, "layer_class_to_replicate", None)
        if kind is not None:
            odd |= {kind.__name__} - CUTTABLE
        if odd:
            raise UnsupportedError(
                f"a key-value cache of {', '.join(sorted(odd))} cannot be shortened from a layer "
                "on; use the default or a static cache"
            )

    def _see(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        call = self.call
        if call is not None and layer + 1 not in call.run.cuts:
            self.seen[layer] = (q, k, scale)

    def _before(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            call = self.call
            if call is None:
                return None
            if layer in self.recipes:
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = self._cut(call, layer, hidden, kwargs)
                args = (hidden, *args[1:]) if args else args
                kwargs = kwargs if args else {**kwargs, "hidden_states": hidden}
            return args, {**kwargs, **(call.given or {})}

        return hook

    def last_cut(self, run: "Run", layer: int) -> int | None:
        """The layer of the last decision whose result a layer sees."""
        return max((cut for cut in run.cuts if cut <= layer), default=None)

    def stage(self, run: "Run", layer: int) -> Stage:
        """The prompt's tokens as a layer sees them, behind what was decided so far."""
        cut = self.last_cut(run, layer)
        return Stage.of(run.prompt) if cut is None else run.cuts[cut].stage

    # One cut

    def _cut(self, call: Call, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states behind the cut; the layers from here on get `call.given`."""
        cuts = call.run.cuts
        if layer not in cuts:
            before = self.stage(call.run, layer - 1)
            plans = self._decide(call, layer, hidden, before)
            cuts[layer] = _cut_by(before, plans, self.recipes[layer].positions)
            self._report(call.run, layer)
            for row, plan in enumerate(plans):
                if plan is not None:
                    call.run.assigned[row] = call.run.assigned[row].compose(plan)
            self.handle.record_assignment(list(call.run.assigned.values()))
        if call.whole_prompt:
            hidden = _gather(call, hidden, cuts[layer])
        call.given = self._arguments(call, layer, hidden, cuts[layer].stage, kwargs)
        return hidden

    def _decide(
        self, call: Call, layer: int, hidden: Tensor, stage: Stage
    ) -> list[TokenAssignment | None]:
        recipe, plans = self.recipes[layer], []
        for row in range(call.run.prompt.batch):
            video = stage.video[row]
            if not call.run.prompt.grids[row]:
                plans.append(None)
                continue
            context = self._context(call, layer, hidden, stage, row)
            plan = recipe.plan(context)
            left = context.num_tokens if plan is None else plan.num_out
            self.handle.report().change(str(recipe), self.sites[layer].name, int(video.sum()), left)
            plans.append(plan)
        return plans

    def _context(
        self, call: Call, layer: int, hidden: Tensor, stage: Stage, row: int
    ) -> LayerContext:
        prompt = call.run.prompt
        own = hidden[row * call.copies, : stage.mask.shape[1]]
        video, real = stage.video[row], stage.mask[row]
        columns = video.nonzero()[:, 0]
        text = (real & ~prompt.written[row].gather(0, stage.columns[row])).nonzero()[:, 0]
        behind = text[text > columns[-1]]
        stats = None
        if self.recipes[layer].statistics:
            q, k, scale = self.seen[layer - 1]
            sample, num = row * call.copies, stage.mask.shape[1]
            stats = PromptStatistics(
                q[sample, :, :num], k[sample, :, :num], scale, real, columns, behind
            )
        anchor = stage.original[row, columns][None]
        entered = call.embeds[row * call.copies, : prompt.length]
        seen = call.run.vision.get(row, {})
        return LayerContext(
            site=self.sites[layer],
            grids=prompt.grids[row],
            hidden=own[columns][None],
            anchor=anchor,
            size=stage.size[row, columns][None],
            text=own[text],
            num_question=len(behind),
            stats=stats,
            embeds=entered[prompt.video[row]][None],
            text_embeds=entered[prompt.mask[row] & ~prompt.written[row]],
            vision={asked: values[:, anchor[0]] for asked, values in seen.items()},
            tools=TOOLS,
        )

    def _arguments(
        self, call: Call, layer: int, hidden: Tensor, stage: Stage, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Mask, rotary tables and positions of the layers from here on."""
        from transformers.masking_utils import create_causal_mask

        mask = stage.mask.repeat_interleave(call.copies, 0)
        behind = call.past + call.num - call.run.prompt.length
        if behind:
            answers = call.answer_mask
            if answers is None:
                answers = mask.new_ones(len(mask), behind)
            mask = torch.cat([mask, answers], dim=1)
        full = stage.full and call.answer_mask is None
        new = create_causal_mask(
            config=self.text.config,
            inputs_embeds=hidden,
            attention_mask=None if full else mask.long(),
            past_key_values=call.cache,
            position_ids=None,
            layer_idx=layer,
        )
        given: dict[str, Any] = {"attention_mask": new}
        given["position_embeddings"] = self._rotary(call, hidden, stage, mask, kwargs)
        if kwargs.get("position_ids") is not None:
            # Only tells packed sequences apart; counted, so that it has no gaps.
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = counted[:, -hidden.shape[1] :]
        return given

    def _rotary(
        self, call: Call, hidden: Tensor, stage: Stage, mask: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        if stage.compact:
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -hidden.shape[1] :]
            return self.text.rotary_emb(
                hidden, counted.expand(3, -1, -1) if self.three_axes else counted
            )
        tables = kwargs["position_embeddings"]
        if not call.whole_prompt:
            return tables
        source = stage.source.repeat_interleave(call.copies, 0)
        extra = torch.arange(call.run.prompt.length, call.num, device=source.device)
        source = torch.cat([source, extra.expand(len(source), -1)], dim=1)[..., None]
        return tuple(
            table.expand(len(source), -1, -1).gather(1, source.expand(-1, -1, table.shape[-1]))
            for table in tables
        )

    def _report(self, run: "Run", layer: int) -> None:
        later = [cut for cut in self.recipes if cut > layer]
        tokens = float(run.cuts[layer].stage.mask.sum()) / run.prompt.batch
        for number in range(layer, min(later, default=len(self.sites))):
            self.handle.report().enter_layer(number, tokens)


def _cut_by(before: Stage, plans: Sequence[TokenAssignment | None], policy: str) -> Cut:
    keep, source, size = before.mask.clone(), before.source.clone(), before.size.clone()
    for row, plan in enumerate(plans):
        if plan is None:
            continue
        columns = before.video[row].nonzero()[:, 0]
        kept = columns[plan.anchor[0]]
        keep[row, columns] = False
        keep[row, kept] = True
        live = plan.index[0] >= 0
        mass = torch.zeros(plan.num_out, device=size.device)
        size[row, kept] = mass.scatter_add(0, plan.index[0][live], before.size[row, columns][live])
        if policy == "anchor":
            source[row, kept] = before.source[row, columns[earliest_member(plan)]]
    slots = packed_order(keep, before.mask)
    mask = keep.gather(1, slots)
    stage = Stage(
        columns=before.columns.gather(1, slots),
        source=source.gather(1, slots),
        mask=mask,
        video=before.video.gather(1, slots) & mask,
        original=before.original.gather(1, slots),
        size=size.gather(1, slots),
        full=bool(mask.all()),
        compact=before.compact or (policy == "compact" and any(plans)),
    )
    return Cut(plans=tuple(plans), slots=slots, before=before, stage=stage)


def _gather(call: Call, hidden: Tensor, cut: Cut) -> Tensor:
    """Hidden states of the tokens that go on, those of an answer behind them."""
    width = cut.before.mask.shape[1]
    prompt, answer = hidden[:, :width], hidden[:, width:]
    if any(plan is not None and not plan.copies for plan in cut.plans):
        prompt = prompt.clone()
        for row, plan in enumerate(cut.plans):
            if plan is None:
                continue
            columns = cut.before.video[row].nonzero()[:, 0]
            for sample in range(row * call.copies, (row + 1) * call.copies):
                reduced = plan.reduce(prompt[sample, columns][None])[0]
                prompt[sample, columns[plan.anchor[0]]] = reduced
    slots = cut.slots.repeat_interleave(call.copies, 0)[..., None]
    kept = prompt.gather(1, slots.expand(-1, -1, hidden.shape[2]))
    if not cut.stage.full:
        # Padding holds what was dropped, which nothing may read.
        real = cut.stage.mask.repeat_interleave(call.copies, 0)
        kept = kept.masked_fill(~real[..., None], 0)
    return torch.cat([kept, answer], dim=1) if answer.shape[1] else kept
