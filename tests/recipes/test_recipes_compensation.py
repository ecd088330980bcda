"""Reuse of plans, and terms for what they leave out."""

import dataclasses

import pytest
import torch

from tubelet.core.grid import TokenGrid
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention
from tubelet.recipes import DeltaRows, MaskReuse, RandomBlocks, Rettention, ZerothOrder

GRID = TokenGrid(frames=4, height=8, width=8)
POLICY = RandomBlocks(density=0.25, block=(16, 16))


class TestMaskReuse:
    def calls(self, recipe, steps):
        state = {}
        return [recipe.reuses(dataclasses.replace(ctx, state=state)) for ctx in steps]

    def test_a_plan_serves_most_times_and_is_made_anew_then(self, attention_call):
        still = [attention_call(GRID)] * 8
        assert self.calls(MaskReuse(most=2), still) == [False, True, True] * 2 + [False, True]
        assert self.calls(MaskReuse(most=0), still) == [False] * 8
        by_age = MaskReuse(most=3, tolerance=None)
        assert self.calls(by_age, still) == [False, True, True, True] * 2

    @pytest.mark.parametrize("which", ["query", "key"])
    def test_drift_of_queries_or_keys_makes_a_new_plan(self, attention_call, which):
        ctx = attention_call(GRID, batch=2)
        moved = getattr(ctx, which).clone()
        # One head of one sample is enough.
        moved[1, 1] *= 1.3
        drifted = dataclasses.replace(ctx, **{which: moved})
        assert self.calls(MaskReuse(), [ctx, ctx, drifted, drifted]) == [False, True, False, True]
        assert self.calls(MaskReuse(tolerance=0.31), [ctx, drifted]) == [False, True]

    def test_slow_drift_adds_up_since_the_plan_was_made(self, attention_call):
        ctx = attention_call(GRID)
        steps = [dataclasses.replace(ctx, query=ctx.query * 1.08**n) for n in range(4)]
        assert self.calls(MaskReuse(), steps) == [False, True, True, False]

    def test_nan_is_no_permission_and_padding_does_not_count(self, attention_call):
        ctx = attention_call(dataclasses.replace(GRID, after=9), padding=9)
        ctx.query[:, :, -9:] = torch.nan
        broken = dataclasses.replace(ctx, query=torch.full_like(ctx.query, torch.nan))
        assert self.calls(MaskReuse(), [ctx, ctx, broken]) == [False, True, False]


def test_ZerothOrder_and_DeltaRows_leave_dense_calls_alone(attention_call):
    ctx = attention_call(GRID)
    for recipe in (ZerothOrder(), DeltaRows(), DeltaRows(stride=None)):
        assert recipe.compensate(ctx, AttentionPlan()).is_dense


def test_ZerothOrder_marks_what_a_mask_leaves_out(attention_call):
    ctx = attention_call(GRID)
    plan = POLICY.plan(ctx)
    added = ZerothOrder().compensate(ctx, plan)
    assert added.approximate
    assert added.mask is plan.mask
    assert not plan.approximate
    assert not ZerothOrder(first_layer=3).acts_on(ctx.site)


def test_DeltaRows_asks_for_one_dense_row_in_so_many(attention_call):
    ctx = attention_call(GRID)
    plan = POLICY.plan(ctx)
    assert DeltaRows().compensate(ctx, plan).delta_rows == 64
    assert DeltaRows(stride=None).compensate(ctx, plan) == plan


class TestRettention:
    def run(self, recipe, contexts):
        """Outputs of a run, done as a host does it, and which calls were dense."""
        state, outs, dense = {}, [], []
        for ctx in contexts:
            ctx = dataclasses.replace(ctx, state=state)
            plan, qkv = POLICY.plan(ctx), (ctx.query, ctx.key, ctx.value)
            wanted = recipe.wants_dense(ctx)
            plan = recipe.compensate(ctx, plan)
            out, lse = attention(*qkv, AttentionPlan(mask=plan.mask), scale=ctx.scale)
            if wanted:
                ctx.state["dense"] = whole = attention(*qkv, scale=ctx.scale)
            recipe.observe(ctx, plan, out, lse)
            if plan.gain is not None:
                out = plan.gain[..., None] * out + plan.residual
            outs.append(whole[0] if wanted else out)
            dense.append(wanted)
        return outs, dense, state

    def test_one_call_in_so_many_is_dense(self, attention_call):
        calls = [attention_call(GRID)] * 12
        assert self.run(Rettention(refresh=5), calls)[1] == ([True] + [False] * 4) * 2 + [True] + [
            False
        ]
        assert all(self.run(Rettention(refresh=1), calls)[1])

    def test_without_growth_the_dense_output_of_the_same_inputs_comes_back(self, attention_call):
        ctx = attention_call(GRID, batch=2)
        outs, dense, _ = self.run(Rettention(growth=0.0), [ctx, ctx, ctx])
        assert dense == [True, False, False]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0])

    def test_rho_is_the_kept_share_of_the_softmax_and_grows_to_one(self, attention_call):
        ctx = attention_call(GRID)
        state = self.run(Rettention(), [ctx])[2]
        weights = (ctx.query @ ctx.key.mT * ctx.scale).softmax(-1)
        mask = POLICY.plan(ctx).mask
        share = (weights * mask.token_mask()).sum(-1)
        torch.testing.assert_close(state["rho"], share)
        later = dataclasses.replace(ctx, state=state)
        recipe, plan = Rettention(refresh=99, growth=0.2), POLICY.plan(ctx)
        for k in range(1, 6):
            gain = recipe.compensate(later, plan).gain
            torch.testing.assert_close(gain, (share + 0.2 * k).clamp(max=1))
        assert float(gain.min()) == 1

    def test_a_dense_warm_up_call_is_no_cache(self, attention_call):
        ctx = attention_call(GRID)
        recipe, out = Rettention(), torch.zeros_like(ctx.query)
        recipe.observe(ctx, AttentionPlan(), out, out[..., 0])
        assert ctx.state == {}
        assert recipe.wants_dense(ctx)

    def test_the_residual_has_the_dtype_of_the_output(self, attention_call):
        ctx = attention_call(GRID)
        ctx.state["dense"] = (ctx.value.bfloat16(), torch.zeros(ctx.value.shape[:3]))
        Rettention().observe(ctx, POLICY.plan(ctx), ctx.value.bfloat16(), ctx.state["dense"][1])
        assert ctx.state["residual"].dtype == torch.bfloat16
        assert ctx.state["rho"].dtype == torch.float32
        assert "dense" not in ctx.state
