"""What happened where: the record that a handle keeps while the model runs."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tubelet.core.context import StepContext


@dataclass
class Report:
    """Tokens, attention calls and fall-backs of the runs since `accelerate`.

    Args:
        model: Class name of the host model.
        recipes: The recipes at work, as strings.
    """

    model: str
    recipes: tuple[str, ...]
    calls: int = 0
    tokens_in: float = 0
    _layers: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    _changes: dict[tuple[str, str], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    attention: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    """Tokens of key-value caches by recipe and bits, summed over layers and prompts."""
    cache_bytes: tuple[int, int] | None = None
    """Bytes that the latest key-value cache holds, and those of one that holds all as it came."""
    _shares: list[tuple[int, StepContext | None, Tensor]] = field(default_factory=list)
    _checks: list[tuple[int, StepContext | None, Tensor, Tensor, float]] = field(
        default_factory=list
    )

    def sparse_call(self, layer: int, step: StepContext | None, shares: Tensor) -> None:
        """An attention call computed these shares [H] of its block pairs; not waited for."""
        self._shares.append((layer, step, shares))

    def verified_call(
        self, layer: int, step: StepContext | None, error: Tensor, recall: Tensor, cost: float
    ) -> None:
        """A call was compared with dense rows; see `tubelet.models.verify`."""
        self._checks.append((layer, step, error, recall, cost))

    def densities(self) -> list[dict[str, Any]]:
        """Block density of each sparse call: layer, step, branch, and one number per head."""
        return [{**_when(layer, step), "heads": s.tolist()} for layer, step, s in self._shares]

    def verified(self) -> list[dict[str, Any]]:
        """Relative error, recall of softmax mass (None if unknown) and cost of verified calls."""
        return [
            {**_when(layer, step), "error": float(error), "recall": _known(recall), "cost": cost}
            for layer, step, error, recall, cost in self._checks
        ]

    @property
    def mean_density(self) -> float | None:
        """Mean block density of all sparse calls; None without any."""
        if not self._shares:
            return None
        return sum(float(s.mean()) for _, _, s in self._shares) / len(self._shares)

    def start_run(self, tokens: float) -> None:
        """A forward pass begins with `tokens` tokens per sample (mean over the batch)."""
        self.calls += 1
        self.tokens_in = tokens

    def enter_layer(self, layer: int, tokens: float) -> None:
        """`tokens` tokens per sample (mean over the batch) enter a layer."""
        self._layers[layer].append(tokens)

    def change(self, recipe: str, site: str, before: float, after: float) -> None:
        """A recipe reduced tokens per sample at a site."""
        self._changes[recipe, site].append((before, after))

    def acted(self, recipe: str) -> bool:
        """Whether `recipe` changed anything so far."""
        shrunk = any(
            after < before
            for (name, _), pairs in self._changes.items()
            if name == recipe
            for before, after in pairs
        )
        seen = [*self.attention, *self.stored]
        return shrunk or any(key.startswith(f"{recipe}: ") for key in seen)

    @property
    def tokens_per_layer(self) -> list[float]:
        """Mean tokens per sample entering each layer, over all runs."""
        return [sum(seen) / len(seen) for _, seen in sorted(self._layers.items())]

    @property
    def mean_tokens(self) -> float | None:
        """Mean of `tokens_per_layer`; None before the first run."""
        counts = self.tokens_per_layer
        return sum(counts) / len(counts) if counts else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        changes = [
            {
                "recipe": recipe,
                "site": site,
                "before": sum(b for b, _ in pairs) / len(pairs),
                "after": sum(a for _, a in pairs) / len(pairs),
            }
            for (recipe, site), pairs in self._changes.items()
        ]
        return {
            "model": self.model,
            "recipes": list(self.recipes),
            "calls": self.calls,
            "tokens_in": self.tokens_in,
            "tokens_per_layer": self.tokens_per_layer,
            "changes": changes,
            "attention": dict(self.attention),
            "fallbacks": dict(self.fallbacks),
            "stored": dict(self.stored),
            "cache_bytes": None if self.cache_bytes is None else list(self.cache_bytes),
            "densities": self.densities(),
            "verified": self.verified(),
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: {', '.join(self.recipes) or 'no recipe'}, {self.calls} runs"]
        counts = self.tokens_per_layer
        if counts:
            mean = sum(counts) / len(counts)
            shown = " ".join(f"{count:.0f}" for count in counts)
            lines.append(f"tokens entering each layer (of {self.tokens_in:.0f}): {shown}")
            lines.append(f"mean over layers: {mean:.1f} ({mean / max(self.tokens_in, 1):.1%})")
        for row in self.to_dict()["changes"]:
            before, after = row["before"], row["after"]
            lines.append(f"  {row['recipe']} at {row['site']}: {before:.0f} -> {after:.0f}")
        if self.mean_density is not None:
            lines.append(
                f"mean block density of {len(self._shares)} calls: {self.mean_density:.1%}"
            )
        checks = self.verified()
        if checks:
            mean = {n: sum(c[n] for c in checks) / len(checks) for n in ("error", "cost")}
            known = [c["recall"] for c in checks if c["recall"] is not None]
            recall = f", recall {sum(known) / len(known):.1%}" if known else ""
            worst = max(checks, key=lambda c: c["error"])
            lines.append(
                f"verified at {mean['cost']:.2%} of dense: error {mean['error']:.3f} (worst "
                f"{worst['error']:.3f} in layer {worst['layer']}){recall}"
            )
        if self.cache_bytes is not None:
            held, dense = self.cache_bytes
            lines.append(
                f"key-value cache: {held / 2**20:.2f} MiB of {dense / 2**20:.2f} "
                f"({held / max(dense, 1):.1%})"
            )
        lines += [f"  cache {what}: {n} tokens" for what, n in self.stored.items()]
        lines += [f"  attention {what}: {n} calls" for what, n in self.attention.items()]
        lines += [f"  fall-back: {why}: {n} times" for why, n in self.fallbacks.items()]
        return "\n".join(lines)


def _when(layer: int, step: StepContext | None) -> dict[str, Any]:
    return {
        "layer": layer,
        "step": None if step is None else step.step,
        "branch": None if step is None else step.branch,
    }


def _known(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
