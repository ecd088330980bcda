"""Attention over a dense cache, head by head, that plays what recipes for caches do.

Nothing of tubelet's runtimes is used: the host keeps its default cache, and an attention function
registered with transformers replaces what it returns. Single prompts without padding only.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "kv_reference"
_PLAYED: list["Dense"] = []


class Dense:
    """All keys and values as they came."""

    def seen(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, M, D] that a call computes with."""
        return k, v

    def columns(self, layer: int, head: int, num: int) -> list[int]:
        """Places that a head of the cache reads in a decoding step."""
        return list(range(num))

    def step(self, layer: int, weights: Tensor) -> None:
        """Attention [H, M] of the new token to all tokens, also those that are not read."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    played, layer = _PLAYED[-1], module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    (q,), (k,), (v,) = query, key, value
    k, v = played.seen(layer, q * scale, k, v)
    num, groups, decoding = k.shape[1], len(q) // len(k), q.shape[1] == 1
    rows = [(q[h] @ k[h // groups].T * scale) for h in range(len(q))]
    if decoding:
        played.step(layer, torch.stack([row[0].softmax(0) for row in rows]))
    out = []
    for head, row in enumerate(rows):
        if decoding:
            read = played.columns(layer, head // groups, num)
            out.append(row[:, read].softmax(-1) @ v[head // groups, read])
        else:
            later = torch.ones(row.shape).triu(1 + num - len(row)).bool()
            out.append(row.masked_fill(later, -torch.inf).softmax(-1) @ v[head // groups])
    return torch.stack(out, 1)[None], None


@contextmanager
def playing(model: Any, text: Any, played: Dense) -> Iterator[None]:
    """The language model of `model` computes attention as `played` says."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = text.config._attn_implementation
    text.set_attn_implementation(NAME)
    _PLAYED.append(played)
    try:
        yield
    finally:
        _PLAYED.pop()
        text.set_attn_implementation(before)


def rounded(x: Tensor, bits: int) -> Tensor:
    """A vector on evenly spaced levels between its extremes."""
    low, high = x.min(), x.max()
    step = (high - low) / (2**bits - 1)
    return x if step == 0 else ((x - low) / step).round() * step + low


class Zip(Dense):
    """ZipCache with the last 5 % as samples and no random ones."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}

    def seen(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        prompt = layer not in self.keys
        stored = 0 if prompt else self.keys[layer].shape[1]
        if not prompt:
            k = torch.cat([self.keys[layer], k[:, stored:]], 1)
            v = torch.cat([self.values[layer], v[:, stored:]], 1)
        waiting = q if prompt else torch.cat([self.queries[layer], q], 1)
        if prompt or k.shape[1] - stored >= self.every:
            own, whole = waiting.shape[1], k.shape[1]
            salient = self.salient(waiting, k)
            keys, values = k.clone(), v.clone()
            for bits, group in ((4, salient), (2, ~salient)):
                places = (torch.arange(whole) >= stored) & torch.cat(
                    [torch.zeros(whole - own).bool(), group]
                )
                keys[:, places], values[:, places] = packed(k[:, places], v[:, places], bits)
            self.keys[layer], self.values[layer] = keys, values
            waiting = q[:, :0]
        self.queries[layer] = waiting
        # The call itself still sees what was waiting as it came.
        return k, v

    def salient(self, q: Tensor, k: Tensor) -> Tensor:
        heads, num = q.shape[:2]
        before = k.shape[1] - num
        samples = range(num - math.ceil(0.05 * num), num)
        received = torch.zeros(num)
        for i in samples:
            for head in range(heads):
                row = q[head, i] @ k[head * len(k) // heads, : before + i + 1].T
                received[: i + 1] += row.softmax(0)[before:] / heads
        seen = torch.tensor([sum(i >= j for i in samples) for j in range(num)])
        best = (received / seen).argsort(descending=True)[: round(0.6 * num)]
        return torch.isin(torch.arange(num), best)


def packed(k: Tensor, v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys by channel, values by token behind the norm of each channel."""
    keys, values = k.clone(), v.clone()
    if not k.shape[1]:
        return keys, values
    for head in range(len(k)):
        for c in range(k.shape[2]):
            keys[head, :, c] = rounded(k[head, :, c], bits)
        norm = v[head].abs().amax(0).sqrt()
        for t in range(k.shape[1]):
            values[head, t] = rounded(v[head, t] / norm, bits) * norm
    return keys, values


class Tidal(Dense):
    def __init__(self, layers: tuple[int, ...], tokens: int) -> None:
        self.layers, self.tokens = layers, tokens
        self.found: Tensor | None = None

    def step(self, layer: int, weights: Tensor) -> None:
        if layer in self.layers:
            self.found = weights

    def columns(self, layer: int, head: int, num: int) -> list[int]:
        if layer <= min(self.layers) or layer in self.layers or num <= self.tokens:
            return list(range(num))
        assert self.found is not None
        # Two query heads share a head of the tiny models' caches.
        both = self.found[2 * head] + self.found[2 * head + 1]
        return sorted(both.topk(self.tokens).indices.tolist())


class DyCoke(Dense):
    def __init__(self, layer: int, keep: int, video: list[int]) -> None:
        self.layer, self.keep, self.video = layer, keep, video
        self.seen_before: Tensor | None = None
        self.kept: list[int] = []
        self.fresh = 0

    def step(self, layer: int, weights: Tensor) -> None:
        if layer != self.layer - 1:
            return
        seen = weights.mean(0)[self.video]
        before, self.seen_before = self.seen_before, seen
        if before is not None and torch.cosine_similarity(seen, before, dim=0) >= 0.9:
            return
        self.fresh += 1
        self.kept = [self.video[i] for i in seen.topk(self.keep).indices.tolist()]

    def columns(self, layer: int, head: int, num: int) -> list[int]:
        if layer < self.layer:
            return list(range(num))
        return [i for i in range(num) if i not in self.video or i in self.kept]
