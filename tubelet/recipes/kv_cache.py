"""Key-value caches: tokens stored in fewer bits, and read only where they matter."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.core.kv import BITS, ReadContext, StoreContext
from tubelet.core.recipe import KVReads, KVStorage, Paper, param
from tubelet.ops.score import rank_of, white_noise
from tubelet.ops.select import budget, kept_positions, top_k
from tubelet.ops.tools import PLAIN


@dataclass(frozen=True, kw_only=True)
class ZipCache(KVStorage):
    """Store salient tokens in four bits and the others in two.

    A token's saliency is the attention that it receives from a few sampled tokens, divided by
    how many of them could see it: without that, early tokens win by being seen more often. The
    samples are the latest tokens and random earlier ones. Heads are averaged. Keys are quantised
    channel by channel, values token by token behind a division of each channel by the square root
    of its largest magnitude. New tokens are kept as they came until there are `every` of them.
    The cache is restored to its dtype at each step, layer by layer, so steps are not faster; the
    authors fuse that with attention. The samples' attention is computed once more, twice over, in
    every layer: a tenth of the prompt's queries.
    Not settled: whether the authors decide again on tokens that are stored already; not here.
    """

    paper = Paper("ZipCache", "2405.14256", "NeurIPS", 2024)
    identity: ClassVar = {"salient_bits": 16, "other_bits": 16}

    salient: float = param(0.6, "share of the tokens that count as salient", least=0, most=1)
    salient_bits: int = param(4, "bits per number of a salient token: 2, 4, 8 or 16 (as it came)")
    other_bits: int = param(2, "bits per number of any other token")
    latest: float = param(
        0.05, "share of the tokens, the latest, that are samples", above=0, most=1
    )
    sampled: float = param(0.05, "share that are random samples", least=0, most=1)
    seed: int = param(0, "which random samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("salient_bits", "other_bits"):
            if getattr(self, name) not in BITS:
                raise RecipeError(
                    f"ZipCache.{name} must be one of {', '.join(map(str, BITS))}, got "
                    f"{getattr(self, name)}"
                )

    def store(self, ctx: StoreContext) -> Tensor | None:
        if self.salient_bits == self.other_bits == 16:
            return None
        samples = self._samples(ctx.num_tokens, ctx.queries.device)
        queries, seen_up_to = ctx.queries[:, samples], samples + ctx.num_before
        tools = ctx.tools or PLAIN
        totals = tools.row_totals(queries, ctx.keys, seen_up_to, ctx.scale)
        given = tools.received(queries, ctx.keys, seen_up_to, ctx.scale, totals).mean(0)
        received = given[ctx.num_before :]
        places = torch.arange(ctx.num_tokens, device=samples.device)
        # The last token is a sample, so every token is seen by one.
        seen = len(samples) - torch.searchsorted(samples, places)
        salient = rank_of(received / seen) < round(ctx.num_tokens * self.salient)
        return torch.where(salient, self.salient_bits, self.other_bits)

    def _samples(self, num: int, device: torch.device) -> Tensor:
        """Places of the samples, ascending."""
        latest = budget(num, self.latest)
        others = num - latest
        wanted = min(others, round(num * self.sampled))
        places = torch.arange(others, num, device=device)
        if wanted == 0:
            return places
        noise = white_noise(others, self.seed, device)
        random = noise.argsort(stable=True, descending=True)[:wanted]
        return torch.cat([random.sort().values, places])


@dataclass(frozen=True, kw_only=True)
class TidalDecode(KVReads):
    """Let a few layers look at the whole cache, and all layers behind them at what these found.

    For each next token the layers up to the first of `layers` read everything. What the heads of
    that layer attend to most is all that the layers behind it read, up to the next of `layers`,
    which reads everything and finds anew. Which layer does best as the second depends on the
    model; the authors' is 9 for LLaMA.
    Heads that share a head of the cache read what they attend to most together; the authors'
    models have no such heads. Everything stays in the cache: fewer bytes are read, none are freed.
    """

    paper = Paper("TidalDecode", "2410.05076", "ICLR", 2025)
    identity: ClassVar = {"tokens": 2**40}

    layers: tuple[int, ...] = param(
        (2, 9), "layers that read everything and find, 0-based", least=0
    )
    tokens: int = param(256, "tokens that each head reads elsewhere", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise RecipeError("TidalDecode.layers must name at least one layer")

    def acts_on(self, site: Site) -> bool:
        """Behind the first layer that finds, but for those that find again."""
        behind = super().acts_on(site) and site.layer > min(self.layers)
        return behind and site.layer not in self.layers

    def read(self, ctx: ReadContext) -> Tensor | None:
        if self.tokens >= ctx.num_tokens:
            return None
        if ctx.site.layer - 1 in self.layers:
            heads = ctx.attention().unflatten(0, (ctx.kv_heads, -1)).mean(1)
            ctx.state["found"] = kept_positions(top_k(heads, self.tokens), self.tokens)
        return ctx.state["found"]


@dataclass(frozen=True, kw_only=True)
class DyCokeDecoding(KVReads):
    """Read, for each next token, the video tokens that it attends to most in an early layer.

    The attention of the new token in the layer before, averaged over heads, picks the video
    tokens that all layers from `layer` on read, beside all other tokens. Where it is nearly that
    of the step before, the choice of that step stays.
    This is the second half of DyCoke; the first shortens the prompt. Nothing leaves the cache, so
    no memory is saved.
    The authors' code chose nothing as released, left such steps unpruned and kept its choice
    from one prompt to the next; here as the paper means it. Their code drops 0.8, their
    instructions 0.7, which is the default here.
    """

    paper = Paper("DyCoke", "2411.15024", "CVPR", 2025)
    identity: ClassVar = {"keep_ratio": 1.0}

    keep_ratio: float = param(0.3, "share of the video tokens read", above=0, most=1)
    layer: int = param(3, "first layer that reads less, 0-based", least=1)
    likeness: float = param(0.9, "cosine of two steps' attention from which a choice stays")

    def acts_on(self, site: Site) -> bool:
        """From `layer` on."""
        return super().acts_on(site) and site.layer >= self.layer

    def read(self, ctx: ReadContext) -> Tensor | None:
        if self.keep_ratio == 1:
            return None
        if ctx.site.layer == self.layer:
            self._choose(ctx)
        if ctx.state["read_of"] != ctx.num_tokens:
            raise UnsupportedError(
                f"{self.name} needs all layers from {self.layer} on to hold the same tokens, but "
                f"layer {ctx.site.layer} holds {ctx.num_tokens} where layer {self.layer} holds "
                f"{ctx.state['read_of']}; use it without recipes that shorten deeper layers"
            )
        return ctx.state["read"]

    def _choose(self, ctx: ReadContext) -> None:
        """What all layers read in this step. Only the first step waits for the device."""
        state = ctx.state
        if "video" not in state:
            state["video"] = ctx.video.nonzero()[:, 0]
        video, state["read_of"], state["read"] = state["video"], ctx.num_tokens, None
        if not len(video):
            return
        num = budget(len(video), self.keep_ratio)
        seen = ctx.attention().mean(0)[video]
        kept = top_k(seen, num)
        if "seen" in state:
            alike = F.cosine_similarity(seen, state["seen"], dim=0) >= self.likeness
            kept = torch.where(alike, state["kept"], kept)
        state["seen"], state["kept"] = seen, kept
        read = torch.ones(1, ctx.num_tokens, dtype=torch.bool, device=seen.device)
        read[0, video] = kept
        state["read"] = kept_positions(read, ctx.num_tokens - len(video) + num)
