"""The ceiling of a token reduction: the same token counts, obtained by mere slicing."""

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site, TokenContext
from tubelet.core.learned import LearnedPlan
from tubelet.core.recipe import Recipe, TokenRecipe, TokenReduction, param


@dataclass(frozen=True, kw_only=True)
class Sliced(TokenReduction):
    """Keep the first tokens at given places, without looking at any of them."""

    requires: ClassVar[frozenset[str]] = frozenset()

    kept: tuple[tuple[int, str, int], ...] = param((), "(layer, site kind, tokens left)")

    def acts_on(self, site: Site) -> bool:
        return any((layer, kind) == (site.layer, site.kind) for layer, kind, _ in self.kept)

    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        targets = {(layer, kind): left for layer, kind, left in self.kept}
        left = targets[ctx.site.layer, ctx.site.kind]
        if left >= ctx.num_tokens:
            return None
        first = torch.arange(left, device=ctx.hidden.device).expand(ctx.hidden.shape[0], left)
        return TokenAssignment.keep(first, ctx.num_tokens)


class CountLog:
    """Notes how many tokens a recipe leaves at each site."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], list[int]] = defaultdict(list)

    def watch(self, recipe: Recipe) -> Recipe:
        """The same recipe, noting its counts here; other stages pass through."""
        if not isinstance(recipe, TokenRecipe):
            return recipe
        name = recipe.decides
        watched, decide = copy.copy(recipe), getattr(recipe, name)

        def noting(ctx: TokenContext) -> Any:
            result = decide(ctx)
            seen = self._seen[ctx.site.layer, ctx.site.kind]
            if result is None:
                seen += [ctx.num_tokens] * ctx.hidden.shape[0]
            elif isinstance(result, TokenAssignment | LearnedPlan):
                seen += [result.num_out] * result.batch
            else:
                seen += result.sum(1).tolist()
            return result

        object.__setattr__(watched, name, noting)
        return watched

    def sliced(self) -> Sliced | None:
        """The slicing with the same mean counts; None when nothing was noted."""
        if not self._seen:
            return None
        kept = tuple(
            (layer, kind, round(sum(left) / len(left)))
            for (layer, kind), left in self._seen.items()
        )
        return Sliced(kept=kept)
