"""The runtime that stores key-value caches in fewer bits and reads only a part of them.

The prompt's own attention sees every token as it came. Behind it each layer's cache is stored as
its recipe says, and again whenever enough new tokens have come. For each next token a layer reads
what its recipe picks, by gathering; everything stays in the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.kv import BITS, ReadContext, StoreContext
from tubelet.core.recipe import KVPolicy, KVReads, KVStorage
from tubelet.kernels.selection import TOOLS
from tubelet.models.kv_cache import stored_layer, take_over
from tubelet.models.layer_runtime import refuse_replay
from tubelet.models.watched_attention import HostAttention, put_around, uncompiled
from tubelet.models.whole_prompt import asked

if TYPE_CHECKING:
    from tubelet.models.prompt_runtime import PromptRuntime, Run

PREFIX = "tubelet_caching_"

OWNER = "_tubelet_caching"
"""Attribute of an attention module: the runtime that its calls go through."""

STATE = "_tubelet_kv"
"""Attribute of a run: what the recipes remember of it."""


@dataclass(frozen=True)
class Columns:
    """What the columns of a cache hold, in layers without a cut between them.

    Args:
        width: Columns of the prompt, padding included.
        real: For each row, which of these are no padding.
        video: For each row, [M] True at those real ones that hold the video.
    """

    width: int
    real: list[Tensor]
    video: list[Tensor]

    def with_answer(self, num: int) -> list[tuple[Tensor, Tensor]]:
        """For each row the real ones of `num` columns, and [M] True at video tokens."""
        behind = torch.arange(self.width, num, device=self.real[0].device)
        answer = (0, num - self.width)
        return [
            (torch.cat([real, behind]), nn.functional.pad(video, answer, value=False))
            for real, video in zip(self.real, self.video, strict=True)
        ]


@dataclass
class KVState:
    """What a run has seen, from its first token to the last of its answer.

    Args:
        columns: By the layer of the last cut, None in front of all.
        waiting: [B, H, n, D] queries, in each layer, of tokens that are to be stored.
        memory: For each row of the batch, what the recipe of reads remembers.
    """

    columns: dict[int | None, Columns] = field(default_factory=dict)
    waiting: dict[int, list[Tensor]] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class KVCall:
    """One call of the language model.

    Args:
        prompt: Whether it is the prompt's own call.
        before: Query, key and scale of the layer before, where the next one asks for them.
        tokens: What `_tokens` found, by the layer of the last cut and the columns asked for.
    """

    run: "Run"
    state: KVState
    cache: Any
    prompt: bool
    before: tuple[Tensor, Tensor, float] | None = None
    tokens: dict[tuple[int | None, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class KVRuntime:
    """Recipes for caches at work on one language model."""

    def __init__(self, model: Any, recipes: Sequence[KVPolicy], prompts: "PromptRuntime") -> None:
        self.model, self.prompts = model, prompts
        self.text, self.handle = prompts.text, prompts.handle
        self.sites = {site.layer: site for site in prompts.sites if site.kind == "llm"}
        places = [
            (i, recipe) for i, s in self.sites.items() for recipe in recipes if recipe.acts_on(s)
        ]
        self.storage = {i: r for i, r in places if isinstance(r, KVStorage)}
        self.reads = {i: r for i, r in places if isinstance(r, KVReads)}
        self.call: KVCall | None = None

    def hook(self) -> None:
        """Put everything on; each change registers its own undo."""
        if not self.storage and not self.reads:
            return
        self._check()
        put_around(self.text, PREFIX, _attend, self.handle)
        for layer in self.text.layers:
            setattr(layer.self_attn, OWNER, self)
            self.handle.on_remove(lambda module=layer.self_attn: delattr(module, OWNER))
        hooks = [
            # In front of the hook that tells the layers' runtime of the cache.
            self.text.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            self.text.register_forward_hook(lambda *call: self._leave(), always_call=True),
        ]
        for registered in hooks:
            self.handle.on_remove(registered.remove)
        self.prompts.checks.append(self._check_generation)
        self.prompts.endings.append(self._leave)

    # Refusals

    def _check(self) -> None:
        kinds = set(getattr(self.text.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise UnsupportedError(
                f"recipes for caches need full attention; it has {', '.join(sorted(kinds))}"
            )
        cuts = self.prompts.layers.recipes
        late = [layer for layer in cuts if self.reads and layer >= min(self.reads)]
        if late:
            first = min(self.reads)
            raise UnsupportedError(
                f"{self.reads[first]} reads the same tokens in all layers from {first} on, but "
                f"{cuts[late[0]]} drops some in front of layer {late[0]}; let it do so before"
            )

    def _check_generation(self, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        option = partial(asked, self.model, given, inputs)
        reason = None
        if (option("num_beams") or 1) > 1:
            reason = "beam search reorders the cache (num_beams); decode greedily or sample"
        elif option("prompt_lookup_num_tokens") or option("assistant_early_exit"):
            reason = "assisted decoding takes tokens back out of the cache; leave it out"
        elif option("cache_implementation") not in (None, "dynamic"):
            reason = (
                f"a cache of fixed make ({option('cache_implementation')}) can neither be stored "
                "in fewer bits nor read in part; leave cache_implementation out"
            )
        elif option("use_cache") is False:
            reason = "use_cache=False leaves no cache; leave it out, or remove() the recipes"
        elif option("prefill_chunk_size"):
            reason = "the decision is about the whole prompt; leave prefill_chunk_size out"
        if reason is not None:
            raise UnsupportedError(f"recipes for caches cannot go with this: {reason}")

    # Calls

    @uncompiled
    def _enter(self, text: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of the language model begins."""
        run = self.prompts.run
        if run is None:
            return None
        refuse_replay(text, "what a cache holds")
        held, num = kwargs.get("past_key_values"), kwargs["inputs_embeds"].shape[1]
        if held is None:
            held = self._new_cache(kwargs.get("use_cache"))
        past = int(held.get_seq_length())
        if past == 0:
            if num < run.prompt.length:
                raise UnsupportedError(
                    "recipes for caches decide on the whole prompt, but it came in parts"
                )
            take_over(held, len(self.text.layers))
            state = KVState()
            setattr(run, STATE, state)
        else:
            state = getattr(run, STATE, None)
            ours = all(isinstance(layer, stored_layer()) for layer in held.layers)
            if state is None or not ours:
                raise UnsupportedError(
                    "this cache was filled without the recipes; start from an empty one"
                )
            if num != 1:
                raise UnsupportedError(
                    f"recipes for caches take an answer token by token, not {num} at once"
                )
        self.call = KVCall(run, state, held, past == 0)
        return args, {**kwargs, "past_key_values": held}

    def _new_cache(self, use_cache: bool | None) -> Any:
        from transformers import DynamicCache

        wanted = getattr(self.text.config, "use_cache", True) if use_cache is None else use_cache
        if not wanted:
            raise UnsupportedError(
                "recipes for caches need one; leave use_cache=False out, or remove() the recipes"
            )
        return DynamicCache(config=self.text.config)

    @uncompiled
    def _leave(self) -> None:
        """The call is over, also by an error."""
        call, self.call = self.call, None
        if call is None:
            return
        layers = [layer for layer in call.cache.layers if layer.is_initialized]
        queries = [q for waiting in call.state.waiting.values() for q in waiting]
        held = sum(layer.nbytes() for layer in layers) + sum(q.nbytes for q in queries)
        self.handle.report().cache_bytes = held, sum(layer.dense_nbytes() for layer in layers)

    # Attention

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, host: Any
    ) -> Any:
        """One attention call; `host(k, v, mask)` computes it as before."""
        call, layer = self.call, module.layer_idx
        if call is None:
            return host(k, v, mask)
        seen = (k, v, mask)
        if not call.prompt:
            if layer in self.reads:
                seen = self._read(call, layer, k, v, mask)
            call.before = (q, k, scale) if layer + 1 in self.reads else None
        out = host(*seen)
        if layer in self.storage:
            self._store(call, layer, q.detach(), k.detach(), scale)
        return out

    def _tokens(self, call: KVCall, layer: int, rows: int, num: int) -> list[tuple[Tensor, Tensor]]:
        """For each row the real columns of a layer's cache and [M] True at video tokens."""
        cut, known = self.prompts.layers.last_cut(call.run, layer), call.state.columns
        if cut not in known:
            known[cut] = self._columns(call, layer, rows)
        if (cut, num) not in call.tokens:
            call.tokens[cut, num] = known[cut].with_answer(num)
        return call.tokens[cut, num]

    def _columns(self, call: KVCall, layer: int, rows: int) -> Columns:
        stage = self.prompts.layers.stage(call.run, layer)
        real = [own.nonzero()[:, 0] for own in stage.mask]
        video = [shown[own] for shown, own in zip(stage.video, real, strict=True)]
        copies = rows // call.run.prompt.batch
        return Columns(
            width=stage.mask.shape[1],
            real=[own for own in real for _ in range(copies)],
            video=[own for own in video for _ in range(copies)],
        )

    # Reads

    @uncompiled
    def _read(
        self, call: KVCall, layer: int, k: Tensor, v: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Keys, values and mask of what the recipe reads."""
        assert call.before is not None
        recipe, (query, keys, scale) = self.reads[layer], call.before
        tokens = self._tokens(call, layer, len(k), k.shape[2])
        picked: list[Tensor] = []
        for row, (columns, video) in enumerate(tokens):
            num = len(columns)
            places = recipe.read(
                ReadContext(
                    site=self.sites[layer],
                    num_tokens=num,
                    kv_heads=k.shape[1],
                    video=video,
                    query=query[row],
                    keys=keys[row] if num == k.shape[2] else keys[row][:, columns],
                    scale=scale,
                    state=call.state.memory.setdefault(row, {}),
                )
            )
            if places is not None:
                _check_places(recipe, places, num, k.shape[1])
            picked.append(columns[None] if places is None else columns[places])
            read = picked[-1].shape[1]
            self.handle.report().change(str(recipe), self.sites[layer].name, num, read)
        if all(len(c) == own.shape[1] for (c, _), own in zip(tokens, picked, strict=True)):
            return k, v, mask
        return _gathered(k, v, mask, picked)

    # Storage

    @uncompiled
    def _store(self, call: KVCall, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Store the tokens that wait in a layer, if it is time."""
        recipe, held = self.storage[layer], call.cache.layers[layer]
        waiting = call.state.waiting.setdefault(layer, [])
        waiting.append(q)
        if not call.prompt and held.num_waiting < recipe.every:
            return
        queries, first = torch.cat(waiting, dim=2), k.shape[2] - held.num_waiting
        bits, stored = [], []
        for row, (columns, _) in enumerate(self._tokens(call, layer, len(k), k.shape[2])):
            # Comparing would wait for the device, and the prompt has nothing in front of it.
            stored.append(columns[columns >= first] - first if first else columns)
            ctx = StoreContext(
                site=self.sites[layer],
                queries=queries[row][:, stored[-1]],
                keys=k[row][:, columns],
                scale=scale,
                tools=TOOLS,
            )
            bits.append(recipe.store(ctx))
        try:
            counts = held.store(stored, bits)
        except ShapeError as error:
            raise ShapeError(f"{recipe}: {error}") from None
        waiting.clear()
        for number, tokens in counts.items():
            if number != BITS[-1]:
                self.handle.report().stored[f"{recipe}: {number} bits"] += tokens


def _attend(
    host: HostAttention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> Any:
    def as_before(k: Tensor, v: Tensor, mask: Any) -> Any:
        return host(module, query, k, v, mask, scaling=scaling, **options)

    owner = getattr(module, OWNER, None)
    if owner is None:
        return as_before(key, value, attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return owner.attend(module, query, key, value, attention_mask, scale, as_before)


def _check_places(recipe: KVReads, places: Tensor, num: int, heads: int) -> None:
    if places.ndim != 2 or places.shape[0] not in (1, heads) or places.shape[1] < 1:
        raise ShapeError(
            f"{recipe} must read [1, K] or [{heads}, K] places of {num}, got {tuple(places.shape)}"
        )


def _gathered(
    k: Tensor, v: Tensor, mask: Any, columns: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Any]:
    """Keys and values [B, Hkv, K, D] of some columns, and a mask where prompts differ in number.

    Args:
        mask: What the host would take for all columns.
        columns: For each row of the batch [1 or Hkv, K] real columns.

    Raises:
        UnsupportedError: Prompts differ in number, but the host takes no mask of four axes.
    """
    sizes = [own.shape[1] for own in columns]
    longest = max(sizes)
    parts = [nn.functional.pad(own, (0, longest - own.shape[1])) for own in columns]
    index = torch.stack([own.expand(k.shape[1], -1) for own in parts])[..., None]
    picked = [x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (k, v)]
    if min(sizes) == longest:
        return picked[0], picked[1], None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedError(
            "prompts of a batch that read different numbers of tokens need attention that takes a "
            "mask of four axes; use sdpa or eager attention, or prompts of one length"
        )
    lengths = torch.tensor(sizes, device=k.device)
    live = (torch.arange(longest, device=k.device) < lengths[:, None])[:, None, None]
    if mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min
        live = torch.zeros_like(live, dtype=mask.dtype).masked_fill(~live, least)
    return picked[0], picked[1], live
