"""Token plans on divided attention: frames x places that shrink along either axis within a layer.

A layer attends along time for each place, then within each frame, then runs its MLP. Time plans
act behind the first attention, space plans behind the second, so that the tokens always form whole
rows. What a family brings is the three steps on such rows.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import TokenContext
from tubelet.core.errors import UnsupportedError
from tubelet.models.runtime import EncoderRuntime

Key = tuple[int, str]
"""Layer and kind of a site."""


class DividedRuntime(EncoderRuntime, ABC):
    """Runs the layers of a divided host itself, on as many frames and places as are left."""

    frames: int
    places: int

    def __init__(self, *setup: Any) -> None:
        super().__init__(*setup)
        if self.size_bias:
            raise UnsupportedError(
                "a log-size bias is not defined for divided attention; use proportional=False"
            )

    @abstractmethod
    def along_time(self, layer: Any, x: Tensor) -> Tensor:
        """[batch x places, frames, C] behind the attention along time, residual included."""

    @abstractmethod
    def within_frames(self, layer: Any, head: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same for class tokens [batch, before, C] and [batch x frames, places, C]."""

    @abstractmethod
    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """[batch, tokens, C] behind the MLP, residual included."""

    def run_layer(self, index: int, hidden: Tensor) -> Tensor:
        """Layer `index` on [batch, tokens, C], with its plans; full length behind the last one."""
        layer = self.layers[index]
        self.count_tokens(index)
        head, x = hidden[:, : self.before], hidden[:, self.before :]
        x = x.unflatten(1, (self.frames, self.places)).transpose(1, 2).flatten(0, 1)
        x = self._shrink((index, "temporal"), self.along_time(layer, x))

        x = x.unflatten(0, (-1, self.places)).transpose(1, 2).flatten(0, 1)
        head, x = self.within_frames(layer, head, x)
        x = self._shrink((index, "spatial"), x)

        x = torch.cat([head, x.unflatten(0, (-1, self.frames)).flatten(1, 2)], dim=1)
        x = self.feed_forward(layer, x)
        return self.finish(x) if index == len(self.layers) - 1 else x

    @property
    def before(self) -> int:
        """Class tokens in front."""
        assert self.grid is not None
        return self.grid.before

    def reduce(self, key: Key, hidden: Tensor, *rest: Any, **named: Any) -> Tensor | None:
        reduced = super().reduce(key, hidden, *rest, **named)
        assert self.grid is not None
        self.frames, self.places = self.grid.frames, self.grid.per_frame
        if reduced is not None:
            # Only plans that leave a whole grid get here; its anchors tell the frames.
            anchor = self.groups[0].anchor[0, self.before :]
            self.frames = len(self.grid.frame_index(hidden.device)[anchor].unique())
            self.places = len(anchor) // self.frames
        return reduced

    def _shrink(self, key: Key, x: Tensor) -> Tensor:
        """Apply the token recipe to [batch x places, frames, C] or [batch x frames, places, C]."""
        recipe = self.reducers.get(key)
        if recipe is None:
            return x
        assert self.grid is not None
        temporal, group = key[1] == "temporal", self.groups[0]
        sizes = group.size[:, self.before :].unflatten(1, (self.frames, self.places))
        context = TokenContext(
            site=self.sites[key],
            grid=self.grid,
            hidden=x,
            size=(sizes.transpose(1, 2) if temporal else sizes).flatten(0, 1),
            anchor=torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]),
            shared=self.places if temporal else 1,
            stats=self._video_statistics(key),
        )
        plan = recipe.plan(context)
        if plan is None:
            return x
        whole = self._over_grid(plan, temporal)
        self.groups = [group.after(whole, 0)]
        report = self.handle.report()
        report.change(str(recipe), f"{context.site.name} ({key[1]})", group.num, whole.num_out)
        if temporal:
            self.frames = plan.num_out
        else:
            self.places = plan.num_out
        return plan.reduce(x)

    def _video_statistics(self, key: Key) -> Any:
        calls = self.statistics.pop(key[0], None)
        if calls is None or key[1] == "temporal":
            return None if calls is None else calls[0]
        # Class tokens in front take part in spatial attention only.
        stats, video = calls[0], slice(self.before, None)
        q, k, v = (x[:, :, video] for x in (stats.q, stats.k, stats.v))
        return type(stats)(q, k, v, stats.scale)

    def _over_grid(self, plan: TokenAssignment, temporal: bool) -> TokenAssignment:
        """A plan along one axis as a plan over class tokens + frames x places."""
        places = self.places if temporal else plan.num_out

        def raster(x: Tensor) -> Tensor:
            # [batch x places, frames] or [batch x frames, places] to [batch, frames, places].
            if temporal:
                return x.unflatten(0, (-1, self.places)).transpose(1, 2)
            return x.unflatten(0, (-1, self.frames))

        def joined(values: Tensor, stride: int) -> Tensor:
            rows = torch.arange(values.shape[1], device=values.device)[None, :, None]
            columns = torch.arange(values.shape[2], device=values.device)
            flat = values * stride + columns if temporal else rows * stride + values
            return flat.flatten(1) + self.before

        def with_class(x: Tensor, lead: Tensor) -> Tensor:
            return torch.cat([lead.to(x.dtype).expand(len(x), -1), x], dim=1)

        own = torch.arange(self.before, device=plan.index.device)
        ones = torch.ones_like(own)
        gone = raster(plan.index).flatten(1) < 0
        index = joined(raster(plan.index), places).masked_fill(gone, -1)
        return TokenAssignment(
            index=with_class(index, own),
            weight=with_class(raster(plan.weight).flatten(1), ones),
            anchor=with_class(joined(raster(plan.anchor), self.places), own),
            size=with_class(raster(plan.size).flatten(1), ones),
        )
