"""Softmax temperature: sharper attention for longer sequences."""

import math
from dataclasses import dataclass
from typing import ClassVar

from tubelet.core.context import AttentionContext, Site
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import Paper, SparseAttention, param


@dataclass(frozen=True, kw_only=True)
class TempScale(SparseAttention):
    """Divide the attention logits by a temperature below 1, against collapse at great length.

    With `trained_tokens` the temperature follows the number of keys instead:
    log(trained_tokens) / log(keys), so attention keeps its sharpness when a model meets another
    number of tokens than it was trained with.
    Not settled: only the abstract of the paper (on text embedding models) was at hand; the
    default of 0.9 is ours and the length rule is the related log-length form.
    """

    paper = Paper("Length-Induced Embedding Collapse", "2410.24200", "ACL", 2025)
    identity: ClassVar = {"temperature": 1.0}
    requires: ClassVar[frozenset[str]] = frozenset({"attention"})

    temperature: float = param(0.9, "divides the logits; below 1 sharpens", above=0)
    trained_tokens: int | None = param(
        None, "tokens per attention call in training; replaces `temperature`", least=2
    )

    def acts_on(self, site: Site) -> bool:
        kinds = ("joint", "temporal", "spatial")
        return site.kind in kinds and site.layer >= self.dense_layers

    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        if self.trained_tokens is None:
            return AttentionPlan(temperature=self.temperature)
        keys = max(ctx.key.shape[2], 2)
        return AttentionPlan(temperature=math.log(self.trained_tokens) / math.log(keys))
