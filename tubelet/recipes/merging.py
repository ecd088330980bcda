"""Token merging: ToMe and the methods that grew from it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site, TokenContext
from tubelet.core.recipe import Paper, TokenReduction, param
from tubelet.core.schedule import Schedule
from tubelet.ops.merge import alternate_similarity, bipartite_match
from tubelet.ops.score import saliency


@dataclass(frozen=True, kw_only=True)
class ToMe(TokenReduction):
    """Merge the r most similar pairs of tokens in every layer, between attention and MLP.

    Tokens are split by parity; each even token proposes its most similar odd token (cosine of
    the keys averaged over heads), the r strongest proposals merge by the size-weighted mean.
    The authors turn the log-size bias off for models trained by masked autoencoding and when
    training with merging; it is on here, as for supervised models used off the shelf.
    """

    paper = Paper("Token Merging: Your ViT But Faster", "2210.09461", "ICLR", 2023)
    identity: ClassVar = {"r": 0}
    statistics: ClassVar[frozenset[str]] = frozenset({"keys"})

    r: int | tuple[int, ...] = param(
        16, "tokens removed per layer: one number, or one per layer", least=0
    )
    inflection: float = param(
        0.0, "-1 removes most tokens early, +1 late, 0 evenly", least=-1, most=1
    )
    proportional: bool = param(True, "add log(size) to a merged token's attention logits")

    @property
    def size_bias(self) -> bool:
        return self.proportional

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint"

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        if isinstance(self.r, tuple):
            schedule = Schedule.listed(self.r)
        else:
            schedule = Schedule.linear(self.r, self.inflection)
        r = round(schedule.at(ctx.site.layer, ctx.site.num_layers))
        return merge_most_similar(ctx, ctx.statistics().keys(), r)


@dataclass(frozen=True, kw_only=True)
class VidTLDR(TokenReduction):
    """Merge background into the rest within the first layers, weighted by saliency.

    Saliency is negative attention entropy: focused tokens are salient. Source tokens are scaled
    by it before the size-weighted merge, so background that is merged away adds little;
    destinations are not scaled, and the denominator keeps the plain sizes.
    Gap from paper: the entropy is the mean of the heads' entropies, from fused attention; the
    paper takes the entropy of the head-mean map, which is never below it.
    Not settled: the authors give counts per data set on 2,352 tokens; the default here is their
    MSRVTT list for UMT-B as shares. Whether they add a log-size bias is not known; none is.
    """

    paper = Paper("vid-TLDR: Training Free Token Merging", "2403.13347", "CVPR", 2024)
    identity: ClassVar = {"share": (0.0,)}
    statistics: ClassVar[frozenset[str]] = frozenset({"entropy"})

    share: tuple[float, ...] = param(
        (600 / 2352, 200 / 2352, 100 / 2352),
        "share of the original video tokens merged away in each of the first layers",
        least=0,
        most=1,
    )

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer < len(self.share)

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        r = round(self.share[ctx.site.layer] * ctx.grid.num_video)
        if r == 0:
            return None
        salient = saliency(ctx.statistics().entropy())
        return merge_most_similar(ctx, ctx.hidden, r, source_scale=salient)


@dataclass(frozen=True, kw_only=True)
class TESTA(TokenReduction):
    """Merge similar frames after temporal attention and similar patches after spatial attention.

    Frames are matched by the similarity of their keys averaged over all places, which gives one
    common vote; patches are matched inside each frame. Outputs keep their order in time and
    space. Sizes weigh the means; no log-size bias, as in the paper.
    The method is trained in the paper; applied to a model trained without it, it loses accuracy.
    After patch merging, places of different frames no longer show the same patch, as in the
    authors' code.
    """

    paper = Paper("TESTA: Temporal-Spatial Token Aggregation", "2310.19060", "EMNLP", 2023)
    identity: ClassVar = {"frames": 0, "patches": 0}
    requires: ClassVar[frozenset[str]] = frozenset({"divided"})
    statistics: ClassVar[frozenset[str]] = frozenset({"keys"})

    frames: int = param(1, "frames merged away in each layer", least=0)
    patches: int = param(12, "patches merged away in each frame and layer", least=0)

    def acts_on(self, site: Site) -> bool:
        return site.kind in ("temporal", "spatial")

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        r = self.frames if ctx.site.kind == "temporal" else self.patches
        return merge_most_similar(ctx, ctx.statistics().keys(), r)


def merge_most_similar(
    ctx: TokenContext, metric: Tensor, r: int, source_scale: Tensor | None = None
) -> TokenAssignment | None:
    """Bipartite merge of at most half of the unprotected tokens; None when nothing merges.

    Args:
        ctx: The site; with `ctx.shared` > 1 the similarities of each run of that many groups are
            averaged, so that they get one common matching.
        metric: [G, N, D] features compared.
        r: Tokens to remove; capped at half of the unprotected tokens.
        source_scale: [G, N] factor on merged-away tokens, or None.
    """
    free = ctx.num_tokens - ctx.protected
    r = min(r, free // 2)
    if r <= 0:
        return None
    similarity = alternate_similarity(metric, ctx.protected)
    if ctx.shared > 1:
        common = similarity.unflatten(0, (-1, ctx.shared)).mean(1, keepdim=True)
        similarity = common.expand(-1, ctx.shared, -1, -1).flatten(0, 1)
    target, kept = bipartite_match(similarity, r, ctx.num_tokens, ctx.protected)
    if source_scale is not None:
        stays = source_scale.new_zeros(source_scale.shape).scatter(1, kept, 1.0)
        source_scale = stays + (1 - stays) * source_scale
    return TokenAssignment.merge(target, kept, ctx.size, source_scale)
