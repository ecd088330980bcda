"""Token reductions that are trained: their modules come with the host, as `model.reducers`."""

from dataclasses import dataclass
from typing import Any, ClassVar

from tubelet.core.context import Site, TokenContext
from tubelet.core.errors import RecipeError
from tubelet.core.learned import LearnedPlan
from tubelet.core.recipe import LearnedReduction, Paper, param
from tubelet.ops.select import budget

LEARNED_LAYERS = (0, 1, 2)
"""Layers that the shipped reducers were trained to act at."""

LEARNED_KEEPS = (0.05, 0.75)
"""Range of the keep ratios that they were trained with."""


@dataclass(frozen=True, kw_only=True)
class GumbelKeep(LearnedReduction):
    """Keep the tokens with the highest learned keep score, at one layer or at several.

    The score reads a token next to the mean of all. In training, Gumbel noise on the scores picks
    the tokens, which are removed physically, and a straight-through factor carries the gradient;
    the module's `penalty` is the ratio loss. DynamicViT (2106.02034), STPrivacy (2301.03046) and
    IA-RED2 (2106.12620) are of this family.
    Gap from paper: training removes tokens instead of masking them in attention, and their number
    is exact; STPrivacy's privacy adversary is not here, IA-RED2 trains by REINFORCE instead.
    All layers share one module; the budget shifts its scores, so one training serves all budgets.
    """

    paper = Paper("DynamicViT", arxiv="2106.02034", venue="NeurIPS", year=2021)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "trained gumbel-keep"})

    keep_ratio: float = param(
        0.7, "share of the video tokens kept at each of the layers", above=0, most=1
    )
    layers: tuple[int, ...] = param((2,), "layers that drop tokens, 0-based", least=0)
    context: float = param(
        0.0, "share of the kept tokens that is picked at random", least=0, most=1
    )

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer in self.layers

    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        num = budget(ctx.num_tokens - ctx.protected, self.keep_ratio)
        random = round(self.context * num)
        return _transformed(ctx, "gumbel-keep", self.keep_ratio, context=random)


@dataclass(frozen=True, kw_only=True)
class TokenSlimming(LearnedReduction):
    """Pool the tokens into fewer slots, each a learned softmax-weighted mean of all of them.

    Weights are a softmax over tokens of scale * MLP(LN x); the way back mixes slots by the same
    weights, normalised over slots, and a channel MLP that also sees the tokens before slimming.
    TokenLearner v1.1 (2106.11297) is the same algebra with a narrower MLP.
    Gap from paper: one slimming instead of three; slots lie on a coarse grid (so a few less may
    remain than asked for) and their weights start as a soft window, because hosts with rotary
    positions do not put positions into their tokens; no distillation loss is built in.
    """

    paper = Paper("Self-slimmed Vision Transformer", arxiv="2111.12624", venue="ECCV", year=2022)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "trained token-slimming"})

    keep_ratio: float = param(0.5, "slots as a share of the video tokens", above=0, most=1)
    layer: int = param(2, "layer that slims, 0-based", least=0)
    recover: bool = param(True, "learned way back; False repeats each slot at its places")

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer == self.layer

    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        return _transformed(ctx, "token-slimming", self.keep_ratio, recover=self.recover)


@dataclass(frozen=True, kw_only=True)
class LookupViT(LearnedReduction):
    """Run the layers on a pooled grid that reads from all tokens once and writes back at the end.

    Compressed tokens attend to the lookup tokens (all of them); the host's remaining layers are
    the self-attention and MLP on the compressed set; then the lookup tokens are updated over the
    transpose of the read's logits and by a small MLP.
    Gap from paper: one exchange around the remaining layers instead of one in each block; lookup
    tokens also take over what their compressed token gained, so that an untrained module equals
    plain pooling; a few tokens less may remain than asked for.
    Not settled: the authors published no code.
    """

    paper = Paper("LookupViT", arxiv="2407.12753", venue="ECCV", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "trained lookup"})

    keep_ratio: float = param(0.25, "compressed tokens as a share of all", above=0, most=1)
    layer: int = param(2, "layer that compresses, 0-based", least=0)
    recover: bool = param(True, "update the lookup tokens; False repeats the compressed ones")

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer == self.layer

    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        return _transformed(ctx, "lookup", self.keep_ratio, recover=self.recover)


@dataclass(frozen=True, kw_only=True)
class VTM(LearnedReduction):
    """Merge the tokens of low learned saliency into the most similar salient ones.

    Saliency is sigmoid(linear(x)); it also weighs the mean, which gives the score its gradient. In
    training it weighs destinations as attention keys too, without effect on values.
    Gap from paper: the score's auxiliary path is this key weight; the region-concentrated and
    motion-based variants are not here. The authors published no code.
    """

    paper = Paper("Video Token Merging", arxiv="2410.23782", venue="NeurIPS", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "trained vtm"})

    keep_ratio: float = param(0.5, "share of the video tokens left", above=0, most=1)
    layer: int = param(2, "layer that merges, 0-based", least=0)

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer == self.layer

    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        return _transformed(ctx, "vtm", self.keep_ratio)


@dataclass(frozen=True, kw_only=True)
class STViT(LearnedReduction):
    """Replace the tokens by semantic tokens: pooled seeds that attend to seeds and tokens.

    Two refinement blocks, the second with a learned global set added; the rest of the host runs on
    the semantic tokens. On the way back every token queries them (STViT-R).
    Gap from paper: one reduction and one recovery instead of a pattern that repeats; attention
    goes to all tokens rather than to unfolded windows; a few tokens less may remain than asked for.
    """

    paper = Paper(
        "Making Vision Transformers Efficient from A Token Sparsification View",
        arxiv="2303.08685",
        venue="CVPR",
        year=2023,
    )
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "trained semantic-tokens"})

    keep_ratio: float = param(0.25, "semantic tokens as a share of all", above=0, most=1)
    layer: int = param(2, "layer that forms them, 0-based", least=0)
    recover: bool = param(True, "tokens query the semantic ones; False repeats these")

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer == self.layer

    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        return _transformed(ctx, "semantic-tokens", self.keep_ratio, recover=self.recover)


@dataclass(frozen=True, kw_only=True)
class HoT(LearnedReduction):
    """Keep the centres of density-peak clusters and recover all tokens by cross-attention.

    Density is that of the two nearest neighbours; a centre is dense and far from any denser token.
    Centres stay in their order and get learned positions.
    Gap from paper: the authors cluster the frames of a pose sequence (joints pooled) and recover
    frames; here video tokens are clustered, compared after normalising each. Their density has a
    little random noise; here equal scores go by index. The queries of the recovery are the tokens
    before the reduction, plus learned positions.
    """

    paper = Paper("Hourglass Tokenizer", arxiv="2311.12028", venue="CVPR", year=2024)
    identity: ClassVar = {"keep_ratio": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"any subset", "trained hot"})

    keep_ratio: float = param(1 / 3, "share of the video tokens kept", above=0, most=1)
    layer: int = param(2, "layer that prunes, 0-based", least=0)
    recover: bool = param(True, "learned way back; False repeats each centre in its cluster")

    def acts_on(self, site: Site) -> bool:
        return site.kind == "joint" and site.layer == self.layer

    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        return _transformed(ctx, "hot", self.keep_ratio, recover=self.recover)


def learned_recipes() -> dict[str, type[LearnedReduction]]:
    """The recipes of this file, by name."""
    final = (cls for cls in globals().values() if isinstance(cls, type))
    return {
        cls.__name__: cls
        for cls in final
        if issubclass(cls, LearnedReduction) and cls is not LearnedReduction
    }


def at_layer(name: str, layer: int, keep_ratio: float) -> LearnedReduction:
    """A learned recipe by name that reduces once, at that layer.

    Raises:
        RecipeError: No learned recipe of that name.
    """
    recipes = learned_recipes()
    if name not in recipes:
        raise RecipeError(f"no learned recipe {name!r}; known: {', '.join(recipes)}")
    fields: dict[str, Any] = {"keep_ratio": keep_ratio}
    fields |= {"layers": (layer,)} if name == "GumbelKeep" else {"layer": layer}
    return recipes[name](**fields)


def _transformed(
    ctx: TokenContext, name: str, keep_ratio: float, **options: Any
) -> LearnedPlan | None:
    """The host's module of that name on the video tokens, behind the class tokens."""
    lead = ctx.protected
    num = budget(ctx.num_tokens - lead, keep_ratio)
    if num == ctx.num_tokens - lead:
        return None
    place = ctx.anchor[:, lead:] - ctx.grid.before
    plan = ctx.trained(name)(ctx.hidden[:, lead:], place, ctx.grid, num, **options)
    return plan.behind(ctx.hidden[:, :lead])
