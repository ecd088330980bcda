"""What each host family is and does: sites, positions, poolers, class tokens, private symbols."""

import copy
import importlib

import pytest
import torch

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for, adapters
from tubelet.models.encoder import EncoderAdapter
from tubelet.recipes import EVAD, RLT, TESTA, RandomDrop, TempScale, ToMe, UniformPool
from tubelet.testing import catalogue, oracles, tiny, tolerances


@pytest.fixture(scope="module")
def hosts():
    return {name: catalogue.stir(tiny.build(name)) for name in tiny.HOSTS}


BASES = {
    "videomae": "videomae",
    "vivit": "vivit",
    "vjepa2": "vjepa2",
    "timesformer_joint": "timesformer",
    "timesformer": "timesformer",
}


def last_hidden(base, pixels, **options):
    with torch.no_grad():
        return base(pixels, **options).last_hidden_state


@pytest.mark.parametrize(
    ("name", "embeddings", "layer", "kinds"),
    [
        ("videomae", "videomae.embeddings", "videomae.encoder.layer.3", ["joint"]),
        ("vivit", "vivit.embeddings", "vivit.layers.3", ["joint"]),
        ("vjepa2", "vjepa2.encoder.embeddings", "vjepa2.encoder.layer.3", ["joint"]),
        ("timesformer_joint", "timesformer.embeddings", "timesformer.encoder.layer.3", ["joint"]),
        (
            "timesformer",
            "timesformer.embeddings",
            "timesformer.encoder.layer.3",
            ["temporal", "spatial"],
        ),
    ],
)
def test_sites_are_real_modules_in_order(hosts, name, embeddings, layer, kinds):
    model = hosts[name]
    sites = adapter_for(model).sites(model)
    assert (sites[0].name, sites[0].kind, sites[0].layer) == (embeddings, "input", -1)
    assert sites[-1].name == layer
    assert [site.kind for site in sites[1:]] == kinds * 4
    assert {site.num_layers for site in sites} == {4}
    for site in sites:
        model.get_submodule(site.name)


@pytest.mark.parametrize("name", BASES)
def test_base_models_take_recipes_as_well(hosts, name):
    base = copy.deepcopy(hosts[name].get_submodule(BASES[name]))
    assert type(base).__name__ in adapter_for(base).classes
    model, pixels = hosts[name], tiny.clip(2)
    recipe = UniformPool()
    with accelerate(base, recipe):
        alone = last_hidden(base, pixels)
    with accelerate(model, recipe):
        within = last_hidden(model.get_submodule(BASES[name]), pixels)
    assert torch.equal(alone, within)


@pytest.mark.parametrize("name", ["videomae", "vivit", "timesformer_joint"])
@pytest.mark.parametrize("recipe", [RLT(), ToMe(r=6)], ids=str)
def test_every_original_place_gets_the_value_of_its_own_token(hosts, name, recipe):
    model, pixels = hosts[name], tiny.clip(2)
    reducer = oracles.rlt(0.1) if isinstance(recipe, RLT) else oracles.tome(6)
    with accelerate(model, recipe):
        got = last_hidden(model.get_submodule(BASES[name]), pixels)
    norm = getattr(model.get_submodule(BASES[name]), "layernorm", None) or torch.nn.Identity()
    for sample, tokens in zip(got, oracles.final_tokens(model, pixels, reducer, True), strict=True):
        if name == "timesformer_joint":
            # The host orders tokens by place, then time.
            video = sample[1:].unflatten(0, (16, 8)).transpose(0, 1).flatten(0, 1)
            sample = torch.cat([sample[:1], video])
        for token in tokens:
            wanted = norm(token.value).expand(token.size, -1)
            assert catalogue.difference(sample[token.members], wanted) <= tolerances.ORACLE


# TimeSformer


@pytest.mark.parametrize("name", ["timesformer", "timesformer_joint"])
def test_TimeSformer_without_recipe_only_gets_fused_attention(hosts, name):
    model, pixels = hosts[name], tiny.clip(2)
    dense = catalogue.logits(model, pixels)
    with accelerate(model) as handle:
        fused = catalogue.logits(model, pixels)
        order = last_hidden(model.timesformer, pixels)
    assert catalogue.difference(fused, dense) <= tolerances.REPLACED_ATTENTION
    plain = last_hidden(model.timesformer, pixels)
    assert catalogue.difference(order, plain) <= tolerances.REPLACED_ATTENTION
    calls = 2 if name == "timesformer" else 1
    assert handle.report().attention == {"fused by tubelet": 2 * 4 * calls}


def test_TimeSformer_divided_refuses_another_number_of_frames(hosts):
    # The host folds tokens by the configured number of frames and mixes them up silently.
    model, pixels = hosts["timesformer"], tiny.clip(2)[:, ::2]
    with (
        accelerate(model, TESTA(frames=1, patches=0)),
        pytest.raises(ShapeError, match="takes 8 frames, got 4"),
    ):
        catalogue.logits(model, pixels)


def test_TimeSformer_space_only_is_refused_with_the_reason():
    model = tiny.build("timesformer", attention_type="space_only")
    for recipe in catalogue.settings():
        with pytest.raises(UnsupportedError, match="space-only attention folds frames"):
            accelerate(model, recipe)


def test_TimeSformer_divided_refuses_a_size_bias(hosts):
    model = hosts["timesformer"]
    before = catalogue.snapshot(model)
    with pytest.raises(UnsupportedError, match="proportional=False"):
        accelerate(model, UniformPool(proportional=True))
    catalogue.assert_untouched(model, before)


# V-JEPA 2


def test_VJEPA2_rotates_survivors_by_their_original_positions(hosts):
    model, pixels = hosts["vjepa2"], tiny.clip(2)
    with accelerate(model, RandomDrop(keep_ratio=0.4)) as handle:
        got = catalogue.logits(model, pixels)
    kept = handle.assignment[0].anchor[0].tolist()
    wanted = oracles.encode(model, pixels, oracles.keep_places(kept))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE

    def renumbered(scene, tokens):
        # What happens when positions are counted anew, as the host does by itself.
        left = oracles.keep_places(kept)(scene, tokens)
        return [oracles.Token(t.value, i, t.members) for i, t in enumerate(left)]

    wrong = oracles.encode(model, pixels, renumbered)
    assert catalogue.difference(got, wrong) > 100 * tolerances.ORACLE


def test_VJEPA2_pooler_sees_the_kept_tokens_only(hosts):
    model, pixels = hosts["vjepa2"], tiny.clip(2)
    with accelerate(model, RandomDrop(keep_ratio=0.4)) as handle:
        got = catalogue.logits(model, pixels)
        hidden = last_hidden(model.vjepa2, pixels, skip_predictor=True)
    kept = handle.assignment[0].anchor[0]
    with torch.no_grad():
        wanted = model.classifier(model.pooler(hidden[:, kept]))
        everything = model.classifier(model.pooler(hidden))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE
    assert catalogue.difference(got, everything) > 100 * tolerances.ORACLE


def test_VJEPA2_predictor_gets_the_full_length(hosts):
    base, pixels = hosts["vjepa2"].vjepa2, tiny.clip(2)
    with torch.no_grad(), accelerate(base, ToMe(r=6)):
        out = base(pixels)
    assert out.last_hidden_state.shape == (2, 64, 48)
    assert out.predictor_output.last_hidden_state.shape == (2, 64, 48)
    # The predictor's own attention is the host's: its input decides its output.
    context = [torch.arange(64).repeat(2, 1)]
    with torch.no_grad():
        wanted = base.predictor(out.last_hidden_state, context, context).last_hidden_state
    assert torch.equal(out.predictor_output.last_hidden_state, wanted)


def test_VJEPA2_batch_with_different_counts_equals_its_samples(hosts):
    model, pixels = hosts["vjepa2"], tiny.clip(2)
    with accelerate(model, RLT()) as handle:
        together = catalogue.logits(model, pixels)
        counts = [a.num_out for a in handle.assignment]
        singles = torch.cat([catalogue.logits(model, clip[None]) for clip in pixels])
    assert len(set(counts)) == 2, "the clips must differ for this test to mean something"
    assert catalogue.difference(together, singles) <= tolerances.SPLIT_BATCH


# Inputs and modes that a host refuses


def test_VideoMAE_with_masked_input_is_refused(hosts):
    model, pixels = hosts["videomae"], tiny.clip(2)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, :16] = True
    with accelerate(model, ToMe(r=6)):
        wanted = catalogue.logits(model, pixels)
        with pytest.raises(ValueError, match="masked inputs are not supported"):
            model.videomae(pixels, bool_masked_pos=mask)
        assert torch.equal(catalogue.logits(model, pixels), wanted)


def test_ViViT_with_an_attention_mask_is_refused(hosts):
    base = hosts["vivit"].vivit
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[:, 40:] = 0
    handle = accelerate(base, ToMe(r=6))
    with pytest.raises(UnsupportedError, match="attention mask"):
        base(tiny.clip(2), attention_mask=mask)
    handle.remove()


@pytest.mark.parametrize("name", BASES)
def test_attention_dropout_in_training_is_refused_and_not_ignored(name):
    model = tiny.build(name, attention_probs_dropout_prob=0.1).train()
    recipe = UniformPool() if name == "timesformer" else ToMe(r=6)
    with pytest.raises(UnsupportedError, match=r"model\.eval\(\)"), accelerate(model, recipe):
        model(tiny.clip(2))


# TimeSformer's config wants whole numbers there.
STOCHASTIC = {"timesformer": 1, "timesformer_joint": 1, "vjepa2": 0.2}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_depth_in_training_is_refused(name):
    model = tiny.build(name, drop_path_rate=STOCHASTIC[name]).train()
    with pytest.raises(UnsupportedError, match="stochastic depth"):
        accelerate(model, UniformPool())


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_depth_switched_on_later_is_refused(name):
    model = tiny.build(name, drop_path_rate=STOCHASTIC[name])
    with accelerate(model, UniformPool()):
        model.train()
        with pytest.raises(UnsupportedError, match="stochastic depth"):
            model(tiny.clip(2))


def test_ViViT_dropout_behind_the_mlp_is_applied_or_refused():
    # With every branch dropped out, layers do nothing; the class token stays what it was.
    model = catalogue.stir(tiny.build("vivit"))
    for layer in model.vivit.layers:
        layer.dropout.p = 1.0
        layer.dropout.train()
    dense, refused = catalogue.logits(model, tiny.clip(2)), None
    try:
        with accelerate(model, EVAD(keep_ratio=0.6)):
            reduced = catalogue.logits(model, tiny.clip(2))
    except UnsupportedError as error:
        refused = str(error)
    assert refused or catalogue.difference(reduced, dense) <= tolerances.ORACLE


@pytest.mark.parametrize("proportional", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(proportional):
    model, grads = catalogue.stir(tiny.build("videomae")), []
    try:
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            model.train()
            with accelerate(model, ToMe(r=6, proportional=proportional)):
                model(tiny.clip(2)).logits.square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            model.zero_grad()
    except UnsupportedError as error:
        assert "checkpoint" in str(error)  # noqa: PT017
    else:
        assert catalogue.difference(*grads) <= 1e-3


@pytest.mark.parametrize("name", ["timesformer", "timesformer_joint"])
def test_TimeSformer_attention_maps_are_refused_with_a_reason(hosts, name):
    with (
        accelerate(hosts[name]),
        pytest.raises(UnsupportedError, match="output_attentions"),
        torch.no_grad(),
    ):
        hosts[name](tiny.clip(), output_attentions=True)


def test_VJEPA2_pooler_by_itself_knows_nothing_of_an_earlier_run(hosts):
    model, tokens = hosts["vjepa2"], torch.randn(2, 64, 48)
    with torch.no_grad():
        wanted = model.pooler(tokens)
        with accelerate(model, RandomDrop()):
            model(tiny.clip(2))
            assert torch.equal(model.pooler(tokens), wanted)


@pytest.mark.parametrize("name", BASES)
def test_gradients_reach_the_weights_through_reductions(name):
    model = catalogue.stir(tiny.build(name))
    recipe = TESTA(frames=1, patches=3) if name == "timesformer" else ToMe(r=6)
    with accelerate(model, recipe):
        model(tiny.clip(2)).logits.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # Weights that the dense model does not use for its logits either.
    assert not [n for n in missing if "predictor" not in n and ".pooler." not in f".{n}"]


# Private symbols of transformers that tubelet stands on


@pytest.mark.parametrize(
    ("module", "symbol"),
    [
        ("transformers", "AttentionInterface"),
        ("transformers", "AttentionMaskInterface"),
        ("transformers.masking_utils", "sdpa_mask"),
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.models.videomae.modeling_videomae", "eager_attention_forward"),
        ("transformers.models.vivit.modeling_vivit", "eager_attention_forward"),
        ("transformers.models.vjepa2.modeling_vjepa2", "eager_attention_forward"),
    ],
)
def test_transformers_still_has(module, symbol):
    assert hasattr(importlib.import_module(module), symbol)


def test_attention_functions_are_still_registered_and_looked_up_by_name():
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register("tubelet canary", len)
    try:
        assert ALL_ATTENTION_FUNCTIONS.get("tubelet canary", None) is len
        assert ALL_ATTENTION_FUNCTIONS.get("eager", "own") == "own"
        assert callable(ALL_ATTENTION_FUNCTIONS.get("sdpa", None))
    finally:
        AttentionInterface._global_mapping.pop("tubelet canary")


@pytest.mark.parametrize("name", BASES)
def test_module_paths_of_the_adapters_still_exist(hosts, name):
    model = hosts[name]
    adapter = adapter_for(model)
    base = getattr(model, adapter.base)
    base.get_submodule(adapter.embeddings)
    for layer in base.get_submodule(adapter.layers):
        for path in (adapter.attention, adapter.norm_after, adapter.mlp_out):
            layer.get_submodule(path)
    if adapter.pooler is not None:
        assert any(hasattr(m, "config") for m in model.get_submodule(adapter.pooler).modules())


@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2"])
def test_hosts_still_attend_through_the_interface(hosts, name):
    model = hosts[name]
    with accelerate(model, TempScale()) as handle:
        catalogue.logits(model, tiny.clip())
    assert sum(handle.report().attention.values()) == 4


def test_class_names_of_the_adapters_still_exist_in_transformers():
    import transformers

    encoders = [a for a in adapters() if isinstance(a, EncoderAdapter)]
    foreign = [a for a in encoders if a.family != "VideoViT"]
    assert len(foreign) > 3
    for adapter in foreign:
        for name in adapter.classes:
            assert hasattr(transformers, name), f"{adapter.family}: {name}"


def test_EVAD_takes_the_middle_frame_of_the_clip_at_hand(hosts):
    # Rotary positions take any number of frames; the keyframe follows.
    model, pixels = hosts["vjepa2"], tiny.clip(1)[:, :4]
    with accelerate(model, EVAD(keep_ratio=0.5, depths=(0.0,))) as handle:
        catalogue.logits(model, pixels)
    assert handle.assignment[0].anchor[0].tolist() == list(range(16, 32))
