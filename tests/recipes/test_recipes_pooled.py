"""Pooled policies: what the means decide, and what they must not decide."""

import dataclasses

import pytest
import torch

from tubelet.core.grid import TokenGrid
from tubelet.ops.order import token_order
from tubelet.recipes import NABLA, DraftAttention, SlidingTile, SolAttn, SpargeAttention, VMoBA

GRID = TokenGrid(frames=4, height=4, width=16)
BLOCK = (16, 16)


def in_blocks(means, grid=GRID, layout="thw", spread=0.0):
    """[B, H, N, D] tokens whose blocks of 16, in the order of a layout, have the given means."""
    x = means.repeat_interleave(16, dim=2)
    noise = spread * torch.randn_like(x).unflatten(2, (-1, 16))
    x = x + (noise - noise.mean(3, keepdim=True)).flatten(2, 3)
    order = token_order(grid, layout)
    return x if order is None else torch.zeros_like(x).index_copy(2, order[0], x)


def table(recipe, ctx):
    return recipe.plan(ctx).mask.to_dense()


class TestDraftAttention:
    RECIPE = DraftAttention(tile=(1, 4, 4), block=BLOCK, density=0.25)

    def context(self, attention_call, q, k):
        q, k = (in_blocks(x, layout=(1, 4, 4), spread=1.0) for x in (q, k))
        return attention_call(GRID, heads=q.shape[1], width=q.shape[3], query=q, key=k)

    def draft(self, q, k):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def test_the_threshold_is_one_quantile_of_all_blocks_of_a_head(self, attention_call):
        q, k = torch.randn(2, 2, 3, 16, 8)
        found = table(self.RECIPE, self.context(attention_call, q, k))
        draft = self.draft(q, k)
        threshold = draft.flatten(2).sort(descending=True).values[..., 63, None, None]
        best = draft == draft.amax(-1, keepdim=True)
        assert torch.equal(found, (draft >= threshold) | best | torch.eye(16, dtype=torch.bool))

    def test_flat_rows_share_and_peaked_rows_keep_their_peak(self, attention_call):
        # 8 rows see one block only; what they do not need goes to none of the flat rows' tails.
        q, k = torch.zeros(1, 1, 16, 8), torch.randn(1, 1, 16, 8)
        q[:, :, :8] = 40 * k[:, :, 8:]
        counts = table(self.RECIPE, self.context(attention_call, q, k)).sum(-1)[0, 0]
        assert int(counts[:8].max()) <= 2
        assert int(counts[8:].min()) >= 7

    def test_heads_do_not_share_a_threshold(self, attention_call):
        q, k = torch.randn(2, 1, 2, 16, 8)
        alone = table(self.RECIPE, self.context(attention_call, q, k))
        q[:, 1] *= 20
        both = table(self.RECIPE, self.context(attention_call, q, k))
        assert torch.equal(alone[:, 0], both[:, 0])

    def test_every_row_keeps_its_own_and_its_best_block(self, attention_call):
        q, k = torch.randn(2, 1, 1, 16, 8)
        q[:, :, 8:] *= 0.01
        least = dataclasses.replace(self.RECIPE, density=1e-6)
        found = table(least, self.context(attention_call, q, k))[0, 0]
        best = self.draft(q, k)[0, 0].argmax(-1)
        assert bool(found.diagonal().all())
        assert bool(found[torch.arange(16), best].all())
        assert int(found.sum()) <= 33


class TestSpargeAttention:
    RECIPE = SpargeAttention(block=BLOCK, mass=0.6, similarity=0.5)

    def context(self, attention_call, mixed_rows=(), mixed_columns=()):
        q, k = torch.randn(2, 1, 1, 16, 8)
        q, k = (in_blocks(4 * x / x.norm(dim=-1, keepdim=True)) for x in (q, k))
        for x, mixed in ((q, mixed_rows), (k, mixed_columns)):
            for n in mixed:
                x[:, :, n * 16 : n * 16 + 16] += 60 * torch.randn(16, 8)
        return attention_call(GRID, heads=1, width=8, query=q, key=k)

    def test_blocks_whose_tokens_disagree_are_always_computed(self, attention_call):
        found = table(self.RECIPE, self.context(attention_call, (3,), (5, 9)))[0, 0]
        assert bool(found[3].all())
        assert bool(found[:, [5, 9]].all())
        plain = table(self.RECIPE, self.context(attention_call))[0, 0]
        assert not bool(plain.all(0).any())
        assert not bool(plain.all(1).any())

    def test_they_take_no_mass_from_the_blocks_that_can_be_judged(self, attention_call):
        ctx = self.context(attention_call, (), (5,))
        found = table(self.RECIPE, ctx)[0, 0]
        means = [x.unflatten(2, (-1, 16)).mean(3)[0, 0] for x in (ctx.query, ctx.key)]
        others = [n for n in range(16) if n != 5]
        weights = (means[0] @ means[1][others].T * ctx.scale).softmax(-1)
        for row, weight in enumerate(weights):
            kept = weight[found[row, others]]
            assert float(kept.sum()) >= 0.6
            assert float(kept.sum() - kept.min()) < 0.6

    def test_similarity_decides_what_can_be_judged(self, attention_call):
        ctx = self.context(attention_call)
        ctx.query.add_(0.5 * torch.randn_like(ctx.query))
        ctx.key.add_(0.5 * torch.randn_like(ctx.key))
        shares = [
            float(table(dataclasses.replace(self.RECIPE, similarity=s), ctx).float().mean())
            for s in (0.5, 0.9, 0.99)
        ]
        assert shares[0] < shares[1] < shares[2] == 1

    def test_mass_follows_the_cumulative_softmax(self, attention_call):
        ctx = self.context(attention_call)
        shares = [
            float(table(dataclasses.replace(self.RECIPE, mass=mass), ctx).float().mean())
            for mass in (0.2, 0.6, 0.9, 1.0)
        ]
        assert shares == sorted(shares)
        assert shares[0] < shares[1] < shares[3] == 1


def test_NABLA_is_the_pooled_mass_or_the_sliding_window(attention_call):
    q, k = torch.randn(2, 1, 2, 16, 8)
    q, k = (in_blocks(x, layout=(1, 4, 4), spread=1.0) for x in (4 * q, k))
    ctx = attention_call(GRID, width=8, query=q, key=k)
    fields = {"block": BLOCK, "tile": (1, 4, 4), "window": (3, 1, 1)}
    static = table(SlidingTile(**fields), ctx)
    found = table(NABLA(**fields, mass=0.5), ctx)
    assert bool(found[static.expand_as(found)].all())
    order = token_order(GRID, (1, 4, 4))
    means = [x[:, :, order[0]].unflatten(2, (-1, 16)).mean(3) for x in (q, k)]
    weights = (means[0] @ means[1].mT * ctx.scale).softmax(-1)
    falling, places = weights.sort(descending=True)
    wanted = static | torch.zeros_like(found).scatter(
        -1, places, falling.cumsum(-1) - falling < 0.5
    )
    assert torch.equal(found, wanted)
    assert not torch.equal(found, static.expand_as(found))


class TestSolAttn:
    def context(self, attention_call, num=16):
        grid = TokenGrid(frames=num, height=1, width=16)
        q, k = torch.randn(2, 1, 2, num, 64)
        q, k = (in_blocks(x, grid, spread=1.0) for x in (q, k))
        return attention_call(grid, width=64, query=q, key=k), q, k

    def test_the_threshold_is_mean_plus_deviations_of_the_proxy_scores(self, attention_call):
        ctx, q, k = self.context(attention_call)
        means = [x.unflatten(2, (-1, 16)).mean(3) for x in (q, k)]
        found = table(SolAttn(block=BLOCK, deviations=0.7), ctx)
        for head in range(2):
            for row in range(16):
                query, keys = means[0][0, head, row], means[1][0, head]
                scores = keys @ query * ctx.scale
                variance = (query**2 * keys.var(0, correction=0)).sum() * ctx.scale**2
                wanted = scores > scores.mean() + 0.7 * (variance + 1e-6).sqrt()
                wanted[max(0, row - 1) : row + 2] = True
                assert torch.equal(found[0, head, row], wanted)

    def test_share_of_exact_blocks_is_that_of_a_normal_tail(self, attention_call):
        ctx = self.context(attention_call, num=100)[0]
        for deviations, share in ((1.0, 0.16), (2.0, 0.023)):
            mask = table(SolAttn(block=BLOCK, deviations=deviations), ctx).float().mean()
            # Neighbours add just under 3 %.
            assert float(mask) == pytest.approx(share + 0.028, abs=0.02)

    def test_what_is_left_out_counts_by_its_means(self, attention_call):
        ctx = self.context(attention_call)[0]
        assert SolAttn(block=BLOCK).plan(ctx).approximate
        assert not SolAttn(block=BLOCK, approximate=False).plan(ctx).approximate


class TestVMoBA:
    GRID = TokenGrid(frames=4, height=8, width=8)
    RECIPE = VMoBA(block=BLOCK, slab=1, window=(4, 4), box=(2, 4, 8), mass=0.25)

    def tokens(self, recipe, ctx):
        """[H, N, N] pairs attended to, in sequence order."""
        plan, num = recipe.plan(ctx), ctx.grid.num_tokens
        order = torch.arange(num)[None] if plan.order is None else plan.order
        mask = plan.mask.token_mask()[0]
        full = torch.zeros_like(mask)
        full[:, order[0][:, None], order[0]] = mask
        return full

    def tiles(self, layer):
        """Tile of each token, by hand."""
        t, h, w = self.GRID.coordinates().unbind(-1)
        return [t, h // 4 * 2 + w // 4, t // 2 * 2 + h // 4][layer % 3]

    @pytest.mark.parametrize("layer", range(7))
    def test_tiles_recur_every_three_layers_and_are_kept_whole(self, attention_call, layer):
        ctx = attention_call(self.GRID, layer=layer)
        kept, tile = self.tokens(self.RECIPE, ctx)[0], self.tiles(layer)
        assert bool(kept[tile[:, None] == tile].all()), "the own tile is always kept"
        for row in kept:
            for number in tile.unique():
                assert row[tile == number].unique().numel() == 1, "a tile is kept in part"
        assert not bool(kept.all())

    def test_pairs_are_chosen_over_the_whole_head(self, attention_call):
        # Queries of frame 0 are similar to every frame, those of the others to none.
        query, key = torch.zeros(2, 1, 1, 256, 16)
        key[..., 0] = 1
        query[..., :64, 0], query[..., 64:, 0] = 5, -5
        kept = self.tokens(self.RECIPE, attention_call(self.GRID, heads=1, query=query, key=key))
        assert bool(kept[0, :64].all())
        assert kept[0, 64:].sum(1).tolist() == [64] * 192

    def test_mass_bounds_how_many_pairs_are_kept(self, attention_call):
        ctx = attention_call(self.GRID)
        shares = [
            float(self.tokens(dataclasses.replace(self.RECIPE, mass=m), ctx).float().mean())
            for m in (0.1, 0.25, 0.6)
        ]
        assert shares[0] < shares[1] < shares[2]
