"""The runtime that carries plans out on a video encoder.

Hooks only. A plan acts between a layer's attention and its MLP although that residual stream is
local to the layer: the norm in front of the MLP receives the reduced tokens, the MLP's output is
kept aside, and the layer's own result is replaced by reduced tokens + MLP output. The sequence
returns to its full length after the last layer, so everything behind sees what it expects.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import AttentionContext, Site, TokenContext
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.learned import LearnedPlan
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import (
    LearnedReduction,
    RaggedReduction,
    Recipe,
    SparseAttention,
    TokenRecipe,
    TokenReduction,
)
from tubelet.kernels.attention import CallStatistics, attention, choose, packed_attention, why_not
from tubelet.kernels.attention.channels import padded_to, with_bias_channels
from tubelet.models.groups import TokenGroup, padded_call, part_of_call, unpack
from tubelet.models.interface import NAME

if TYPE_CHECKING:
    from tubelet.models.encoder import EncoderAdapter


class EncoderRuntime:
    """Recipes at work on one encoder; its state lives from the embeddings to the last layer."""

    def __init__(
        self, adapter: "EncoderAdapter", model: Any, recipes: Sequence[Recipe], handle: Handle
    ) -> None:
        base = adapter.base_model(model)
        self.adapter, self.base, self.handle = adapter, base, handle
        self.embeddings: nn.Module = base.get_submodule(adapter.embeddings)
        self.layers: list[nn.Module] = list(base.get_submodule(adapter.layers))
        self.sites = {(site.layer, site.kind): site for site in adapter.sites(model)}
        self.reducers = _by_site(recipes, TokenRecipe, self.sites)
        self.attenders = _by_site(recipes, SparseAttention, self.sites)
        self.modules = adapter.reducers(model)
        self.size_bias = any(r.size_bias for r in recipes if isinstance(r, TokenRecipe))
        self.layer_of = {
            layer.get_submodule(adapter.attention): i for i, layer in enumerate(self.layers)
        }
        pooler = None if adapter.pooler is None else getattr(model, adapter.pooler, None)
        self.pooling = [m for m in pooler.modules() if hasattr(m, "config")] if pooler else []
        if pooler is not None:
            self._hook(pooler.register_forward_hook(self._after_pooling))
        self.noise = [m for layer in self.layers for m in layer.modules() if _noise(m) > 0]
        self.tubelet = adapter.clip(base.config).tubelet
        self.grid: TokenGrid | None = None
        self.groups: list[TokenGroup] = []
        self.packed = False
        self.statistics: dict[int, list[CallStatistics]] = {}
        self.reduced: Tensor | None = None
        self.mlp_output: Tensor | None = None
        self.dropped: Tensor | None = None

    # Hooks

    def hook_embeddings(self) -> None:
        """Begin a run when the embeddings are done."""
        self._check_training()
        self._hook(self.base.register_forward_pre_hook(self._refuse_outputs, with_kwargs=True))
        self._hook(self.embeddings.register_forward_hook(self._begin, with_kwargs=True))

    def hook_layers(self) -> None:
        """Reduce between attention and MLP of each layer, restore after the last one."""
        for index, layer in enumerate(self.layers):
            norm = layer.get_submodule(self.adapter.norm_after)
            mlp_out = layer.get_submodule(self.adapter.mlp_out)
            self._hook(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            self._hook(norm.register_forward_pre_hook(self._before_mlp(index)))
            self._hook(mlp_out.register_forward_hook(self._after_mlp))
            self._hook(layer.register_forward_hook(self._leave(index)))

    def _hook(self, registered: Any) -> None:
        self.handle.on_remove(registered.remove)

    def _refuse_outputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) or getattr(self.base.config, name, False):
                raise UnsupportedError(
                    f"{name}=True is not supported with recipes: layers hold different tokens, in "
                    "another order or packed; remove() first"
                )
        changed = getattr(self.base.config, "_attn_implementation", NAME) != NAME
        if changed and not self.adapter.fused_by_tubelet:
            raise UnsupportedError("the attention implementation was changed; remove() first")

    def _begin(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        self._check_training()
        pixels = args[0] if args else next(iter(kwargs.values()))
        self.grid = self.adapter.grid(self.base, pixels)
        if output.shape[1] != self.grid.num_tokens:
            raise ShapeError(
                f"{self.adapter.family} embedded {output.shape[1]} tokens where the clip has "
                f"{self.grid.num_tokens} ({self.grid}); masked inputs are not supported"
            )
        output = self.to_raster(output, self.grid)
        self.groups = [TokenGroup.whole(*output.shape[:2], device=output.device)]
        self.packed, self.dropped, self.reduced = False, None, None
        self.statistics.clear()
        self.handle.report().start_run(self.grid.num_tokens)
        self.handle.record_grid(self.grid)
        reduced = self.reduce((-1, "input"), output, pixels=pixels)
        return output if reduced is None else reduced

    def to_raster(self, embedded: Tensor, grid: TokenGrid) -> Tensor:
        """Embedded tokens in raster order; most hosts have it."""
        return embedded

    def _check_training(self) -> None:
        # Dropout behind the MLP would be skipped, and checkpointing would replay a layer with
        # the state of the end of the run.
        if any(module.training and _noise(module) > 0 for module in self.noise):
            raise UnsupportedError("dropout or stochastic depth is active; call model.eval()")
        replayed = [x for x in self.layers if getattr(x, "gradient_checkpointing", False)]
        if any(layer.training for layer in replayed):
            raise UnsupportedError("gradient checkpointing cannot replay a token reduction")

    def _enter(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self.count_tokens(index)
            if not self.adapter.takes_positions or self.groups[0].origin is None:
                return None
            positions = torch.cat([group.anchor for group in self.groups], dim=1)
            return (args[0], positions, *args[2:]), kwargs

        return hook

    def _before_mlp(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            self.reduced = self.reduce((index, "joint"), args[0], self.statistics.pop(index, None))
            return None if self.reduced is None else (self.reduced, *args[1:])

        return hook

    def _after_mlp(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.reduced is None:
            return None
        self.mlp_output = output
        # Broadcasts in the host's residual addition, whose result is replaced in `_leave`.
        return output.new_zeros(1, 1, 1)

    def _leave(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if self.reduced is not None and self.mlp_output is not None:
                hidden = self.mlp_output + self.reduced
            self.reduced = self.mlp_output = None
            if index == len(self.layers) - 1:
                hidden = self.finish(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _after_pooling(self, *call: Any) -> None:
        self.dropped = None

    # Tokens

    def count_tokens(self, index: int) -> None:
        """Note how many tokens per sample enter a layer."""
        self.handle.report().enter_layer(index, _mean_tokens(self.groups))

    def reduce(
        self,
        key: tuple[int, str],
        hidden: Tensor,
        stats: list[CallStatistics] | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor | None:
        """Apply the token recipe of a site; None when no token went."""
        recipe = self.reducers.get(key)
        if recipe is None:
            return None
        together = _takes_all(recipe, self.groups, stats)
        step = self._keep if together else self._group_after_group
        reduced, after = step(recipe, key, hidden, stats, pixels)
        before, left = _mean_tokens(self.groups), _mean_tokens(after)
        self.handle.report().change(str(recipe), self.sites[key].name, before, left)
        if left == before:
            return None
        self.groups, self.packed = after, len(after) > 1 or after[0].packing is not None
        return reduced

    def _keep(
        self,
        recipe: RaggedReduction,
        key: tuple[int, str],
        hidden: Tensor,
        stats: list[CallStatistics] | None,
        pixels: Tensor | None,
    ) -> tuple[Tensor, list[TokenGroup]]:
        """One decision for samples that may come to differ in length, or differ already."""
        (group,) = self.groups
        context = self._context(key, group, hidden, None if stats is None else stats[0], pixels)
        mask = recipe.keep(context)
        kept = None if mask is None else group.keep(mask)
        if kept is None:
            return hidden, self.groups
        after, rows = kept
        return context.hidden.flatten(0, 1).index_select(0, rows)[None], [after]

    def _group_after_group(
        self,
        recipe: TokenRecipe,
        key: tuple[int, str],
        hidden: Tensor,
        stats: list[CallStatistics] | None,
        pixels: Tensor | None,
    ) -> tuple[Tensor, list[TokenGroup]]:
        parts: list[Tensor] = []
        after: list[TokenGroup] = []
        start = 0
        groups = _apart(self.groups)
        if stats is not None and len(stats) < len(groups):
            stats = [part_of_call(stats[0], group) for group in groups]
        for number, group in enumerate(groups):
            own = None if stats is None else stats[number]
            context = self._context(key, group, hidden, own, pixels)
            plan = _plan(recipe, context)
            parts.append(_reduced(context.hidden, plan))
            after.append(group.after(plan, start))
            start += after[-1].num
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], after

    def _context(
        self,
        key: tuple[int, str],
        group: TokenGroup,
        hidden: Tensor,
        stats: CallStatistics | None,
        pixels: Tensor | None,
    ) -> TokenContext:
        assert self.grid is not None
        samples = slice(group.first, group.first + group.batch)
        tokens, packing = group.view(hidden, self.packed), group.packing
        size, anchor = group.size, group.anchor
        if packing is not None:
            tokens, size, anchor = (packing.pad(x) for x in (hidden, size, anchor))
            stats = None if stats is None else padded_call(stats, packing)
        return TokenContext(
            site=self.sites[key],
            grid=self.grid,
            hidden=tokens,
            size=size,
            anchor=anchor,
            padded=packing is not None,
            protected=self.grid.before,
            stats=stats,
            tubelet=self.tubelet,
            pixels=None if pixels is None else pixels[samples],
            modules=self.modules,
        )

    def finish(self, hidden: Tensor) -> Tensor:
        """Full-length output after the last layer: every original token gets its survivor's value,
        or what the learned way back makes of it.

        Dropped tokens get the size-weighted mean of the survivors, so that mean pooling over the
        sequence equals size-weighted pooling over what survived.
        """
        groups = _apart(self.groups)
        whole = [group.origin for group in groups if group.origin is not None]
        if not whole:
            return hidden
        self.handle.record_assignment(whole)
        if self.pooling:
            self.dropped = torch.cat([group.dropped() for group in self.groups])
        if not self.packed:
            return self.groups[0].restore(hidden)
        if any(group.stages for group in groups):
            return torch.cat([g.restore(g.view(hidden, True)) for g in groups])
        return unpack(hidden, whole)

    # Attention

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        host: Callable[[], Tensor],
    ) -> Tensor:
        """One attention call of a layer or of the pooler, as [B, N, H, D]."""
        index = self.layer_of.get(module)
        if index is None:
            return self._pool(q, k, v, scale, host)
        return self.attend_at((index, "joint"), q, k, v, scale, host)

    def attend_at(
        self,
        key: tuple[int, str],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        host: Callable[[], Tensor],
    ) -> Tensor:
        """One attention call at a site, with its plan, its bias and its statistics."""
        reducer, attender = self.reducers.get(key), self.attenders.get(key)
        wants = frozenset() if reducer is None else reducer.statistics
        needs_lse = bool(wants & {"received", "entropy"})
        bias, why = self._key_bias()
        if attender is None and not (needs_lse or bias is not None or self.packed):
            what = "fused by tubelet" if self.adapter.fused_by_tubelet else "as in the host"
            self.handle.report().attention[what] += 1
            if wants:
                self.statistics[key[0]] = [CallStatistics(q, k, v, scale)]
            return host()
        learning = bias is not None and bias.requires_grad
        if attender is None and self.packed and not learning:
            lengths = [num for group in self.groups for num in group.lengths]
            self.handle.report().attention["packed" + why] += 1
            out, lse = packed_attention(q, k, v, lengths, scale=scale, key_bias=bias)
            stats = [CallStatistics(q, k, v, scale, lse, bias)]
        else:
            out, stats = self._group_by_group(key, attender, (q, k, v), scale, bias, why)
        if wants:
            self.statistics[key[0]] = stats
        return out.transpose(1, 2)

    def _key_bias(self) -> tuple[Tensor | None, str]:
        """What is added to the logits of each key, and how the report calls it."""
        terms, names = [], []
        if self.size_bias and any(group.merged for group in self.groups):
            terms.append(torch.cat([g.size.log() for g in self.groups], dim=1))
            names.append("log-size bias")
        if any(group.log_weight is not None for group in self.groups):
            weights = [g.log_weight for g in self.groups]
            sizes = [torch.zeros_like(g.size) for g in self.groups]
            filled = [z if w is None else w for w, z in zip(weights, sizes, strict=True)]
            terms.append(torch.cat(filled, dim=1))
            names.append("learned weight")
        bias = sum(terms[1:], terms[0]) if terms else None
        return bias, "".join(f", {name}" for name in names)

    def _group_by_group(
        self,
        key: tuple[int, str],
        attender: SparseAttention | None,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        bias: Tensor | None,
        why: str,
    ) -> tuple[Tensor, list[CallStatistics]]:
        results = []
        for group in _apart(self.groups):
            part = [group.view(x, self.packed, axis=2) for x in qkv]
            own = None if bias is None else group.view(bias, self.packed)
            results.append(self._one_call(key, attender, part, scale, own, why))
        return torch.cat([out for out, _ in results], dim=2), [stats for _, stats in results]

    def _one_call(
        self,
        key: tuple[int, str],
        attender: SparseAttention | None,
        part: list[Tensor],
        scale: float,
        bias: Tensor | None,
        why: str,
    ) -> tuple[Tensor, CallStatistics]:
        assert self.grid is not None
        plan = AttentionPlan()
        q, k, v = part
        if attender is not None:
            if "joint" in attender.requires and q.shape[2] != self.grid.num_tokens:
                raise UnsupportedError(
                    f"{attender} needs all {self.grid.num_tokens} tokens of the grid, but a token "
                    f"recipe left {q.shape[2]}; give it earlier layers"
                )
            plan = attender.plan(
                AttentionContext(
                    site=self.sites[key], grid=self.grid, query=q, key=k, value=v, scale=scale
                )
            )
        impl = choose(q, k, v, plan, key_bias=bias)
        what = impl + why
        if attender is not None and not plan.is_dense:
            what = f"{attender}: {what}"
        report = self.handle.report()
        report.attention[what] += 1
        if impl != "sdpa":
            report.fallbacks[f"attention by {impl}: {why_not('sdpa', q, k, v, plan)}"] += 1
        if key in self.reducers and (plan.mask is not None or plan.order is not None):
            raise UnsupportedError(
                f"{self.reducers[key]} cannot score tokens by an attention call that {attender} "
                "computes in part"
            )
        out, lse = _attention(part, plan, scale, bias, impl)
        # Statistics are of the call as it was made: tempered, and with every bias.
        biases = [b for b in (bias, plan.bias) if b is not None]
        total = sum(biases[1:], biases[0]) if biases else None
        return out, CallStatistics(q, k, v, scale / plan.temperature, lse, total)

    def _pool(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, host: Callable[[], Tensor]
    ) -> Tensor:
        if self.dropped is None or not bool(self.dropped.any()):
            return host()
        # Dropped tokens hold a mean; the pooler must not see it as a token.
        bias = torch.zeros(self.dropped.shape, device=q.device)
        bias = bias.masked_fill(self.dropped, -torch.inf)
        out, _ = attention(q, k, v, scale=scale, key_bias=bias)
        return out.transpose(1, 2)


def _attention(
    qkv: list[Tensor], plan: AttentionPlan, scale: float, bias: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    if bias is None or not bias.requires_grad:
        return attention(q, k, v, plan, scale=scale, key_bias=bias, impl=impl)
    # A kernel may take a bias without giving it a gradient; extra channels have one everywhere.
    q, k = with_bias_channels(q, k, bias, scale)
    out, lse = attention(q, k, padded_to(v, q.shape[-1]), plan, scale=scale, impl=impl)
    return out[..., : v.shape[-1]], lse


def _noise(module: nn.Module) -> float:
    """Rate of a dropout or stochastic-depth module; 0 for any other."""
    name = "p" if isinstance(module, nn.Dropout) else "drop_prob"
    return float(getattr(module, name, None) or 0.0)


def _reduced(tokens: Tensor, plan: TokenAssignment | LearnedPlan | None) -> Tensor:
    if plan is None:
        return tokens
    return plan.hidden if isinstance(plan, LearnedPlan) else plan.reduce(tokens)


def _takes_all(
    recipe: TokenRecipe, groups: Sequence[TokenGroup], stats: list[CallStatistics] | None
) -> bool:
    """Whether one decision serves a whole batch whose samples may end with different lengths."""
    if not isinstance(recipe, RaggedReduction) or len(groups) > 1 or groups[0].batch == 1:
        return False
    one_call = stats is None or len(stats) == 1
    return groups[0].packing is None or (recipe.takes_padding and one_call)


def _apart(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """Groups of samples that hold the same number of tokens."""
    return [part for g in groups for part in ([g] if g.packing is None else g.split())]


def _plan(recipe: TokenRecipe, context: TokenContext) -> TokenAssignment | LearnedPlan | None:
    """The plan of a group in which no sample can come to differ from another."""
    if isinstance(recipe, LearnedReduction):
        return recipe.transform(context)
    if isinstance(recipe, TokenReduction):
        return recipe.plan(context)
    assert isinstance(recipe, RaggedReduction)
    mask = recipe.keep(context)
    plan = None if mask is None else TokenAssignment.keep_padded(mask)[0]
    return None if plan is None or plan.num_out == plan.num_in else plan


def _by_site(recipes: Sequence[Recipe], stage: Any, sites: dict[Any, Site]) -> dict[Any, Any]:
    """The recipe of a stage at each site that one acts on."""
    chosen = [recipe for recipe in recipes if isinstance(recipe, stage)]
    return {key: r for key, site in sites.items() for r in chosen if r.acts_on(site)}


def _mean_tokens(groups: Sequence[TokenGroup]) -> float:
    lengths = [num for group in groups for num in group.lengths]
    return sum(lengths) / len(lengths)
