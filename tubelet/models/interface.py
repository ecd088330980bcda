"""tubelet's entry in transformers' table of attention functions.

One function serves every accelerated model: it finds the runtime of the calling module and
leaves everything else to the attention that the model had before.
"""

import sys
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from tubelet.core.errors import UnsupportedError
from tubelet.core.handle import Handle

NAME = "tubelet"

HostAttention = Callable[..., tuple[Tensor, Any]]


class Runtime(Protocol):
    """What an adapter keeps while its recipes are on a model."""

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        host: Callable[[], Tensor],
    ) -> Tensor:
        """Attention output [B, N, H, D] of one call; `host()` computes it as before."""
        ...


OWNER = "_tubelet_attention"
"""Attribute of a module: its runtime (None leaves it alone) and the attention it had before."""


def take_over(model: Any, modules: list[nn.Module], runtime: Runtime, handle: Handle) -> None:
    """Route the attention of `modules` through `runtime` until `handle` is removed."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    # Without a mask twin transformers would drop attention masks silently.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    handle.on_remove(lambda: model.set_attn_implementation(before))
    watched = set(modules)
    for module in model.modules():
        if hasattr(module, "config"):
            owner = (runtime if module in watched else None, _host(module, before))
            setattr(module, OWNER, owner)
            handle.on_remove(lambda module=module: delattr(module, OWNER))


def _host(module: nn.Module, name: str) -> HostAttention:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(name, eager)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Any]:
    runtime, host = getattr(module, OWNER)
    weights: list[Any] = [None]

    def as_before() -> Tensor:
        out, weights[0] = host(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        return out

    if runtime is None:
        return as_before(), weights[0]
    if attention_mask is not None:
        raise UnsupportedError("tubelet does not combine recipes with an attention mask here")
    if dropout > 0:
        raise UnsupportedError(
            f"attention dropout {dropout} is active; call model.eval() before accelerating"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return runtime.attend(module, query, key, value, scale, as_before), weights[0]
