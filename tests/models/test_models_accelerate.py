"""`accelerate`: what it refuses, how recipes compose, and that it takes everything back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from tubelet.core.errors import (
    ConflictError,
    NoEffectWarning,
    NoMatchingSitesError,
    RecipeError,
    UnsupportedError,
)
from tubelet.models.accelerate import accelerate
from tubelet.recipes import (
    ATS,
    EVAD,
    RLT,
    TESTA,
    RandomDrop,
    TempScale,
    ToMe,
    UniformPool,
    VidTLDR,
)
from tubelet.testing import catalogue, oracles, tiny, tolerances


@pytest.fixture(scope="module")
def hosts():
    return {name: catalogue.stir(tiny.build(name)) for name in tiny.HOSTS}


@pytest.fixture(scope="module")
def videomae(hosts):
    return hosts["videomae"]


# Refusals


def test_an_unknown_model_is_refused_with_those_it_could_be():
    with pytest.raises(UnsupportedError, match=r"no adapter for Linear\. Known models: .*VideoMAE"):
        accelerate(torch.nn.Linear(2, 2), ToMe())


@pytest.mark.parametrize("wrong", [ToMe, "ToMe(r=8)", 8, None])
def test_what_is_not_a_recipe_is_refused(videomae, wrong):
    with pytest.raises(RecipeError, match="recipe instances such as"):
        accelerate(videomae, wrong)


def test_no_recipe_is_refused_where_nothing_would_change(videomae):
    with pytest.raises(RecipeError, match="at least one recipe"):
        accelerate(videomae)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ToMe(r=4), ToMe(r=8)),
        (ToMe(), VidTLDR()),
        (RLT(), RandomDrop()),
        (TempScale(), TempScale(temperature=0.5)),
    ],
    ids=str,
)
def test_two_recipes_of_one_stage_at_one_site_conflict_and_both_are_named(videomae, first, second):
    before = catalogue.snapshot(videomae)
    with pytest.raises(ConflictError) as caught:
        accelerate(videomae, first, second)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    catalogue.assert_untouched(videomae, before)


def test_a_model_is_accelerated_once(videomae):
    with accelerate(videomae, ToMe(r=6)):
        wanted = catalogue.logits(videomae, tiny.clip())
        with pytest.raises(ConflictError, match="accelerated already"):
            accelerate(videomae, TempScale())
        assert torch.equal(catalogue.logits(videomae, tiny.clip()), wanted)
    accelerate(videomae, TempScale()).remove()


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_model_and_the_encoder_inside_it_are_not_both_accelerated(outer_first):
    videomae = catalogue.stir(tiny.build("videomae"))
    first, second = videomae, videomae.videomae
    if not outer_first:
        first, second = second, first
    with accelerate(first, ToMe(r=6)):
        wanted = catalogue.logits(videomae, tiny.clip())
        with pytest.raises(ConflictError, match="accelerated already"):
            accelerate(second, RandomDrop())
        assert torch.equal(catalogue.logits(videomae, tiny.clip()), wanted)


def test_a_recipe_without_a_site_is_refused_with_what_there_is(videomae):
    with pytest.raises(NoMatchingSitesError, match="4 layers with sites of kind input, joint"):
        accelerate(videomae, EVAD(depths=()))


@pytest.mark.parametrize(
    ("name", "recipe", "text"),
    [
        ("videomae", ATS(), "VideoMAE has no class token"),
        ("vjepa2", ATS(), "V-JEPA 2 has no class token"),
        ("videomae", TESTA(), "jointly over space and time"),
        ("vivit", TESTA(), "jointly over space and time"),
        ("timesformer_joint", TESTA(), "jointly over space and time"),
        ("timesformer", ToMe(), "only structured reductions"),
        ("timesformer", RLT(), "only structured reductions"),
    ],
)
def test_refusals_say_what_is_missing(hosts, name, recipe, text):
    with pytest.raises(UnsupportedError, match=text):
        accelerate(hosts[name], recipe)


def test_an_accelerated_model_is_neither_copied_nor_pickled():
    videomae = catalogue.stir(tiny.build("videomae"))
    with accelerate(videomae, ToMe(r=6)):
        wanted = catalogue.logits(videomae, tiny.clip())
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedError, match="remove"):
                copied(videomae)
        assert torch.equal(catalogue.logits(videomae, tiny.clip()), wanted)
    dense = catalogue.logits(videomae, tiny.clip())
    assert torch.equal(catalogue.logits(copy.deepcopy(videomae), tiny.clip()), dense)


# Composition


def test_RandomDrop_then_ToMe_equals_the_loops(hosts):
    model, pixels = hosts["videomae"], tiny.clip(2)
    with accelerate(model, RandomDrop(keep_ratio=0.5), ToMe(r=4)) as handle:
        got = catalogue.logits(model, pixels)
    assert handle.report().tokens_per_layer == [32, 28, 24, 20]
    dropped = handle.assignment[0].index[0] < 0
    kept = (~dropped).nonzero().flatten().tolist()
    wanted = oracles.encode(model, pixels, both(oracles.keep_places(kept), oracles.tome(4)), True)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


@pytest.mark.parametrize("name", ["videomae", "vjepa2", "vivit", "timesformer_joint"])
def test_RLT_then_ToMe_merges_samples_of_different_length(hosts, name):
    model, pixels = hosts[name], tiny.clip(2)
    with accelerate(model, RLT(), ToMe(r=4)) as handle:
        got = catalogue.logits(model, pixels)
    counts = [a.num_out for a in handle.assignment]
    assert len(counts) == 2
    assert counts[0] != counts[1]
    wanted = oracles.encode(model, pixels, both(oracles.rlt(0.1), oracles.tome(4)), True)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_RLT_then_EVAD_drops_within_what_is_left(hosts):
    model, pixels = hosts["vivit"], tiny.clip(2, still=0.3)
    with accelerate(model, RLT(), EVAD(keep_ratio=0.8)):
        got = catalogue.logits(model, pixels)
    reducer = both(oracles.rlt(0.1), oracles.evad(0.8, 1.0, (1, 2, 3)))
    for sample, wanted in zip(got, pixels, strict=True):
        loops = oracles.encode(model, wanted[None], reducer)
        assert catalogue.difference(sample[None], loops) <= tolerances.ORACLE


def test_ToMe_with_TempScale_is_ToMe_on_a_sharper_model(hosts):
    model, pixels = hosts["vivit"], tiny.clip(2)
    with accelerate(model, ToMe(r=6), TempScale(temperature=0.5)) as handle:
        got = catalogue.logits(model, pixels)
    sharper = copy.deepcopy(model)
    for layer in sharper.vivit.layers:
        layer.attention.scaling *= 2
    with accelerate(sharper, ToMe(r=6)):
        wanted = catalogue.logits(sharper, pixels)
    assert catalogue.difference(got, wanted) <= tolerances.REPLACED_ATTENTION
    assert all(what.startswith("TempScale") for what in handle.report().attention)


def test_UniformPool_then_TESTA_shrinks_a_pooled_grid(hosts):
    model, pixels = hosts["timesformer"], tiny.clip(2)
    with accelerate(model, UniformPool(factor=(2, 2, 1)), TESTA(frames=1, patches=1)) as handle:
        got = catalogue.logits(model, pixels)
    assert bool(got.isfinite().all())
    # 4 x 8 tokens and the class token; a frame and a patch less in each layer.
    assert handle.report().tokens_per_layer == [33, 1 + 3 * 7, 1 + 2 * 6, 1 + 1 * 5]
    (assignment,) = handle.assignment
    assignment.check()
    assert assignment.size.sum(1).tolist() == [129, 129]
    assert assignment.size[:, 0].tolist() == [1, 1]
    with accelerate(model, UniformPool(factor=(2, 2, 1)), TESTA(frames=1, patches=1)):
        singles = torch.cat([catalogue.logits(model, clip[None]) for clip in pixels])
    assert catalogue.difference(got, singles) <= tolerances.SPLIT_BATCH


def both(first, then):
    """Two reducers one after the other at every place."""
    return lambda scene, tokens: then(scene, first(scene, tokens))


# Handle and report


def test_assignment_tells_where_every_token_went(videomae):
    pixels = tiny.clip(2)
    handle = accelerate(videomae, ToMe(r=6))
    assert handle.assignment is None
    catalogue.logits(videomae, pixels)
    (assignment,) = handle.assignment
    handle.remove()
    assignment.check()
    assert (assignment.batch, assignment.num_in, assignment.num_out) == (2, 64, 40)
    tokens = oracles.final_tokens(videomae, pixels, oracles.tome(6), True)
    for row, sample in zip(assignment.index, tokens, strict=True):
        for output, token in enumerate(sample):
            assert (row == output).nonzero().flatten().tolist() == sorted(token.members)


def test_report_counts_tokens_calls_and_changes(videomae):
    with accelerate(videomae, ToMe(r=6)) as handle:
        catalogue.logits(videomae, tiny.clip(2))
        catalogue.logits(videomae, tiny.clip(3))
    data = handle.report().to_dict()
    assert (data["calls"], data["tokens_in"]) == (2, 64)
    assert data["tokens_per_layer"] == [64, 58, 52, 46]
    assert [(c["before"], c["after"]) for c in data["changes"]] == [
        (64, 58),
        (58, 52),
        (52, 46),
        (46, 40),
    ]
    # Nothing is merged in the first layer yet, so its attention is the host's.
    assert data["attention"] == {"as in the host": 2, "sdpa, log-size bias": 6}
    assert handle.report().mean_tokens == 55
    assert "ToMe(r=6) at videomae.encoder.layer.0: 64 -> 58" in str(handle.report())


def test_report_averages_over_samples_of_different_length(videomae):
    with accelerate(videomae, RLT()) as handle:
        catalogue.logits(videomae, tiny.clip(2))
    counts = [a.num_out for a in handle.assignment]
    assert handle.report().tokens_per_layer == [sum(counts) / 2] * 4


def test_a_recipe_that_never_acts_is_warned_about(videomae):
    with (
        pytest.warns(NoEffectWarning, match=r"RLT\(threshold=0.0\) ran 1 times"),
        accelerate(videomae, RLT(threshold=0.0)),
    ):
        catalogue.logits(videomae, tiny.clip())


# Taking it back


@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2"])
@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_the_attention_that_a_host_was_set_to_comes_back_and_is_used_meanwhile(name, own):
    model, pixels = catalogue.stir(tiny.build(name)), tiny.clip(2)
    model.set_attn_implementation(own)
    dense = catalogue.logits(model, pixels)
    before = catalogue.snapshot(model)
    with accelerate(model, ToMe(r=(0, 0, 0, 6))):
        catalogue.logits(model, pixels)
    assert model.config._attn_implementation == own
    catalogue.assert_untouched(model, before)
    assert torch.equal(catalogue.logits(model, pixels), dense)
    with pytest.warns(NoEffectWarning), accelerate(model, ToMe(r=0)):
        assert torch.equal(catalogue.logits(model, pixels), dense)


def test_two_models_at_once_do_not_disturb_each_other(hosts):
    one, other = hosts["videomae"], catalogue.stir(tiny.build("videomae", seed=7), seed=7)
    third, pixels = hosts["vivit"], tiny.clip(2)
    alone = []
    for model, recipe in ((one, ToMe(r=6)), (other, RLT()), (third, EVAD())):
        with accelerate(model, recipe):
            alone.append(catalogue.logits(model, pixels))
    plain = catalogue.logits(other, pixels)
    with accelerate(one, ToMe(r=6)), accelerate(third, EVAD()):
        assert torch.equal(catalogue.logits(other, pixels), plain)
        handle = accelerate(other, RLT())
        together = [catalogue.logits(model, pixels) for model in (one, other, third)]
        handle.remove()
        assert torch.equal(catalogue.logits(one, pixels), alone[0])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_an_error_inside_the_block_still_gives_the_model_back(videomae):
    before = catalogue.snapshot(videomae)
    with pytest.raises(KeyError), accelerate(videomae, ToMe()):
        raise KeyError
    catalogue.assert_untouched(videomae, before)


def test_a_model_thrown_away_while_accelerated_is_freed():
    model = tiny.build("videomae")
    handle = accelerate(model, ToMe(r=6))
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


def test_inference_mode_and_changing_batch_sizes(videomae):
    with torch.inference_mode(), accelerate(videomae, ToMe(r=6)):
        counts = [videomae(tiny.clip(batch)).logits.shape[0] for batch in (1, 3, 2)]
    assert counts == [1, 3, 2]
