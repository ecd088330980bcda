"""What tubelet uses of diffusers beyond its documented interface.

When one of these fails after an upgrade, diffusers changed a private part: read the named file
of diffusers, adapt tubelet/models/diffusion_hooks.py (or the family's file), and narrow the range
of diffusers in pyproject.toml if both versions cannot be served.
"""

import enum
import inspect

import pytest
import torch

from tubelet.models import diffusion_hooks
from tubelet.models.catalogue import adapter_for
from tubelet.testing import tiny_diffusion


def test_attention_registry_takes_a_member_outside_of_the_enum():
    from diffusers.models import attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    before = list(dispatch.AttentionBackendName)
    active = registry.get_active_backend()
    member = diffusion_hooks.backend()
    assert issubclass(dispatch.AttentionBackendName, str)
    assert issubclass(dispatch.AttentionBackendName, enum.Enum)
    assert isinstance(member, dispatch.AttentionBackendName)
    assert registry._backends[member] is diffusion_hooks._dispatched
    assert registry._supported_arg_names[member] >= {"query", "key", "value", "scale"}
    # Nothing of diffusers' own changed.
    assert list(dispatch.AttentionBackendName) == before
    assert registry.get_active_backend() == active


def test_dispatcher_hands_the_parallel_configuration_to_the_backend_unread():
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )

    seen = {}

    def probe(query, key, value, attn_mask=None, scale=None, _parallel_config=None):
        seen.update(mask=attn_mask, scale=scale, config=_parallel_config)
        return query

    member = str.__new__(AttentionBackendName, "canary")
    member._name_, member._value_ = "CANARY", "canary"
    _AttentionBackendRegistry.register(member)(probe)
    try:
        x, number = torch.randn(1, 4, 2, 8), torch.tensor(7)
        out = dispatch_attention_fn(x, x, x, backend=member, parallel_config=number)
    finally:
        tables = ("_backends", "_constraints", "_supported_arg_names")
        for table in tables:
            getattr(_AttentionBackendRegistry, table).pop(member)
    assert out is x
    assert seen["config"] is number
    assert (seen["mask"], seen["scale"]) == (None, None)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "hunyuan_video15", "ltx"])
def test_processors_of_dispatching_hosts_keep_backend_and_configuration(name):
    model, _ = tiny_diffusion.build(name)
    for site in adapter_for(model).sites(model):
        processor = model.get_submodule(site.name).processor
        assert processor._attention_backend is None
        assert processor._parallel_config is None
        source = inspect.getsource(type(processor).__call__)
        assert "backend=self._attention_backend" in source
        assert "self._parallel_config" in source


@pytest.mark.parametrize("name", ["cogvideox", "mochi", "allegro"])
def test_processors_of_the_others_still_call_torch_themselves(name):
    # Once they dispatch, tubelet's own processors for them can go.
    model, _ = tiny_diffusion.build(name)
    processor = model.get_submodule(adapter_for(model).sites(model)[0].name).processor
    assert not hasattr(processor, "_attention_backend")
    assert "scaled_dot_product_attention" in inspect.getsource(type(processor).__call__)


@pytest.mark.parametrize("name", ["hunyuan_video15", "cogvideox", "mochi", "allegro"])
def test_own_processors_have_the_arguments_of_the_host_s(name):
    # Attention.forward drops arguments that the signature lacks, positions among them.
    model, _ = tiny_diffusion.build(name)
    adapter = adapter_for(model)
    processor = model.get_submodule(adapter.sites(model)[0].name).processor
    ours = adapter.route(processor, torch.tensor(0))
    host = inspect.signature(type(processor).__call__).parameters
    assert list(inspect.signature(type(ours).__call__).parameters) == list(host)


def test_hook_registry_keeps_its_interface():
    from diffusers.hooks import HookRegistry, ModelHook
    from diffusers.hooks.hooks import BaseState, CacheContext, StateManager

    model, _ = tiny_diffusion.build("wan")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    assert model._diffusers_hook is registry
    assert registry.hooks == {}
    hook = ModelHook()
    registry.register_hook(hook, "canary")
    assert registry._hook_order == ["canary"]
    registry.invalidate_child_registries_cache()
    registry.remove_hook("canary", recurse=False)
    assert registry.hooks == {}
    assert ModelHook._is_stateful is False
    manager = StateManager(BaseState)
    with pytest.raises(ValueError, match="cache context"):
        _ = manager.context
    manager.set_context(CacheContext("cond", step_index=1, num_inference_steps=2))
    assert (manager.context.name, manager.context.step_index) == ("cond", 1)
    assert manager.context.num_inference_steps == 2


@pytest.mark.parametrize("name", tiny_diffusion.HOSTS)
def test_hosts_reset_stateful_hooks_and_hand_contexts_over(name):
    model, _ = tiny_diffusion.build(name)
    seen = []
    remove = diffusion_hooks.hook(model, lambda *_: None, lambda: seen.append("end"))
    try:
        hook = model._diffusers_hook.get_hook("tubelet")
        with model.cache_context("uncond"):
            assert diffusion_hooks._context(hook.state).name == "uncond"
        assert diffusion_hooks._context(hook.state) is None
        model._reset_stateful_cache()
    finally:
        remove()
    assert seen == ["end"]


def test_rotary_embeddings_are_where_own_processors_look():
    from diffusers.models.embeddings import apply_rotary_emb, apply_rotary_emb_allegro

    assert "sequence_dim" in inspect.signature(apply_rotary_emb).parameters
    names = list(inspect.signature(apply_rotary_emb_allegro).parameters)
    assert names == ["x", "freqs_cis", "positions"]
