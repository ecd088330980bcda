"""What a recipe should bring, from two steps dense and two with it, before the runs are timed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tubelet.bench.amdahl import TimeSplit, speedup
from tubelet.bench.generators.combinations import Combination
from tubelet.bench.generators.drawing import Drawn, Task, draw
from tubelet.core.context import Site, StepContext
from tubelet.core.recipe import Recipe, SparseAttention
from tubelet.models.catalogue import adapter_for

STEPS = 2
"""Of a probe: the first warms up, the second sees a state from the middle of a run."""


@dataclass(frozen=True)
class Prediction:
    """A predicted speed-up of the whole run.

    Args:
        split: The dense step taken apart, and one sparse call, deciding and verification
            included.
    """

    split: TimeSplit

    @property
    def by_density(self) -> float:
        """If every computed pair cost what it costs dense attention, and deciding nothing."""
        split = self.split
        return speedup(split.share, split.density, dense_calls=split.dense_calls)

    @property
    def speedup(self) -> float:
        """With the speed that the sparse calls of the probe had."""
        return self.split.speedup

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        split = self.split
        return {
            "attention_share": split.share,
            "density": split.density,
            "dense_calls": split.dense_calls,
            "efficiency": split.efficiency,
            "limit": split.limit,
            "by_density": self.by_density,
            "speedup": self.speedup,
        }

    def __str__(self) -> str:
        split = self.split
        return (
            f"attention is {split.share:.0%} of the dense time (at most {split.limit:.2f}x), "
            f"density {split.density:.2f}, {split.dense_calls:.0%} of the calls dense: "
            f"{self.by_density:.2f}x by density, {self.speedup:.2f}x with kernel and selection "
            f"at {split.efficiency:.0%} of the dense speed per pair"
        )


def probe(model: nn.Module, task: Task, recipes: Combination = ()) -> Drawn:
    """Two steps of the same clip; recipes begin at once, not after their dense steps."""
    return draw(model, replace(task, steps=STEPS), tuple(map(at_once, recipes)))


def predict(
    sites: Sequence[Site], dense: Drawn, sparse: Drawn, recipes: Combination, steps: int
) -> Prediction:
    """Put the sparse calls of a probe in place of the dense ones.

    Args:
        sites: Attention calls of the model, by layer.
        dense, sparse: Probes without and with the recipes.
        recipes: As they will run.
        steps: Of the run to predict.
    """
    inside = dense.attention[-1]
    each = sum(inside) / len(inside)
    split = TimeSplit(
        rest=max(dense.step_seconds[-1] - sum(inside), 0.0),
        dense=sum(inside),
        call_dense=each,
        call_selection=0.0,
        call_attention=each,
        density=1.0,
        dense_calls=planned_dense(sites, recipes, steps),
    )
    assert sparse.report is not None
    seen = [d for d in sparse.report.densities() if d["step"] == STEPS - 1]
    if not seen:
        return Prediction(split)
    calls = [sparse.attention[-1][d["layer"]] for d in seen]
    shares = [sum(d["heads"]) / len(d["heads"]) for d in seen]
    return Prediction(
        replace(
            split,
            call_attention=sum(calls) / len(calls),
            density=sum(shares) / len(shares),
        )
    )


def planned_dense(sites: Sequence[Site], recipes: Combination, steps: int) -> float:
    """Share of the attention calls of a run that the recipes leave dense, by layer and step."""
    policies = [recipe for recipe in recipes if isinstance(recipe, SparseAttention)]
    dense = 0
    for site in sites:
        policy = next((recipe for recipe in policies if recipe.acts_on(site)), None)
        for step in range(steps):
            context = StepContext(step=step, num_steps=steps)
            dense += policy is None or policy.warming_up(context)
    return dense / (len(sites) * steps)


def sites_of(model: nn.Module) -> list[Site]:
    """Attention calls of a forward pass, in order."""
    return adapter_for(model).sites(model)


def at_once(recipe: Recipe) -> Recipe:
    """The recipe without its dense steps."""
    return replace(recipe, dense_steps=0.0) if isinstance(recipe, SparseAttention) else recipe
