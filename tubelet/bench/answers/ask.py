"""Asking the model under recipes: right answers, tokens kept, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.answers.quiz import Prompts
from tubelet.bench.answers.settings import Recipes, Sweep, has_budget
from tubelet.bench.compare import on_model
from tubelet.core.recipe import KVPolicy, KVReads
from tubelet.core.report import Report
from tubelet.nn.video_llm import VideoLLM

STEPS = 8
"""Halvings of the search for a threshold."""


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a variant used, as shares of dense.

    Args:
        entering: Video tokens that enter the first layer of the language model.
        layers: Video tokens entering a layer, mean over the layers.
        last: Video tokens entering the last layer.
        density: Causal attention over the prompt that is computed, in blocks; None if all is.
        stored: Bytes of the key-value cache behind the video; None if as it came.
        read: Of the cache by each token of the question, mean over the layers; None if all is.
    """

    entering: float = 1.0
    layers: float = 1.0
    last: float = 1.0
    density: float | None = None
    stored: float | None = None
    read: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One batch of questions.

    Args:
        right: [B] bool on the CPU.
        used: See there.
        seconds: Per question, recipes put on and taken off included.
    """

    right: Tensor
    used: Used
    seconds: float


def ask(llm: VideoLLM, prompts: Prompts, recipes: Recipes) -> Outcome:
    """The most likely first word of each answer, against the right one.

    Recipes for caches act behind the prompt. With them only the video is the prompt, and every
    word of the question is read from its cache, as a second question about a video would be.
    """
    begun = time.perf_counter()
    with torch.inference_mode(), on_model(llm.host, recipes) as handle:
        if any(isinstance(recipe, KVPolicy) for recipe in recipes):
            logits = _behind_the_video(llm, prompts)
        else:
            logits = llm.host(**prompts.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        right = (logits.argmax(-1) == prompts.wanted).cpu()
        spent = time.perf_counter() - begun
        used = Used() if handle is None else _used(handle.report(), recipes, llm)
    return Outcome(right=right, used=used, seconds=spent / len(prompts))


def _behind_the_video(llm: VideoLLM, prompts: Prompts) -> Tensor:
    """[B, V] logits of the answers; each word of the question is a step from the video's cache."""
    host: Any = llm.host
    answers, order = [], []
    for rows, inputs in prompts.by_length:
        ids, mask, front = inputs["input_ids"], inputs["attention_mask"], prompts.front
        video = {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}
        result = host(
            input_ids=ids[:, :front], attention_mask=mask[:, :front], use_cache=True, **video
        )
        for end in range(front + 1, ids.shape[1] + 1):
            result = host(
                input_ids=ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                past_key_values=result.past_key_values,
                use_cache=True,
            )
        answers.append(result.logits[:, -1])
        order.append(rows)
    return torch.cat(answers)[torch.cat(order).argsort()]


def _used(report: Report, recipes: Recipes, llm: VideoLLM) -> Used:
    num, depth = llm.num_video, len(llm.host.model.language_model.layers)
    facts: dict[str, float] = {}
    if has_budget(recipes):
        text = report.tokens_in - num
        shares = [(tokens - text) / num for tokens in report.tokens_per_layer]
        facts = {"entering": shares[0], "layers": sum(shares) / len(shares), "last": shares[-1]}
    density = report.mean_density
    if density is not None:
        facts["density"] = density
    if report.stored and report.cache_bytes is not None:
        held, dense = report.cache_bytes
        facts["stored"] = held / dense
    if any(isinstance(recipe, KVReads) for recipe in recipes):
        parts = [c["after"] / c["before"] for c in report.to_dict()["changes"]]
        facts["read"] = (sum(parts) + depth - len(parts)) / depth
    return Used(**facts)


def search(llm: VideoLLM, prompts: Prompts, sweep: Sweep, keep: float) -> Recipes:
    """What of a sweep leaves a share nearest to `keep` to the last layer, on these prompts."""
    low, high = sweep.low, sweep.high
    tried: list[tuple[float, float]] = []
    for _ in range(STEPS):
        middle = (low + high) / 2
        share = ask(llm, prompts, sweep.make(middle)).used.last
        tried.append((abs(share - keep), middle))
        low, high = (middle, high) if share < keep else (low, middle)
    return sweep.make(min(tried)[1])


@contextmanager
def encoded_once(llm: VideoLLM) -> Iterator[None]:
    """The encoder runs once for consecutive calls on the same clips.

    Not where its layers or attention calls are watched: then there is more to see than features.
    """
    tower, whole = llm.tower, llm.tower.layers_of
    kept: list[tuple[Any, Tensor, list[Tensor]]] = []

    def layers_of(clips: Tensor) -> list[Tensor]:
        hooked = any(module._forward_hooks for module in tower.encoder.modules())
        if hooked or tower._is_watched():
            return whole(clips)
        key = (clips.data_ptr(), clips.shape)
        if not kept or kept[0][0] != key:
            # The clips are kept too, so that no others can take their place in memory.
            kept[:] = [(key, clips, whole(clips))]
        return kept[0][2]

    tower.layers_of = layers_of
    try:
        yield
    finally:
        del tower.layers_of
