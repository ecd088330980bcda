"""Estimated block mass: what plain means hide is found."""

import dataclasses
import itertools

import pytest
import torch

from tubelet.core.context import StepContext
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.ops.block_score import block_means, pooled_scores
from tubelet.recipes import AdaSpa, SubBlock, XAttention

GRID = TokenGrid(frames=8, height=4, width=16)


def table(recipe, ctx):
    return recipe.plan(ctx).mask.to_dense()


def pooled_best(ctx, block):
    """The key block that plain means rank first, per query block."""
    q, k = (block_means(x, block, None, ctx.grid.num_tokens) for x in (ctx.query, ctx.key))
    return pooled_scores(q, k, ctx.scale).argmax(-1)


def true_best(ctx, block):
    weights = (ctx.query @ ctx.key.mT * ctx.scale).softmax(-1)
    return weights.unflatten(3, (-1, block)).sum(-1).unflatten(2, (-1, block)).sum(3).argmax(-1)


class TestSubBlock:
    RECIPE = SubBlock(block=(64, 64), density=1 / 8)

    def test_a_strong_part_of_a_block_is_found_where_its_mean_hides_it(self, attention_call):
        # A quarter of block 5 agrees with all queries and the rest opposes them; block 2 agrees
        # a little throughout.
        query, key = torch.zeros(2, 1, 1, 512, 16)
        query[..., 0] = 8
        key[:, :, 320:384, 0] = -4
        key[:, :, 336:352, 0] = 8
        key[:, :, 128:192, 0] = 1
        ctx = attention_call(GRID, heads=1, query=query, key=key)
        assert true_best(ctx, 64).unique().tolist() == [5]
        assert pooled_best(ctx, 64).unique().tolist() == [2]
        kept = table(self.RECIPE, ctx)[0, 0]
        assert kept.sum(-1).tolist() == [1] * 8
        assert bool(kept[:, 5].all())
        whole = dataclasses.replace(self.RECIPE, parts=(1, 1))
        assert bool(table(whole, ctx)[0, 0, :, 2].all())

    def test_density_is_the_same_in_every_row_and_head(self, attention_call):
        ctx = attention_call(GRID, batch=2, heads=4, key_heads=2)
        kept = table(SubBlock(block=(16, 16), density=0.25), ctx)
        assert bool((kept.sum(-1) == 8).all())

    def test_parts_must_divide_the_block(self):
        with pytest.raises(RecipeError, match=r"parts must divide the block \(64, 64\)"):
            SubBlock(parts=(4, 5))


class TestXAttention:
    def test_an_antidiagonal_stripe_is_found_where_all_means_are_equal(self, attention_call):
        # Token i of a query square attends to token 7 - i of the key squares of block 5; all
        # other keys are the mean of those.
        place, unit = torch.arange(512) % 8, torch.eye(16)
        query, key = 8 * unit[7 - place], (8 * unit[place]).unflatten(0, (-1, 8)).mean(1)
        key = key.repeat_interleave(8, 0)
        key[320:384] = 8 * unit[place[320:384]]
        ctx = attention_call(GRID, heads=1, query=query[None, None], key=key[None, None])
        assert true_best(ctx, 64).unique().tolist() == [5]
        means = block_means(ctx.key, 64, None, 512)
        torch.testing.assert_close(means, means[:, :, :1].expand_as(means))
        kept = table(XAttention(block=(64, 64), mass=0.9), ctx)[0, 0]
        assert kept.sum(-1).tolist() == [1] * 8
        assert bool(kept[:, 5].all())

    def test_a_vertical_stripe_is_found(self, attention_call):
        query, key = torch.randn(2, 1, 1, 512, 16)
        query[..., 0], key[..., 345, 0] = 8, 60
        ctx = attention_call(GRID, heads=1, query=query, key=key)
        assert bool(table(XAttention(block=(64, 64), mass=0.1), ctx)[0, 0, :, 5].all())

    def test_more_mass_keeps_more(self, attention_call):
        ctx = attention_call(GRID)
        shares = [
            float(table(XAttention(block=(16, 16), mass=mass), ctx).float().mean())
            for mass in (0.1, 0.5, 0.9)
        ]
        assert shares[0] < shares[1] < shares[2] < 1

    def test_stride_must_divide_the_block(self):
        with pytest.raises(RecipeError, match="stride must divide the block"):
            XAttention(stride=24)


class TestAdaSpa:
    RECIPE = AdaSpa(block=(16, 16), density=0.25)

    def context(self, attention_call, sharpness, **options):
        """Heads whose attention is more or less concentrated."""
        factor = torch.tensor(sharpness)[None, :, None, None]
        query = torch.randn(1, len(sharpness), 512, 16) * factor
        # Keys are alike within a block, so that sharp heads need few blocks.
        key = torch.randn(1, len(sharpness), 32, 16).repeat_interleave(16, 2)
        query = query.unflatten(2, (-1, 16)).mean(3).repeat_interleave(16, 2) * 4
        heads = len(sharpness)
        return attention_call(GRID, heads=heads, query=query, key=key, **options)

    def test_each_row_keeps_the_blocks_with_the_most_softmax_mass(self, attention_call):
        ctx = attention_call(GRID, heads=4, key_heads=2)
        found = table(dataclasses.replace(self.RECIPE, recall=1.0), ctx)
        keys = ctx.key.repeat_interleave(2, 1)
        weights = (ctx.query @ keys.mT * ctx.scale).softmax(-1)
        mass = weights.unflatten(3, (-1, 16)).sum(-1).unflatten(2, (-1, 16)).sum(3)
        assert torch.equal(found, mass >= mass.sort(descending=True).values[..., 7:8])

    def test_good_heads_give_blocks_to_bad_ones_and_the_mean_stays(self, attention_call):
        ctx = self.context(attention_call, (0.1, 8.0, 0.2, 0.3, 8.0, 0.05))
        counts = self.RECIPE.plan(ctx).mask.counts[0]
        assert counts[:, 0].tolist() == [12, 4, 8, 8, 4, 12]
        assert bool((counts == counts[:, :1]).all())
        assert float(counts.float().mean()) == 8

    def test_no_head_gives_when_none_recalls_enough(self, attention_call):
        ctx = self.context(attention_call, (0.1, 0.2, 0.1))
        assert self.RECIPE.plan(ctx).mask.counts.unique().tolist() == [8]

    def test_at_most_half_of_the_heads_give(self, attention_call):
        ctx = self.context(attention_call, (8.0, 9.0, 10.0, 11.0, 12.0))
        counts = self.RECIPE.plan(ctx).mask.counts[0, :, 0]
        assert counts.sort().values.tolist() == [4, 4, 8, 12, 12]

    @pytest.mark.parametrize("density", [0.03, 0.25, 0.5, 0.8, 1.0])
    def test_budgets_keep_the_mean_and_never_leave_the_range(self, density):
        few, middle, many = AdaSpa(density=density).budgets(32)
        assert few + many == 2 * middle
        assert 1 <= few <= middle <= many <= 32

    def test_searched_at_the_given_steps_and_kept_in_between(self, attention_call):
        state, tables = {}, []
        for step in (10, 11, 29, 30, 49):
            torch.manual_seed(step)
            at = StepContext(step=step, num_steps=50)
            ctx = attention_call(GRID, step=at, state=state)
            tables.append(table(self.RECIPE, ctx))
        same = [torch.equal(a, b) for a, b in itertools.pairwise(tables)]
        assert same == [True, True, False, True]
