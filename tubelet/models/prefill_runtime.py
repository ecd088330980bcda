"""The runtime that computes the attention over a prompt sparsely, layer by layer.

Only the tokens of the prompt follow a plan. Tokens of the answer see everything, be they computed
one by one from a cache or again with the whole prompt, so every way to generate agrees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import Site
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.prefill import PrefillContext
from tubelet.core.recipe import SparsePrefill
from tubelet.kernels.attention import attention, choose
from tubelet.kernels.selection import TOOLS
from tubelet.models.layer_runtime import Call, LayerRuntime, Stage, refuse_replay
from tubelet.models.prefill_verify import check_blocks
from tubelet.models.watched_attention import compute_instead, uncompiled

if TYPE_CHECKING:
    from tubelet.models.prompt_runtime import Run
    from tubelet.models.video_llm import VideoLLMAdapter

BEYOND = ("sliding_window", "softcap", "s_aux")
"""Options of an attention call that no implementation here takes."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the tokens of one prompt are, in front of some layer.

    Args:
        columns: [N] int64, where they are in the padded batch; None when everywhere.
        video: [N] int64, which video each is of, -1 for none.
        place: [N] int64, raster place in that video, 0 for none.
        grids: Geometry of the videos.
    """

    columns: Tensor | None
    video: Tensor
    place: Tensor
    grids: tuple[TokenGrid, ...]

    @classmethod
    def of(cls, stage: Stage, row: int, grids: tuple[TokenGrid, ...]) -> "Layout":
        """Layout of one prompt of a batch."""
        device, real = stage.mask.device, stage.mask[row]
        ends = torch.tensor([grid.num_video for grid in grids], device=device).long().cumsum(0)
        original = stage.original[row]
        video = torch.searchsorted(ends, original, right=True)
        place = original - F.pad(ends, (1, 0))[video.clamp(max=len(grids))]
        inside = stage.video[row]
        video, place = video.masked_fill(~inside, -1), place.masked_fill(~inside, 0)
        columns = None if stage.full else real.nonzero()[:, 0]
        if columns is not None:
            video, place = video[columns], place[columns]
        return cls(columns=columns, video=video, place=place, grids=grids)

    def taken(self, x: Tensor, row: int, num: int) -> Tensor:
        """The tokens of this prompt, [1, H, N, D], from a row of [B, H, num or more, D]."""
        own = x[row : row + 1, :, :num]
        return own if self.columns is None else own.index_select(2, self.columns)


class PrefillRuntime:
    """Prefill recipes at work on one language model."""

    def __init__(
        self,
        adapter: "VideoLLMAdapter",
        model: Any,
        recipes: Sequence[SparsePrefill],
        layers: LayerRuntime,
        handle: Handle,
    ) -> None:
        self.text, self.layers, self.handle = adapter.text_model(model), layers, handle
        sites = [site for site in adapter.sites(model) if site.kind == "llm"]
        self.crew: dict[nn.Module, tuple[Site, SparsePrefill]] = {
            self.text.layers[site.layer].self_attn: (site, recipe)
            for site in sites
            for recipe in recipes
            if recipe.acts_on(site)
        }
        self._run: Run | None = None
        self._stages: dict[int | None, tuple[Stage, list[Layout]]] = {}
        self._draws = 0

    def hook(self) -> None:
        """Take over the attention calls of the layers that have a recipe."""
        if not self.crew:
            return
        kinds = set(getattr(self.text.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise UnsupportedError(
                f"sparse prefill needs full attention; this model has {', '.join(sorted(kinds))}"
            )
        compute_instead(self.text, self.crew, self._attend, self.handle)
        left = self.text.register_forward_hook(lambda *call: self._forget(), always_call=True)
        self.handle.on_remove(left.remove)

    def _forget(self) -> None:
        self._run = None
        self._stages.clear()

    def _attend(
        self,
        host: Callable[[], Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        options: dict[str, Any],
    ) -> Any:
        """One attention call of the host: [B, N, H, D] and no attention weights."""
        (site, recipe), call = self.crew[module], self.layers.call
        if call is None:
            return host()
        refuse_replay(self.text, "sparse attention")
        if not call.whole_prompt:
            if call.past < call.run.prompt.length:
                raise UnsupportedError(
                    f"{recipe} decides on the whole prompt, but it came in parts; leave "
                    "prefill_chunk_size out"
                )
            return host()
        beyond = [name for name in BEYOND if options.get(name) is not None]
        if beyond:
            self.handle.report().fallbacks[f"{recipe.name}: host uses {', '.join(beyond)}"] += 1
            return host()
        contexts = self._contexts(call, site, q, k, v, scale)
        outs = [self._prompt(recipe, ctx) for ctx, _, _ in contexts]
        if all(out is None for out in outs):
            return host()
        out, layout, num = outs[0], contexts[0][1], contexts[0][2]
        if out is not None and len(outs) == 1 and layout.columns is None and q.shape[2] == num:
            # A single prompt without padding needs no copies, which would take gigabytes.
            return out.transpose(1, 2).contiguous(), None
        result = q.new_zeros(*q.shape[:3], v.shape[3])
        for row, (out, (ctx, layout, num)) in enumerate(zip(outs, contexts, strict=True)):
            filled = _dense(ctx) if out is None else out
            if layout.columns is None:
                result[row, :, :num] = filled[0]
            else:
                result[row].index_copy_(1, layout.columns, filled[0])
        num = contexts[0][2]
        if q.shape[2] > num:
            result[:, :, num:] = self._answers(call, site, q, k, v, scale, num)
        return result.transpose(1, 2).contiguous(), None

    def _contexts(
        self, call: Call, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> list[tuple[PrefillContext, Layout, int]]:
        """One context per row of the call, its layout, and how many tokens its prompt takes."""
        stage, layouts = self._stage(call.run, site.layer)
        num = stage.mask.shape[1]
        found = []
        for row in range(len(q)):
            layout = layouts[row // call.copies]
            ctx = PrefillContext(
                site=site,
                grids=layout.grids,
                query=layout.taken(q, row, num),
                key=layout.taken(k, row, num),
                value=layout.taken(v, row, num),
                scale=scale,
                video=layout.video,
                place=layout.place,
                tools=TOOLS,
            )
            found.append((ctx, layout, num))
        return found

    @uncompiled
    def _prompt(self, recipe: SparsePrefill, ctx: PrefillContext) -> Tensor | None:
        """Output [1, H, N, D] for one prompt; None where its plan is dense."""
        report, options = self.handle.report(), self.handle.options
        plan = recipe.plan(ctx)
        if plan.is_dense:
            report.fallbacks[f"{recipe.name}: its plan is dense"] += 1
            return None
        qkv = ctx.query, ctx.key, ctx.value
        impl = choose(*qkv, plan, causal=True, impl=options.impl)
        out, lse = attention(*qkv, plan, scale=ctx.scale, causal=True, impl=impl)
        report.attention[f"{recipe}: {impl}"] += 1
        if plan.mask is not None:
            report.sparse_call(ctx.site.layer, None, _shares(plan.mask))
        if options.verify:
            self._draws += 1
            checked = check_blocks(ctx, out, lse, blocks=options.verify, seed=self._draws)
            report.verified_call(ctx.site.layer, None, checked.error, checked.recall, checked.cost)
            # Reading the error waits for the device: the price of a limit.
            limit = options.max_error
            if limit is not None and not float(checked.error) <= limit:
                report.fallbacks[f"{recipe.name}: error above {limit:g}"] += 1
                return _dense(ctx)
        return out

    def _answers(
        self, call: Call, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, num: int
    ) -> Tensor:
        """Dense output [B, H, E, D] of tokens behind the prompt, as a step from a cache gives."""
        total = q.shape[2]
        real = self._stage(call.run, site.layer)[0].mask.repeat_interleave(call.copies, 0)
        behind = call.answer_mask
        if behind is None:
            behind = real.new_ones(len(real), total - num)
        rows, keys = (torch.arange(n, total, device=q.device) for n in (num, 0))
        seen = torch.cat([real, behind[:, : total - num]], 1)[:, None] & (keys <= rows[:, None])
        return F.scaled_dot_product_attention(
            q[:, :, num:],
            k[:, :, :total],
            v[:, :, :total],
            attn_mask=seen[:, None],
            scale=scale,
            enable_gqa=True,
        )

    def _stage(self, run: "Run", layer: int) -> tuple[Stage, list[Layout]]:
        """The prompts in front of a layer, looked at once per call of the model."""
        if self._run is not run:
            self._forget()
            self._run = run
        cut = max((cut for cut in run.cuts if cut <= layer), default=None)
        if cut not in self._stages:
            stage = Stage.of(run.prompt) if cut is None else run.cuts[cut].stage
            layouts = [Layout.of(stage, row, grids) for row, grids in enumerate(run.prompt.grids)]
            self._stages[cut] = stage, layouts
        return self._stages[cut]


def _dense(ctx: PrefillContext) -> Tensor:
    return attention(ctx.query, ctx.key, ctx.value, scale=ctx.scale, causal=True)[0]


def _shares(mask: BlockMask) -> Tensor:
    """[H] blocks that each head computes, of those that dense causal attention would."""
    dense = _triangle(mask.block, mask.num_queries)
    return mask.counts.float().sum(2).mean(0) / dense


@lru_cache(maxsize=64)
def _triangle(block: tuple[int, int], num: int) -> int:
    """Block pairs of dense causal attention over `num` tokens."""
    return sum(-(-min(end, num) // block[1]) for end in range(block[0], num + block[0], block[0]))
