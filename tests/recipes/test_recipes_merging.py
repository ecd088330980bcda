"""Merging: each test states the paper's claim and fails when the distinguishing step is gone."""

import pytest
import torch

from tubelet.core.grid import TokenGrid
from tubelet.models.accelerate import accelerate
from tubelet.recipes import TESTA, ToMe, VidTLDR
from tubelet.testing import catalogue, oracles, tiny, tolerances

JOINT = ["videomae", "vivit", "vjepa2", "timesformer_joint"]


def unit(degrees: list[float]) -> torch.Tensor:
    """One sample of 2-d features at the given angles."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[None]


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("proportional", [True, False])
def test_ToMe_equals_the_loops(host, accelerated, name, proportional):
    model, pixels = host(name), tiny.clip(2)
    got = accelerated(model, ToMe(r=6, proportional=proportional), pixels)
    wanted = oracles.encode(model, pixels, oracles.tome(6), size_bias=proportional)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_ToMe_merges_by_keys_and_not_by_hidden_states(context):
    # By keys 2 is next to 3; by hidden states 0 is next to 1.
    ctx = context(unit([0, 0, 60, 180]), keys=unit([0, 90, 200, 201]))
    plan = ToMe(r=1).plan(ctx)
    assert plan.anchor.tolist() == [[0, 1, 3]]
    assert plan.index.tolist() == [[0, 1, 2, 2]]


def test_ToMe_only_joins_even_with_odd_places(context):
    # 0 and 2 are equal, but both are sources; 2 goes to its best odd place.
    ctx = context(torch.zeros(1, 4, 2), keys=unit([0, 80, 0, 70]))
    plan = ToMe(r=1).plan(ctx)
    assert plan.anchor.tolist() == [[1, 2, 3]]
    assert plan.index.tolist() == [[2, 0, 1, 2]]


def test_ToMe_means_are_weighted_by_size(context):
    hidden = torch.tensor([[[0.0], [8.0], [50.0], [60.0]]])
    ctx = context(hidden, keys=unit([0, 1, 90, 180]), size=torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
    assert ToMe(r=1).plan(ctx).reduce(hidden).flatten().tolist() == [2.0, 50.0, 60.0]


@pytest.mark.parametrize("name", ["videomae", "timesformer_joint"])
def test_ToMe_of_exact_duplicates_equals_the_full_model(name):
    # Neighbouring pairs of places show the same and have one position, so they stay equal in all
    # layers; only a log-size bias and size-weighted pooling make the merged model exact.
    model, pixels = twins(name)
    dense = catalogue.logits(model, pixels)
    half = 64 if name == "timesformer_joint" else 32
    with accelerate(model, ToMe(r=(half // 2, half // 2))) as handle:
        merged = catalogue.logits(model, pixels)
    assert handle.report().tokens_per_layer[-1] == handle.report().tokens_in - half
    assert catalogue.difference(merged, dense) <= tolerances.DUPLICATES
    with accelerate(model, ToMe(r=(half // 2, half // 2), proportional=False)):
        unbiased = catalogue.logits(model, pixels)
    assert catalogue.difference(unbiased, dense) > 100 * tolerances.DUPLICATES


def twins(name):
    """A host and clips in which tokens 2i and 2i + 1 (in raster order) are equal.

    Only a third of the pairs is at first merged, so that sizes differ while attention runs.
    """
    model, pixels = catalogue.stir(tiny.build(name)), tiny.clip(2, still=0.0)
    patches = pixels.unflatten(4, (2, 2, tiny.PATCH))
    patches[..., 1, :] = patches[..., 0, :]
    base = model.videomae if name == "videomae" else model.timesformer
    if name == "videomae":
        table = base.embeddings.position_embeddings
        table.data[:, 1::2] = table[:, 0::2]
    else:
        table = base.embeddings.position_embeddings.data
        table[:, 2::2] = table[:, 1::2]
    return model, pixels


def test_ToMe_protects_class_tokens_from_both_sides(context):
    # Counted without the class token, 1 is a source; it equals the class token, which stays.
    grid = TokenGrid(frames=1, height=1, width=4, before=1)
    ctx = context(torch.zeros(1, 5, 2), grid=grid, keys=unit([0, 0, 80, 90, 90]))
    plan = ToMe(r=2).plan(ctx)
    assert plan.anchor.tolist() == [[0, 2, 4]]
    assert plan.index.tolist() == [[0, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("recipe", "left"),
    [
        (ToMe(r=6), [64, 58, 52, 46]),
        (ToMe(r=(8, 2)), [64, 56, 54, 54]),
        (ToMe(r=6, inflection=-1.0), [64, 52, 44, 40]),
        (ToMe(r=6, inflection=1.0), [64, 64, 60, 52]),
    ],
    ids=str,
)
def test_ToMe_spends_its_budget_over_the_depth_as_asked(host, recipe, left):
    model = host("videomae")
    with accelerate(model, recipe) as handle:
        catalogue.logits(model, tiny.clip())
    assert handle.report().tokens_per_layer == left


@pytest.mark.parametrize("name", JOINT)
def test_VidTLDR_equals_the_loops(host, accelerated, name):
    # Standing patches give nearly tied similarities, which rounding would decide.
    model, pixels = host(name), tiny.clip(2, still=0.0)
    got = accelerated(model, VidTLDR(share=(0.2, 0.1)), pixels)
    wanted = oracles.encode(model, pixels, oracles.vid_tldr((0.2, 0.1)))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_VidTLDR_background_that_merges_away_adds_nothing(context):
    # Source 0 is diffuse (high entropy), source 2 focused; each equals its destination's angle.
    hidden = 10 * unit([0, 1, 90, 91])
    entropy = torch.tensor([[4.0, 4.0, 0.0, 4.0]])
    reduced = VidTLDR(share=(0.5,)).plan(context(hidden, entropy=entropy)).reduce(hidden)
    # The denominator keeps both sizes, so background halves its destination...
    assert torch.allclose(reduced[0, 0], hidden[0, 1] / 2)
    # ...while a salient source counts in full; destinations are never scaled.
    assert torch.allclose(reduced[0, 1], (hidden[0, 2] + hidden[0, 3]) / 2)


def test_VidTLDR_never_scales_tokens_that_stay(context):
    hidden = 10 * unit([0, 1, 45, 90])
    entropy = torch.tensor([[0.0, 4.0, 4.0, 4.0]])
    plan = VidTLDR(share=(0.25,)).plan(context(hidden, entropy=entropy))
    assert plan.anchor.tolist() == [[1, 2, 3]]
    assert torch.equal(plan.reduce(hidden)[0, 1:], hidden[0, 2:])
    assert torch.allclose(plan.reduce(hidden)[0, 0], (hidden[0, 0] + hidden[0, 1]) / 2)


def test_VidTLDR_reduces_in_the_first_layers_only(host):
    model = host("videomae")
    with accelerate(model, VidTLDR(share=(0.25, 0.125))) as handle:
        catalogue.logits(model, tiny.clip())
    assert handle.report().tokens_per_layer == [64, 48, 40, 40]


@pytest.mark.parametrize(("frames", "patches"), [(1, 3), (2, 0), (0, 5)])
def test_TESTA_equals_the_loops(host, accelerated, frames, patches):
    model, pixels = host("timesformer"), tiny.clip(2)
    got = accelerated(model, TESTA(frames=frames, patches=patches), pixels)
    wanted = oracles.testa(model, pixels, frames, patches)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_TESTA_places_vote_in_common_for_the_frames_to_merge(context):
    # Two places of one clip: alone, one would merge frame 0 into 1 and the other into 3; the mean
    # similarity is highest for frame 2 into 3, which is neither's first choice.
    one, other = unit([0, 0, 40, 60, 200, 300]), unit([0, 120, 40, 60, 200, 300])
    other[0, 4:] = one[0, 4:]
    keys = torch.cat([one, other])
    ctx = context(torch.zeros(2, 6, 2), kind="temporal", shared=2, keys=keys)
    plan = TESTA(frames=1).plan(ctx)
    assert plan.anchor.tolist() == [[0, 1, 3, 4, 5]] * 2
    assert plan.index.tolist() == [[0, 1, 2, 2, 3, 4]] * 2


def test_TESTA_matches_the_patches_of_each_frame_alone(context):
    keys = torch.cat([unit([0, 1, 90, 180]), unit([0, 60, 179, 180])])
    plan = TESTA(patches=1).plan(context(torch.zeros(2, 4, 2), kind="spatial", keys=keys))
    assert plan.anchor.tolist() == [[1, 2, 3], [0, 1, 3]]


def test_TESTA_keeps_time_and_space_in_order(host):
    model = host("timesformer")
    with accelerate(model, TESTA(frames=1, patches=3)) as handle:
        catalogue.logits(model, tiny.clip(2))
    (assignment,) = handle.assignment
    assignment.check()
    # 8 frames lose 1 in each of 4 layers, 16 places lose 3: 4 x 4 tokens and the class token.
    assert assignment.num_out == 17
    assert bool((assignment.anchor.diff(dim=1) > 0).all())
