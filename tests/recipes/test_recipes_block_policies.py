"""What holds for every policy that picks blocks, on any grid."""

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tubelet.core.context import AttentionContext, Site
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention
from tubelet.recipes import catalogue
from tubelet.recipes.block_policy import BlockPolicy
from tubelet.testing.catalogue import identity_of

SMALL = {
    "EfficientVDiT": {"references": 1},
    "RadialAttention": {"sink": False},
    "NeighborhoodAttention": {"tile": (2, 2, 4), "window": (3, 3, 5)},
    "NABLA": {"tile": (1, 4, 4), "window": (3, 1, 1), "mass": 0.5},
    "SlidingTile": {"tile": (2, 3, 4), "window": (1, 2, 2)},
    "DraftAttention": {"tile": (1, 4, 4)},
    "XAttention": {"mass": 0.5, "order": "hilbert"},
    "SpargeAttention": {"mass": 0.5, "similarity": 0.04, "order": "hwt"},
}
"""Settings for grids of a few hundred tokens; blocks are 16 tokens everywhere."""
POLICIES = {
    name: cls(**{"block": (32, 16), **SMALL.get(name, {})})
    for name, cls in catalogue().items()
    if issubclass(cls, BlockPolicy)
}
each = pytest.mark.parametrize("name", POLICIES)
SETTINGS = settings(
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
GRIDS = st.builds(
    TokenGrid,
    frames=st.sampled_from([1, 2, 5, 7]),
    height=st.sampled_from([1, 3, 7, 8]),
    width=st.sampled_from([1, 5, 8, 11]),
    before=st.sampled_from([0, 0, 1, 19]),
    after=st.sampled_from([0, 0, 3, 40, 300]),
)


def call(grid, batch=1, heads=2, key_heads=1, padding=0, seed=0, layer=1):
    generator = torch.Generator().manual_seed(seed)
    num = grid.num_tokens
    q, k, v = (
        torch.randn(batch, h, num, 8, generator=generator) for h in (heads, key_heads, key_heads)
    )
    site = Site(name="layer", layer=layer, num_layers=4, kind="joint")
    keys = num - padding if padding else None
    return AttentionContext(
        site=site, grid=grid, query=2 * q, key=2 * k, value=v, scale=8**-0.5, num_keys=keys
    )


def sample(ctx, index):
    part = {n: getattr(ctx, n)[index : index + 1] for n in ("query", "key", "value")}
    return dataclasses.replace(ctx, **part, state={})


def order_of(plan, num):
    return torch.arange(num)[None] if plan.order is None else plan.order


def token_table(ctx, plan):
    """[B, H, N, keys] pairs attended to, in the order of the sequence."""
    mask, num = plan.mask.token_mask(), ctx.grid.num_tokens
    order = order_of(plan, num)[0]
    table = torch.zeros(*mask.shape[:2], num, num, dtype=torch.bool)
    table[:, :, order[:, None], order[None, : mask.shape[3]]] = mask
    return table


@each
@SETTINGS
@given(grid=GRIDS, layer=st.integers(0, 2), padded=st.booleans())
def test_plan_covers_every_token_and_keeps_exempt_ones(name, grid, layer, padded):
    padding = grid.after // 2 if padded else 0
    ctx = call(grid, batch=2, padding=padding, layer=layer)
    plan = POLICIES[name].plan(ctx)
    num, order = grid.num_tokens, order_of(plan, grid.num_tokens)
    assert order.sort().values.tolist() == [list(range(num))]
    exempt = [*range(grid.before), *range(grid.before + grid.num_video, num)]
    assert order[0, grid.num_video :].tolist() == exempt
    assert (plan.mask.num_queries, plan.mask.num_keys) == (num, num - padding)
    assert bool((plan.mask.counts > 0).all())
    table = token_table(ctx, plan)
    real = [n for n in exempt if n < num - padding]
    assert bool(table[:, :, exempt, : num - padding].all())
    assert bool(table[..., real].all())
    assert not bool(table[..., num - padding :].any())
    live = torch.arange(plan.mask.indices.shape[3]) < plan.mask.counts[..., None]
    assert bool((plan.mask.indices[live] < plan.mask.grid[1]).all())
    assert int(plan.mask.to_dense().sum()) == int(plan.mask.counts.sum()), "a block is listed twice"


@each
@SETTINGS
@given(grid=GRIDS)
def test_identity_point_keeps_everything(name, grid):
    plan = identity_of(POLICIES[name]).plan(call(grid))
    assert plan.mask.density == 1


@each
def test_a_batch_decides_as_its_samples_do(name):
    ctx = call(TokenGrid(frames=4, height=6, width=8, after=5), batch=2, heads=4, key_heads=2)
    together = token_table(ctx, POLICIES[name].plan(ctx)).expand(2, 4, -1, -1)
    for index in range(2):
        alone = sample(ctx, index)
        table = token_table(alone, POLICIES[name].plan(alone))
        assert torch.equal(table.expand(1, 4, -1, -1)[0], together[index])
    assert not bool(together.all()), "the plan is dense, so this test sees nothing"


@each
def test_plan_survives_json(name):
    plan = POLICIES[name].plan(call(TokenGrid(frames=3, height=5, width=7, before=2)))
    back = AttentionPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert torch.equal(back.order, plan.order)
    assert torch.equal(back.mask.to_dense(), plan.mask.to_dense())
    assert back.approximate == plan.approximate


@each
def test_poisoned_padding_changes_nothing(name):
    grid = TokenGrid(frames=3, height=5, width=8, before=3, after=30)
    ctx = call(grid, padding=17)
    clean = POLICIES[name].plan(ctx)
    dirty = dataclasses.replace(ctx, state={})
    for x in (ctx.query, ctx.key, ctx.value):
        x[:, :, -17:] = torch.nan
    assert torch.equal(POLICIES[name].plan(dirty).mask.to_dense(), clean.mask.to_dense())


@each
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 20)])
def test_attention_under_the_plan_is_attention_under_its_token_mask(name, before, after):
    ctx = call(TokenGrid(frames=4, height=5, width=8, before=before, after=after))
    plan = dataclasses.replace(POLICIES[name].plan(ctx), approximate=False)
    out, _ = attention(ctx.query, ctx.key, ctx.value, plan, scale=ctx.scale, impl="reference")
    logits = ctx.query @ ctx.key.transpose(2, 3) * ctx.scale
    weights = logits.masked_fill(~token_table(ctx, plan), -torch.inf).softmax(-1)
    torch.testing.assert_close(out, weights @ ctx.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["SubBlock", "SpargeAttention", "XAttention", "SolAttn"])
def test_unknown_order_is_refused(name):
    with pytest.raises(RecipeError, match=f"{name}.order must be one of thw"):
        catalogue()[name](order="wht,")
