"""What prompt recipes ask of a vision tower, kept while it encodes a video."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UnsupportedError
from tubelet.core.handle import Handle
from tubelet.core.prompt import VISION_STATISTICS
from tubelet.kernels.attention import CallStatistics, attention
from tubelet.models.packed_calls import batches
from tubelet.models.prompt import VideoPlace
from tubelet.models.watched_attention import watch

Pool = Callable[[Any, Mapping[str, Any], Sequence[VideoPlace], Tensor], Tensor]
"""[P, C] values of the tower's places, in its order, to [N, C] values of the projected tokens of
all videos, from base model, inputs and places."""


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """Facts about the vision tower of a video language model.

    Args:
        path: Of the tower in the base model.
        layers: Of its list of layers.
        attention: Of the attention module in a layer.
        class_tokens: Places in front of each frame that are no patches.
        pool: From the tower's places to the projector's tokens.
    """

    path: str
    layers: str
    attention: str
    class_tokens: int = 0
    pool: Pool


class VisionWatch:
    """Keeps statistics of one tower: a value or a vector per place, never an attention map."""

    def __init__(
        self,
        tower: VisionTower,
        base: Any,
        wanted: Iterable[tuple[str, int]],
        handle: Handle,
    ) -> None:
        self.facts, self.base = tower, base
        self.wanted = sorted(wanted)
        self.values: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.active = False
        if self.wanted:
            self._hook(base.get_submodule(tower.path), handle)

    def _hook(self, tower: nn.Module, handle: Handle) -> None:
        layers = list(tower.get_submodule(self.facts.layers).children())
        asked: dict[nn.Module, list[tuple[str, int]]] = defaultdict(list)
        for name, layer in self.wanted:
            if name not in VISION_STATISTICS:
                raise UnsupportedError(
                    f"unknown vision statistic {name!r}; known: {', '.join(VISION_STATISTICS)}"
                )
            if not -len(layers) <= layer < len(layers):
                raise UnsupportedError(
                    f"vision layer {layer} is not among the {len(layers)} of this tower"
                )
            if name == "class" and not self.facts.class_tokens:
                raise UnsupportedError("this vision tower has no class token to attend from")
            if name == "hidden":
                hooked = layers[layer].register_forward_hook(self._keep_hidden(layer))
                handle.on_remove(hooked.remove)
            else:
                asked[layers[layer].get_submodule(self.facts.attention)].append((name, layer))
        if asked:

            def see(
                module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Any
            ) -> None:
                if self.active:
                    for name, layer in asked[module]:
                        value = self._statistic(name, q, k, v, scale, lengths)
                        self.values[name, layer].append(value)

            watch(tower, asked, see, handle)

    def _keep_hidden(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.active:
                hidden = output[0] if isinstance(output, tuple) else output
                whole = hidden if hidden.ndim == 3 else hidden[None]
                self.values["hidden", layer].append(self._patches(whole).float())

        return hook

    def _statistic(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None
    ) -> Tensor:
        """[P, C] of a call; kernels for variable lengths get all frames as one sequence."""
        if lengths is None:
            return self._patches(self._measure(name, q, k, v, scale))
        rows, found = [], []
        for places, (queries, keys, values) in batches(lengths.diff().tolist(), q, k, v):
            value = self._measure(name, queries, keys, values, scale)
            found.append(self._patches(value))
            if places is None:
                return found[0]
            rows.append(self._patches(places.view(*value.shape[:2], 1))[:, 0])
        return torch.cat(found)[torch.cat(rows).argsort()]

    def _measure(self, name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, N, C] of separate sequences."""
        stats = CallStatistics(q, k, v, scale)
        if name == "keys":
            return stats.keys()
        if name == "class" or (name == "class or received" and self.facts.class_tokens):
            return stats.rows([0]).mean((1, 2))[..., None]
        lse = attention(q, k, v, scale=scale)[1]
        return CallStatistics(q, k, v, scale, lse).received()[..., None] / q.shape[2]

    def _patches(self, x: Tensor) -> Tensor:
        """[frames, places, C] without class tokens, as [P, C]."""
        return x[:, self.facts.class_tokens :].flatten(0, 1)

    def start(self) -> None:
        """The tower is about to encode."""
        self.values.clear()
        self.active = True

    def finish(
        self, inputs: Mapping[str, Any], places: Sequence[VideoPlace]
    ) -> list[dict[tuple[str, int], Tensor]]:
        """[1, N] or [1, N, C] float32 of each statistic, for each video."""
        self.active = False
        sizes = [place.grid.num_video for place in places]
        found: list[dict[tuple[str, int], Tensor]] = [{} for _ in places]
        for key in self.wanted:
            seen = self.values.pop(key)
            pooled = self.facts.pool(self.base, inputs, places, torch.cat(seen).float())
            for video, part in zip(found, pooled.split(sizes), strict=True):
                single = key[0] not in ("keys", "hidden")
                video[key] = (part[:, 0] if single else part)[None]
        return found

    def stop(self) -> None:
        """The tower failed; nothing is kept."""
        self.active = False
        self.values.clear()


# Ways from patches to tokens


def same(base: Any, inputs: Any, places: Sequence[VideoPlace], values: Tensor) -> Tensor:
    """Every patch is a token."""
    return values


def runs(base: Any, inputs: Any, places: Sequence[VideoPlace], values: Tensor) -> Tensor:
    """Consecutive patches of equal number are a token: their mean."""
    return values.unflatten(0, (_num_tokens(places), -1)).mean(1)


def squares(base: Any, inputs: Any, places: Sequence[VideoPlace], values: Tensor) -> Tensor:
    """Square blocks of patches are a token: their mean."""
    maps, grid = _maps(places, values)
    return F.adaptive_avg_pool2d(maps, (grid.height, grid.width)).flatten(2).mT.flatten(0, 1)


def resized(base: Any, inputs: Any, places: Sequence[VideoPlace], values: Tensor) -> Tensor:
    """The map of a frame is resized bilinearly, as the host does with features."""
    maps, grid = _maps(places, values)
    small = F.interpolate(maps, size=(grid.height, grid.width), mode="bilinear")
    return small.flatten(2).mT.flatten(0, 1)


def _num_tokens(places: Sequence[VideoPlace]) -> int:
    return sum(place.grid.num_video for place in places)


def _maps(places: Sequence[VideoPlace], values: Tensor) -> tuple[Tensor, Any]:
    """[F, C, side, side] of square frames, and the grid of the tokens."""
    frames, grid = sum(place.grid.frames for place in places), places[0].grid
    side = round((len(values) / frames) ** 0.5)
    return values.reshape(frames, side, side, -1).permute(0, 3, 1, 2), grid
