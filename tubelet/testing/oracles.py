"""Slow, obvious versions of the reductions: one token at a time, attention maps in memory.

`encode` is a hand-written forward of the four joint-attention hosts on a Python list of tokens,
which a reducer shortens between attention and MLP. Nothing here uses tubelet's own operations,
so agreement with an accelerated model is evidence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.testing.oracle_hosts import HOSTS, TimeSformer, Token, attend, mean_of, split_qkv


@dataclass
class Scene:
    """What a reducer may look at.

    Args:
        layer: -1 behind the embeddings.
        num_layers: Depth of the host.
        shape: (frames, height, width) of the token grid.
        extra: Class tokens in front.
        pixels: [T, 3, H, W] clip of this sample.
        keys, values: [H, N, D] of the attention just made; None behind the embeddings.
        weights: [H, N, N] softmax map of it.
    """

    layer: int
    num_layers: int
    shape: tuple[int, int, int]
    extra: int
    pixels: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    weights: Tensor | None = None

    def frame(self, token: Token) -> int:
        """Frame of a token, -1 for class tokens."""
        return (token.place - self.extra) // (self.shape[1] * self.shape[2])


Reducer = Callable[[Scene, list[Token]], list[Token]]


@torch.no_grad()
def encode(model: Any, pixels: Tensor, reduce: Reducer, size_bias: bool = False) -> Tensor:
    """Logits [B, labels] of a tiny or real host whose tokens `reduce` shortens in every layer.

    Args:
        model: VideoMAE, ViViT, V-JEPA 2 or joint TimeSformer with a classification head, not
            accelerated.
        pixels: [B, T, 3, H, W].
        reduce: Called behind the embeddings (layer -1) and between attention and MLP.
        size_bias: Add log(size) to the logits of a token.
    """
    host = HOSTS[type(model).__name__](model)
    return torch.cat([host.head(t) for t in final_tokens(model, pixels, reduce, size_bias)])


@torch.no_grad()
def final_tokens(
    model: Any, pixels: Tensor, reduce: Reducer, size_bias: bool = False
) -> list[list[Token]]:
    """What is left of each sample behind the last layer; arguments as for `encode`."""
    host = HOSTS[type(model).__name__](model)
    return [_encode_one(host, clip[None], reduce, size_bias) for clip in pixels]


def _encode_one(host: Any, clip: Tensor, reduce: Reducer, size_bias: bool) -> list[Token]:
    embedded, shape = host.embed(clip)
    tokens = [Token(value, place, [place]) for place, value in enumerate(embedded)]
    total = len(tokens)
    about = {"num_layers": len(host.layers), "shape": shape, "pixels": clip[0]}
    about["extra"] = total - math.prod(shape)
    tokens = reduce(Scene(layer=-1, **about), tokens)
    for index, layer in enumerate(host.layers):
        x = torch.stack([token.value for token in tokens])
        places = torch.tensor([token.place for token in tokens])
        q, k, v = host.project(layer, x, places)
        sizes = torch.tensor([float(token.size) for token in tokens])
        out, weights = attend(q, k, v, sizes.log() if size_bias else None)
        x = x + host.output(layer, out)
        tokens = [Token(value, t.place, t.members) for value, t in zip(x, tokens, strict=True)]
        scene = Scene(layer=index, keys=k, values=v, weights=weights, **about)
        tokens = reduce(scene, tokens)
        x = host.mlp(layer, torch.stack([token.value for token in tokens]))
        tokens = [Token(value, t.place, t.members) for value, t in zip(x, tokens, strict=True)]
    return tokens


def nothing(scene: Scene, tokens: list[Token]) -> list[Token]:
    """The reducer that leaves all tokens."""
    return tokens


def uniform_pool(factor: tuple[int, int, int]) -> Reducer:
    """Average boxes of tokens behind the embeddings."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        if scene.layer >= 0:
            return tokens
        boxes: dict[tuple[int, ...], list[Token]] = {}
        for token in tokens[scene.extra :]:
            place = token.place - scene.extra
            row, column = divmod(place, scene.shape[2])
            t, row = divmod(row, scene.shape[1])
            box = tuple(at // f for at, f in zip((t, row, column), factor, strict=True))
            boxes.setdefault(box, []).append(token)
        pooled = [
            Token(mean_of(box), box[0].place, [t.place for t in box]) for box in boxes.values()
        ]
        return tokens[: scene.extra] + pooled

    return reduce


def keep_places(places: Sequence[int]) -> Reducer:
    """Keep a given set of original positions behind the embeddings."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        return [t for t in tokens if t.place in places] if scene.layer < 0 else tokens

    return reduce


def match(metric: Sequence[Tensor], r: int) -> dict[int, int]:
    """ToMe's matching: {even place: odd place it merges into} for the `r` closest pairs."""
    pairs = []
    for a in range(0, len(metric), 2):
        scores = [
            (float(torch.cosine_similarity(metric[a], metric[b], dim=0)), -b)
            for b in range(1, len(metric), 2)
        ]
        best, negative = max(scores)
        pairs.append((-best, a, -negative))
    return {a: b for _, a, b in sorted(pairs)[:r]}


def merge(
    tokens: list[Token], into: dict[int, int], scale: Sequence[float] | None = None
) -> list[Token]:
    """Merge list places by the size-weighted mean; `scale` multiplies what sources add."""
    merged = []
    for b, token in enumerate(tokens):
        if b in into:
            continue
        total, mass, members = token.value * token.size, token.size, list(token.members)
        for a in sorted(a for a, target in into.items() if target == b):
            factor = 1.0 if scale is None else scale[a]
            total = total + factor * tokens[a].value * tokens[a].size
            mass += tokens[a].size
            members += tokens[a].members
        merged.append(Token(total / mass, token.place, members))
    return merged


def _merge_closest(
    scene: Scene,
    tokens: list[Token],
    metric: Sequence[Tensor],
    r: int,
    scale: Sequence[float] | None = None,
) -> list[Token]:
    free = len(tokens) - scene.extra
    found = match(metric[scene.extra :], min(r, free // 2))
    return merge(tokens, {a + scene.extra: b + scene.extra for a, b in found.items()}, scale)


def tome(r: int) -> Reducer:
    """Token merging; give `size_bias=True` to `encode` for proportional attention."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        if scene.keys is None:
            return tokens
        return _merge_closest(scene, tokens, list(scene.keys.mean(0)), r)

    return reduce


def vid_tldr(share: Sequence[float]) -> Reducer:
    """vid-TLDR with the mean of the heads' entropies."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        if scene.weights is None or scene.layer >= len(share):
            return tokens
        entropy = -(scene.weights * scene.weights.log()).sum(-1).mean(0)
        focus = [-float(h) for h in entropy]
        unit = [(f - min(focus)) / (max(focus) - min(focus)) for f in focus]
        cut = [max(u - sum(unit) / len(unit), 0.0) for u in unit]
        salient = [c / max(cut) for c in cut]
        r = round(share[scene.layer] * math.prod(scene.shape))
        return _merge_closest(scene, tokens, [t.value for t in tokens], r, salient)

    return reduce


def rlt(threshold: float) -> Reducer:
    """Run-length tokens: compare with the last tubelet that was kept at the same place."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        if scene.layer >= 0:
            return tokens
        kept = set(range(scene.extra))
        frames, height, width = scene.shape
        for row in range(height):
            for column in range(width):
                last = None
                for t in range(frames):
                    box = _tubelet(scene, t, row, column)
                    if last is None or float((box[-1] - last[0]).abs().mean()) >= threshold:
                        kept.add(scene.extra + (t * height + row) * width + column)
                        last = box
        return [token for token in tokens if token.place in kept]

    return reduce


def _tubelet(scene: Scene, t: int, row: int, column: int) -> Tensor:
    depth, tall, wide = (
        whole // parts
        for whole, parts in zip(
            (scene.pixels.shape[0], *scene.pixels.shape[2:]), scene.shape, strict=True
        )
    )
    clip = scene.pixels[t * depth : (t + 1) * depth]
    return clip[:, :, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]


def ats(first_layer: int, samples: int, min_tokens: int) -> Reducer:
    """Adaptive token sampling by walking the sorted cumulative significance."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        video = len(tokens) - scene.extra
        if scene.weights is None or scene.layer < first_layer or video <= min_tokens:
            return tokens
        norms = scene.values.norm(dim=-1)
        heads = range(len(norms))
        score = [
            sum(float(scene.weights[h, 0, j]) * float(norms[h, j]) for h in heads)
            for j in range(scene.extra, len(tokens))
        ]
        picked = {scene.extra + j for j in sample_cdf(score, samples)}
        if len(picked) < min_tokens:
            return tokens
        return [t for j, t in enumerate(tokens) if j < scene.extra or j in picked]

    return reduce


def sample_cdf(score: Sequence[float], samples: int) -> set[int]:
    """Entries nearest to evenly spaced levels of the min-max scaled cumulative score."""
    order = sorted(range(len(score)), key=lambda j: score[j])
    running, cdf = 0.0, []
    for j in order:
        running += score[j]
        cdf.append(running)
    low, high = cdf[0], cdf[-1]
    cdf = [(c - low) / (high - low) for c in cdf]
    start = min(c for c in cdf if c > 0)
    levels = [start + (1 - start) * i / (samples - 1) for i in range(samples)]
    places = range(len(cdf))
    return {order[min(places, key=lambda i: (abs(cdf[i] - level), i))] for level in levels}


def evad(keep_ratio: float, keyframe_weight: float, layers: Sequence[int]) -> Reducer:
    """Keyframe-centric dropping on the materialised map."""

    def reduce(scene: Scene, tokens: list[Token]) -> list[Token]:
        if scene.weights is None or scene.layer not in layers:
            return tokens
        key = scene.shape[0] // 2
        weight = [keyframe_weight if scene.frame(t) == key else 1.0 for t in tokens]
        heads, num = scene.weights.shape[:2]
        received = [
            sum(weight[i] * float(scene.weights[h, i, j]) for h in range(heads) for i in range(num))
            for j in range(num)
        ]
        guarded = {j for j, t in enumerate(tokens) if scene.frame(t) in (key, -1)}
        spare = max(math.ceil(keep_ratio * num - 1e-9) - len(guarded), 0)
        others = sorted(set(range(num)) - guarded, key=lambda j: (-received[j], j))
        return [t for j, t in enumerate(tokens) if j in guarded or j in others[:spare]]

    return reduce


@torch.no_grad()
def testa(model: Any, pixels: Tensor, frames: int, patches: int) -> Tensor:
    """Logits of a divided TimeSformer that merges frames, then patches, in every layer."""
    host = TimeSformer(model)
    return torch.cat([_testa_one(host, clip[None], frames, patches) for clip in pixels])


def _testa_one(host: TimeSformer, clip: Tensor, r_frames: int, r_patches: int) -> Tensor:
    embedded, shape = host.embed(clip)
    head, rest = embedded[0], iter(embedded[1:])
    # rows[t][p]: time in rows, so that the order of rows is the order of time.
    rows = [
        [Token(next(rest), p, [0]) for p in range(shape[1] * shape[2])] for _ in range(shape[0])
    ]
    for layer in host.layers:
        rows = _temporal(layer, rows, r_frames)
        head, rows = _spatial(layer, head, rows, r_patches)
        head = host.mlp(layer, head)
        rows = [[Token(host.mlp(layer, t.value), t.place, t.members) for t in r] for r in rows]
    return host.model.classifier(host.base.layernorm(head))[None]


def _temporal(layer: Any, rows: list[list[Token]], r: int) -> list[list[Token]]:
    columns, keys = [list(column) for column in zip(*rows, strict=True)], []
    for column in columns:
        x = torch.stack([t.value for t in column])
        q, k, v = split_qkv(layer.temporal_attention.attention, layer.temporal_layernorm(x))
        mixed = layer.temporal_attention.output.dense(attend(q, k, v)[0])
        x = x + layer.temporal_dense(mixed)
        column[:] = [Token(y, t.place, t.members) for y, t in zip(x, column, strict=True)]
        keys.append(k.mean(0))
    pairs = []
    for a in range(0, len(rows), 2):
        votes = [
            (sum(float(torch.cosine_similarity(k[a], k[b], dim=0)) for k in keys) / len(keys), -b)
            for b in range(1, len(rows), 2)
        ]
        if votes:
            best, negative = max(votes)
            pairs.append((-best, a, -negative))
    into = {a: b for _, a, b in sorted(pairs)[: min(r, len(rows) // 2)]}
    return [list(row) for row in zip(*(merge(column, into) for column in columns), strict=True)]


def _spatial(
    layer: Any, head: Tensor, rows: list[list[Token]], r: int
) -> tuple[Tensor, list[list[Token]]]:
    updates, after = [], []
    for row in rows:
        x = torch.stack([head, *(t.value for t in row)])
        q, k, v = split_qkv(layer.attention.attention, layer.layernorm_before(x))
        mixed = layer.attention.output.dense(attend(q, k, v)[0])
        updates.append(mixed[0])
        x = x + mixed
        new = [Token(y, t.place, t.members) for y, t in zip(x[1:], row, strict=True)]
        into = match(list(k.mean(0)[1:]), min(r, len(row) // 2))
        after.append(merge(new, into))
    return head + sum(updates) / len(updates), after
