"""tubelet's hooks into diffusers: its attention registry, and the hook on a transformer.

Everything private to diffusers that tubelet touches is touched here, and held by the canary
tests in tests/models/test_diffusion_canaries.py.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from tubelet.models.attend_op import DenseAttention, attend

NAME = "tubelet"

Begin = Callable[[Mapping[str, Any], Any], None]
"""Takes the arguments of a forward pass and diffusers' CacheContext, or None without one."""


@cache
def backend() -> Any:
    """tubelet's member of diffusers' attention registry, registered at the first call.

    The enum of back-ends is closed, so the member exists outside of it; the processors that
    carry it reach `_dispatched`, and nothing else in the process changes.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    _AttentionBackendRegistry.register(member)(_dispatched)
    return member


def _dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    _parallel_config: Any = None,
) -> Tensor:
    # Masks only ever hide padding here, which the lengths of the call describe already.
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, _parallel_config, scale).transpose(1, 2)


def dispatcher(chosen: Any) -> DenseAttention:
    """Dense attention through diffusers' dispatcher, with the back-end that was set before."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dispatch_attention_fn(q, k, v, scale=scale, backend=chosen).transpose(1, 2)

    return dense


def hook(model: nn.Module, begin: Begin, end: Callable[[], object]) -> Callable[[], None]:
    """Call `begin` before each forward pass of a transformer and `end` when a pipeline is done.

    Returns:
        What takes the hook off again and leaves no trace on the model.
    """
    from diffusers.hooks import HookRegistry

    had_forward, had_registry = "forward" in vars(model), hasattr(model, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    root = _hook_class()(model, begin, end)
    registry.register_hook(root, NAME)
    registry.invalidate_child_registries_cache()
    ours = model.forward

    def remove() -> None:
        last = registry._hook_order[-1] == NAME
        if last and model.forward is not ours:
            # Somebody else wrapped the forward since; taking ours out would cut theirs off.
            root.retire()
            return
        registry.remove_hook(NAME, recurse=False)
        registry.invalidate_child_registries_cache()
        if registry.hooks:
            return
        if not had_forward:
            vars(model).pop("forward", None)
        if not had_registry:
            del model._diffusers_hook

    return remove


@cache
def _hook_class() -> Any:
    from diffusers.hooks import ModelHook
    from diffusers.hooks.hooks import BaseState, StateManager

    class TransformerHook(ModelHook):
        """Reads the arguments of a forward pass and the cache context that a pipeline set."""

        # Stateful hooks are those that receive cache contexts and resets.
        _is_stateful = True

        def __init__(self, model: nn.Module, begin: Begin, end: Callable[[], object]) -> None:
            super().__init__()
            self.state = StateManager(cast(Any, BaseState))
            self._signature = inspect.signature(type(model).forward)
            self._begin, self._end = begin, end

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            bound = self._signature.bind_partial(module, *args, **kwargs)
            self._begin(bound.arguments, _context(self.state))
            return args, kwargs

        def reset_state(self, module: nn.Module) -> nn.Module:
            self._end()
            return module

        def retire(self) -> None:
            self._begin, self._end = _nothing, _nothing

    return TransformerHook


def _context(state: Any) -> Any:
    try:
        return state.context
    except ValueError:
        return None


def _nothing(*_: object) -> None:
    return None
