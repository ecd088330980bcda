"""Baselines: random drop and uniform pooling."""

import pytest
import torch
import torch.nn.functional as F

from tubelet.core.grid import TokenGrid
from tubelet.models.accelerate import accelerate
from tubelet.recipes import RandomDrop, UniformPool
from tubelet.testing import catalogue, oracles, tiny, tolerances

GRID = TokenGrid(frames=6, height=5, width=7, before=1)
HOSTS = ["videomae", "vivit", "vjepa2", "timesformer_joint"]


def plan_of(recipe, context, batch=3):
    return recipe.plan(context(torch.randn(batch, GRID.num_tokens, 4), grid=GRID, kind="input"))


def test_RandomDrop_is_the_same_for_every_sample_and_run(context):
    first, second = (plan_of(RandomDrop(), context) for _ in range(2))
    assert torch.equal(first.anchor, second.anchor)
    assert torch.equal(first.anchor, first.anchor[:1].expand(3, -1))


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 105), (0.3, 63), (0.32, 68), (0.001, 1)])
def test_RandomDrop_keeps_the_exact_share_and_the_class_token(context, ratio, kept):
    plan = plan_of(RandomDrop(keep_ratio=ratio), context)
    assert plan.num_out == kept + 1
    assert plan.anchor[:, 0].tolist() == [0, 0, 0]


def test_RandomDrop_keeps_the_same_count_in_every_frame_if_asked(context):
    def counts(recipe):
        frames = GRID.frame_index()[plan_of(recipe, context).anchor[0, 1:]]
        return frames.bincount(minlength=6).tolist()

    # 0.3 of 35 places, rounded up, in each of 6 frames.
    assert counts(RandomDrop(keep_ratio=0.3, per_frame=True)) == [11] * 6
    assert len(set(counts(RandomDrop(keep_ratio=0.3)))) > 1


def test_RandomDrop_has_no_favourite_place(context):
    # Over 400 seeds each token is kept 200 +- 10 times; 6 deviations leave room for 210 tokens.
    seen = torch.zeros(GRID.num_tokens)
    for seed in range(400):
        seen[plan_of(RandomDrop(seed=seed), context, batch=1).anchor[0]] += 1
    assert bool(((seen[1:] - 200).abs() < 60).all())


@pytest.mark.parametrize("name", HOSTS)
def test_RandomDrop_equals_the_hand_written_forward_on_the_tokens_it_keeps(host, name):
    model, pixels = host(name), tiny.clip(2)
    with accelerate(model, RandomDrop(keep_ratio=0.4)) as handle:
        got = catalogue.logits(model, pixels)
    kept = handle.assignment[0].anchor[0].tolist()
    wanted = oracles.encode(model, pixels, oracles.keep_places(kept))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 1, 1), (3, 2, 3), (1, 1, 4)])
def test_UniformPool_equals_avg_pool3d(context, factor):
    hidden = torch.randn(2, GRID.num_tokens, 4)
    got = UniformPool(factor=factor).plan(context(hidden, grid=GRID, kind="input")).reduce(hidden)
    video = hidden[:, 1:].transpose(1, 2).unflatten(2, (6, 5, 7))
    wanted = F.avg_pool3d(video, factor, ceil_mode=True, count_include_pad=False)
    assert torch.equal(got[:, 0], hidden[:, 0])
    assert torch.allclose(got[:, 1:], wanted.flatten(2).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("proportional", [True, False])
def test_UniformPool_equals_the_loops(host, accelerated, name, proportional):
    # Boxes of 3 leave smaller ones at the edges, so that sizes differ.
    model, pixels, factor = host(name), tiny.clip(2), (1, 3, 3)
    got = accelerated(model, UniformPool(factor=factor, proportional=proportional), pixels)
    wanted = oracles.encode(model, pixels, oracles.uniform_pool(factor), size_bias=proportional)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE
