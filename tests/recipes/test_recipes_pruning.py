"""Pruning: each test states the paper's claim and fails when the distinguishing step is gone."""

import pytest
import torch

from tubelet.core.grid import TokenGrid
from tubelet.models.accelerate import accelerate
from tubelet.recipes import ATS, EVAD, RLT
from tubelet.testing import catalogue, oracles, tiny, tolerances

JOINT = ["videomae", "vivit", "vjepa2", "timesformer_joint"]
WITH_CLASS_TOKEN = ["vivit", "timesformer_joint"]


def kept_by(recipe, model, pixels):
    """Original positions that survive, per sample."""
    with accelerate(model, recipe) as handle:
        catalogue.logits(model, pixels)
    return [row.tolist() for a in handle.assignment for row in a.anchor]


def one_place(values, context, threshold=0.1):
    """Tubelets that RLT keeps of a clip with one place and 2-frame tubelets of even colour."""
    pixels = torch.tensor(values).reshape(1, -1, 1, 1, 1).expand(1, -1, 3, 4, 4)
    grid = TokenGrid(frames=len(values) // 2, height=1, width=1)
    hidden = torch.zeros(1, grid.num_tokens, 1)
    mask = RLT(threshold=threshold).keep(context(hidden, grid=grid, kind="input", pixels=pixels))
    return mask[0].nonzero().flatten().tolist()


def drifting(batch):
    """Clips whose places brighten at different speeds, so that changes pass 0.1 at some point."""
    speed = torch.rand(batch, 1, 1, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4) * 0.08
    time = torch.arange(tiny.FRAMES).reshape(1, -1, 1, 1, 1)
    return tiny.clip(batch)[:, :1] + speed * time


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("clip", [tiny.clip, drifting], ids=["still places", "slow fades"])
def test_RLT_equals_the_loops(host, accelerated, name, clip):
    model, pixels = host(name), clip(3)
    got = accelerated(model, RLT(), pixels)
    wanted = oracles.encode(model, pixels, oracles.rlt(0.1))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_RLT_keeps_the_first_tubelet_of_every_place_of_a_still_clip(host):
    pixels = tiny.clip(2)[:, :1].expand(-1, tiny.FRAMES, -1, -1, -1)
    assert kept_by(RLT(), host("videomae"), pixels) == [list(range(16))] * 2


def test_RLT_adds_up_a_slow_fade(context):
    # 0.03 per frame: neighbours differ by 0.09 and would all be dropped; the second tubelet is
    # 0.09 and the third 0.15 away from the first.
    assert one_place([0.03 * t for t in range(12)], context) == [0, 2, 4]


def test_RLT_compares_the_first_frame_there_with_the_last_frame_here(context):
    # Nothing but the last frame moves, then the old value returns in a first frame.
    assert one_place([0.0, 0.0, 0.0, 1.0], context) == [0, 1]
    assert one_place([0.0, 0.0, 1.0, 0.0], context) == [0]
    # The kept tubelet's first frame is what counts, not its last.
    assert one_place([0.0, 1.0, 0.0, 0.0], context) == [0]


def test_RLT_takes_the_mean_over_the_tubelet(context):
    pixels = torch.zeros(1, 4, 3, 4, 4)
    pixels[0, 2:, :, 0, 0] = 1.6  # one pixel of 16: a mean of 0.1
    grid = TokenGrid(frames=2, height=1, width=1)
    ctx = context(torch.zeros(1, 2, 1), grid=grid, kind="input", pixels=pixels)
    assert RLT(threshold=0.11).keep(ctx).sum() == 1
    assert RLT(threshold=0.09).keep(ctx).all()


def test_RLT_sees_changes_of_either_sign(context):
    assert one_place([0.0, 0.0, -1.0, -1.0, 0.0, 0.0], context) == [0, 1, 2]


@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
@pytest.mark.parametrize(("samples", "least"), [(0.5, 8), (1.0, 8), (0.2, 1)])
def test_ATS_equals_the_loops(host, accelerated, name, samples, least):
    model, pixels = host(name), tiny.clip(2)
    video = 128 if name == "timesformer_joint" else 64
    recipe = ATS(first_layer=1, samples=samples, min_tokens=least)
    levels = -int(-video * samples // 1)
    wanted = oracles.encode(model, pixels, oracles.ats(1, levels, least))
    assert catalogue.difference(accelerated(model, recipe, pixels), wanted) <= tolerances.ORACLE


def significance(context, row, norm=None, heads=1):
    """A context in which the class token's row and the value norms are as stated."""
    num = len(row)
    weights = torch.tensor(row).expand(1, heads, num, num)
    norm = torch.ones(1, heads, num) if norm is None else torch.tensor(norm).expand(1, heads, num)
    grid = TokenGrid(frames=1, height=1, width=num - 1, before=1)
    return context(torch.zeros(1, num, 2), grid=grid, weights=weights, value_norm=norm)


def kept_places(mask):
    return mask[0].nonzero().flatten().tolist()


def test_ATS_count_adapts_to_how_peaked_attention_is(context):
    recipe = ATS(first_layer=0, min_tokens=1)
    # Min-max scaling puts the weakest token at level 0, where no level is: one always goes.
    flat = significance(context, [0.1] * 11)
    assert len(kept_places(recipe.keep(flat))) == 10
    # One token holds almost everything: most levels pick it, and it is kept once.
    peaked = significance(context, [0.05] + [0.001] * 9 + [0.9])
    assert len(kept_places(recipe.keep(peaked))) < 5


def test_ATS_samples_the_distribution_and_not_its_top(context):
    # Ten weak tokens hold as much as two strong ones, so they get some of the levels.
    row = [0.1] + [0.04] * 10 + [0.25, 0.25]
    kept = kept_places(
        ATS(first_layer=0, samples=0.5, min_tokens=1).keep(significance(context, row))
    )
    assert {11, 12} & set(kept)
    assert set(kept) & set(range(1, 11))


def test_ATS_weighs_attention_by_the_value_norm(context):
    row, norm = [0.1] + [0.1] * 8 + [0.1], [1.0] * 9 + [1000.0]
    recipe = ATS(first_layer=0, min_tokens=1)
    assert kept_places(recipe.keep(significance(context, row, norm)))[-1] == 9
    assert len(kept_places(recipe.keep(significance(context, row, norm)))) < 5
    assert len(kept_places(recipe.keep(significance(context, row)))) == 9


def test_ATS_keeps_all_where_it_would_keep_too_few(context):
    peaked = significance(context, [0.05] + [0.001] * 9 + [0.9])
    assert ATS(first_layer=0, min_tokens=8).keep(peaked).all()


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_EVAD_equals_the_loops(host, accelerated, name, weight):
    model, pixels = host(name), tiny.clip(2)
    got = accelerated(model, EVAD(keep_ratio=0.6, keyframe_weight=weight), pixels)
    wanted = oracles.encode(model, pixels, oracles.evad(0.6, weight, (1, 2, 3)))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_EVAD_never_drops_the_middle_frame(host):
    # 16 of 64 tokens are the keyframe; a tenth is asked for and the keyframe remains, no more.
    kept = kept_by(EVAD(keep_ratio=0.1), host("videomae"), tiny.clip(2))
    assert kept == [list(range(32, 48))] * 2
    kept = kept_by(EVAD(keep_ratio=0.1), host("vivit"), tiny.clip(2))
    assert kept == [[0, *range(33, 49)]] * 2


def attention_to(context, weights):
    """Four frames of one place; the keyframe is frame 2."""
    grid = TokenGrid(frames=4, height=1, width=1)
    return context(torch.zeros(1, 4, 2), grid=grid, weights=torch.tensor([[weights]]))


def test_EVAD_keeps_what_receives_attention_and_not_what_gives_it(context):
    # Columns are keys: 3 receives most, though every row sums to 1.
    weights = [
        [0.1, 0.2, 0.1, 0.6],
        [0.1, 0.2, 0.1, 0.6],
        [0.3, 0.2, 0.2, 0.3],
        [0.0, 0.2, 0.2, 0.6],
    ]
    plan = EVAD(keep_ratio=0.5).plan(attention_to(context, weights))
    assert plan.anchor.tolist() == [[2, 3]]


def test_EVAD_counts_the_keyframes_queries_more_if_asked(context):
    # Frame 2 looks at 0, all others look at 1.
    weights = [
        [0.1, 0.6, 0.1, 0.2],
        [0.1, 0.6, 0.1, 0.2],
        [0.9, 0.0, 0.1, 0.0],
        [0.1, 0.6, 0.1, 0.2],
    ]
    ctx = attention_to(context, weights)
    assert EVAD(keep_ratio=0.5).plan(ctx).anchor.tolist() == [[1, 2]]
    assert EVAD(keep_ratio=0.5, keyframe_weight=4.0).plan(ctx).anchor.tolist() == [[0, 2]]


def test_EVAD_drops_at_its_depths_only(host):
    model = host("videomae")
    with accelerate(model, EVAD(keep_ratio=0.7, depths=(0.0, 0.5))) as handle:
        catalogue.logits(model, tiny.clip())
    # ceil(0.7 * 64) = 45, ceil(0.7 * 45) = 32
    assert handle.report().tokens_per_layer == [64, 45, 45, 32]
