"""Attention calls of a host shown to tubelet, which may also compute them itself."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from tubelet.core.errors import ConflictError
from tubelet.core.handle import Handle

PREFIX = "tubelet_watching_"

WATCHER = "_tubelet_watcher"
"""Attribute of an attention module: who is shown its calls."""

HostAttention = Callable[..., Any]
"""An attention function as transformers calls it."""

Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor, float, Any], None]
"""Takes the module, query [B, H, N, D], key and value [B, Hkv, M, D], the scale, and where the
sequences of a call with variable lengths begin and end, or None."""

COMPUTER = "_tubelet_computer"
"""Attribute of an attention module: who computes its calls."""

Computer = Callable[[Callable[[], Any], nn.Module, Tensor, Tensor, Tensor, float, Any], Any]
"""Takes how the host would do it, then as a watcher, but the options of the call by name in place
of the sequences; returns output [B, N, H, D] and attention weights or None, as the host does."""

_HOLDERS: WeakValueDictionary[int, Handle] = WeakValueDictionary()
"""By id of a config: who has put something around the attention that it names."""


Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(run: Function) -> Function:
    """Decorator: torch.compile leaves this function as it is."""
    # Its own type also covers calls without a function.
    return cast(Function, torch.compiler.disable(run))


def watch(model: Any, modules: Iterable[nn.Module], watcher: Watcher, handle: Handle) -> None:
    """Show the attention calls of `modules` to `watcher` until `handle` is removed.

    Args:
        model: A model of transformers, or a tower of one, whose attention functions can be set.
        modules: Attention modules in it.
    """

    def attend(
        host: HostAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        seen_by = getattr(module, WATCHER, None)
        if seen_by is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            seen_by(module, query, key, value, scale, options.get("cu_seq_lens_q"))
        return host(module, query, key, value, attention_mask, scaling=scaling, **options)

    put_around(model, PREFIX, attend, handle)
    for module in modules:
        setattr(module, WATCHER, watcher)
        handle.on_remove(lambda module=module: delattr(module, WATCHER))


def compute_instead(
    model: Any, modules: Iterable[nn.Module], computer: Computer, handle: Handle
) -> None:
    """Let `computer` compute the attention calls of `modules` until `handle` is removed.

    Args:
        model: As in `watch`.
        modules: Attention modules in it; the others compute as before.
    """

    def attend(
        host: HostAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        as_before = functools.partial(
            host, module, query, key, value, attention_mask, scaling=scaling, **options
        )
        computed_by = getattr(module, COMPUTER, None)
        if computed_by is None:
            return as_before()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return computed_by(as_before, module, query, key, value, scale, options)

    put_around(model, "tubelet_computing_", attend, handle)
    for module in modules:
        setattr(module, COMPUTER, computer)
        handle.on_remove(lambda module=module: delattr(module, COMPUTER))


def is_held(config: Any) -> bool:
    """Whether something stands around the attention that a config names."""
    return id(config) in _HOLDERS


def put_around(model: Any, prefix: str, attend: Callable[..., Any], handle: Handle) -> None:
    """Let `attend` stand around the attention function of `model` until `handle` is removed.

    Args:
        model: As in `watch`.
        prefix: Of the name under which transformers gets to know it.
        attend: Takes the function that was there before, then what that function takes.

    Raises:
        ConflictError: Another handle has done so for a model with the very same config.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    holder = id(model.config)
    if _HOLDERS.get(holder, handle) is not handle:
        raise ConflictError(
            "this model shares its config with one that is accelerated already, so both would run "
            "through the same attention; build each from a copy of the config, or remove() first"
        )
    if holder not in _HOLDERS:
        _HOLDERS[holder] = handle
        handle.on_remove(lambda: _HOLDERS.pop(holder, None))
    before = model.config._attn_implementation
    # The host's name stays part of ours: transformers looks for "flash" in it.
    name = prefix + before

    def call(module: nn.Module, *args: Any, **options: Any) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        host = ALL_ATTENTION_FUNCTIONS.get(before, eager)
        return attend(host, module, *args, **options)

    AttentionInterface.register(name, call)
    # Without a mask twin transformers would drop attention masks silently.
    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    # Its setter would look for a package of kernels behind a name with "flash" in it.
    model.config._attn_implementation = name
    handle.on_remove(lambda: setattr(model.config, "_attn_implementation", before))
