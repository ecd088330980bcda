"""Token reduction inside a language model, by what its own attention looks at."""

from dataclasses import dataclass
from typing import ClassVar

from tubelet.core.assignment import TokenAssignment
from tubelet.core.prompt import LayerContext
from tubelet.core.recipe import LayerReduction, Paper, param
from tubelet.ops.merge import drop
from tubelet.ops.select import budget, top_k


@dataclass(frozen=True, kw_only=True)
class FastV(LayerReduction):
    """Keep the video tokens that the last prompt token attends to most in an early layer.

    The score is one row of the attention of the layer before, averaged over heads; no attention
    map exists. The paper speaks of the attention that a token receives on average; the authors'
    code, followed here, takes the last token's. They use layer 2 or 3 and a ratio of 0.5 or 0.25.
    """

    paper = Paper("An Image is Worth 1/2 Tokens After Layer 2", "2403.06764", "ECCV", 2024)
    identity: ClassVar = {"keep_ratio": 1.0}
    statistics: ClassVar[bool] = True

    keep_ratio: float = param(0.5, "share of the video tokens kept", above=0, most=1)
    layer: int = param(2, "first layer that sees fewer tokens, 0-based", least=1)

    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        if self.keep_ratio == 1:
            return None
        num = budget(ctx.num_tokens, self.keep_ratio)
        score = ctx.statistics().rows([-1]).mean((0, 1))
        return drop(top_k(score[None], num), num)
