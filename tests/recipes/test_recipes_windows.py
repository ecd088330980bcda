"""Static patterns: which tokens see which, place by place."""

import itertools

import pytest
import torch

from tubelet.core.context import StepContext
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.recipes import (
    EfficientVDiT,
    NeighborhoodAttention,
    RadialAttention,
    RandomBlocks,
    SlidingTile,
)
from tubelet.recipes.profiles import save_profile
from tubelet.recipes.windows import radial_widths


def places(grid):
    return list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))


def seen(ctx, recipe, head=0):
    """For each video token the set of video tokens it attends to."""
    plan, num = recipe.plan(ctx), ctx.grid.num_video
    order = torch.arange(ctx.grid.num_tokens)[None] if plan.order is None else plan.order
    order = order[0, :num] - ctx.grid.before
    table = torch.zeros(num, num, dtype=torch.bool)
    mask = plan.mask.token_mask()
    table[order[:, None], order] = mask[0, min(head, mask.shape[1] - 1), :num, :num]
    return table


class TestSlidingTile:
    GRID = TokenGrid(frames=6, height=6, width=8)
    TILE, COUNTS = (2, 2, 4), (3, 3, 2)

    def test_window_is_centred_and_clamped_and_every_tile_sees_equally_many(self, attention_call):
        recipe = SlidingTile(tile=self.TILE, window=(1, 3, 1), block=(16, 16))
        table = seen(attention_call(self.GRID), recipe)
        for i, place in enumerate(places(self.GRID)):
            for j, other in enumerate(places(self.GRID)):
                near = True
                for x, y, side, num, window in zip(
                    place, other, self.TILE, self.COUNTS, (1, 3, 1), strict=True
                ):
                    first = min(max(x // side - window // 2, 0), num - window)
                    near &= first <= y // side < first + window
                assert bool(table[i, j]) == near

    def test_window_moves_inwards_at_the_border(self, attention_call):
        recipe = SlidingTile(tile=(1, 4, 4), window=(3, 1, 1), block=(16, 16))
        table = seen(attention_call(TokenGrid(frames=5, height=4, width=4)), recipe)
        assert table.sum(1).tolist() == [48] * 80
        assert table[0].nonzero().max() == 47

    def test_ragged_tiles_see_no_less_than_their_window(self, attention_call):
        grid = TokenGrid(frames=5, height=7, width=9, before=3, after=5)
        wide = SlidingTile(tile=(2, 3, 4), window=(1, 1, 1), block=(16, 16))
        table = seen(attention_call(grid), wide)
        for i, place in enumerate(places(grid)):
            for j, other in enumerate(places(grid)):
                pairs = zip(place, other, wide.tile, strict=True)
                if all(x // side == y // side for x, y, side in pairs):
                    assert bool(table[i, j])
        assert float(table.float().mean()) < 0.4

    def test_search_finds_the_axis_along_which_a_head_attends(self, attention_call):
        grid = TokenGrid(frames=4, height=4, width=8)
        t, h, w = grid.coordinates().float().unbind(-1)
        # Head 0 attends within its frame, head 1 along time.
        marks = torch.stack([one_hot(t, 4), one_hot(h * 8 + w, 32)])[None]
        ctx = attention_call(grid, query=20 * marks, key=20 * marks)
        recipe = SlidingTile(tile=(1, 2, 8), block=(16, 16))
        windows = [(4, 1, 1), (1, 2, 1)]
        assert recipe.search(ctx, windows) == [(1, 2, 1), (4, 1, 1)]

    def test_profile_gives_each_head_its_window(self, attention_call, tmp_path):
        ctx = attention_call(self.GRID, layer=3)
        path = save_profile(tmp_path / "p.json", "SlidingTile", {3: [(1, 1, 1), (3, 1, 2)]})
        recipe = SlidingTile(tile=self.TILE, block=(16, 16), profile=str(path))
        for head, window in enumerate([(1, 1, 1), (3, 1, 2)]):
            alone = SlidingTile(tile=self.TILE, block=(16, 16), window=window)
            assert torch.equal(seen(ctx, recipe, head), seen(ctx, alone))

    def test_profiles_that_do_not_fit_are_refused(self, attention_call, tmp_path):
        path = tmp_path / "p.json"
        save_profile(path, "SlidingTile", {3: [(1, 1, 1), (0, 1, 2)]})
        recipe = SlidingTile(profile=str(path), block=(16, 16))
        for layer, heads, said in [(1, 2, "no layer 1; it has 3"), (3, 4, "2 heads in layer 3")]:
            with pytest.raises(RecipeError, match=said):
                recipe.plan(attention_call(self.GRID, layer=layer, heads=heads))
        with pytest.raises(RecipeError, match=r"p.json: SlidingTile.window must be >= 1"):
            recipe.plan(attention_call(self.GRID, layer=3))
        (tmp_path / "q.json").write_text("[]")
        for name, said in [("q.json", "is not a profile"), ("none.json", "cannot read profile")]:
            with pytest.raises(RecipeError, match=said):
                SlidingTile(profile=str(tmp_path / name)).choose(
                    recipe.arrange(attention_call(self.GRID))
                )


def one_hot(index, num):
    return torch.nn.functional.one_hot(index.long(), num).float() @ torch.eye(num, 32)


def test_NeighborhoodAttention_keeps_every_token_of_the_clamped_window(attention_call):
    grid, window, tile = TokenGrid(frames=5, height=6, width=9), (3, 4, 5), (1, 2, 4)
    recipe = NeighborhoodAttention(tile=tile, window=window, block=(8, 8))
    table = seen(attention_call(grid), recipe)
    sizes = (5, 6, 9)
    for i, place in enumerate(places(grid)):
        for j, other in enumerate(places(grid)):
            firsts = [
                min(max(x - w // 2, 0), n - w) for x, w, n in zip(place, window, sizes, strict=True)
            ]
            if all(f <= y < f + w for f, y, w in zip(firsts, other, window, strict=True)):
                assert bool(table[i, j])
    # Whole tiles: exact where blocks are tiles, and then less than everything.
    even = attention_call(TokenGrid(frames=6, height=8, width=16))
    far = seen(even, NeighborhoodAttention(tile=(2, 2, 4), window=(1, 1, 1), block=(16, 16)))
    assert far.sum(1).tolist() == [16] * 768


class TestRadialAttention:
    GRID = TokenGrid(frames=10, height=8, width=16)

    def test_width_halves_when_the_distance_doubles(self):
        widths = radial_widths(self.GRID, 1.0, 1)
        # 128 tokens per frame have 8 bits: 2^8 / 2^bits(r).
        assert widths == [128, 128, 64, 64, 32, 32, 32, 32, 16, 16]
        assert radial_widths(self.GRID, 0.5, 1)[2:5] == [32, 32, 16]

    def test_bands_below_a_block_are_kept_at_every_nth_distance(self):
        widths = radial_widths(self.GRID, 0.25, 16)
        # 16 at distances 2 and 3; 8, half a block, from 4 to 7; 4 beyond.
        assert widths == [128, 128, 16, 16, 16, -1, 16, -1, 16, -1]

    def test_frames_see_less_of_frames_further_away(self, attention_call):
        recipe = RadialAttention(decay=0.5, block=(16, 16), sink=False)
        table = seen(attention_call(self.GRID), recipe)
        share = table.reshape(10, 128, 10, 128).float().mean((1, 3))
        assert share[0, 1] == 1
        assert bool((share[0].diff() <= 0).all())
        assert share[0, 2] > 1.5 * share[0, 4] > 0

    def test_the_first_frame_is_a_sink_that_all_see(self, attention_call):
        with_sink, without = (
            seen(attention_call(self.GRID), RadialAttention(block=(16, 16), sink=sink))
            for sink in (True, False)
        )
        assert bool(with_sink[:, :128].all())
        assert not bool(without[:, :128].all())
        assert torch.equal(with_sink[:, 128:], without[:, 128:])

    def test_warm_up_is_the_authors(self):
        recipe = RadialAttention()
        warm = [recipe.warming_up(StepContext(step=s, num_steps=50)) for s in range(50)]
        assert sum(warm) == 12
        assert recipe.dense_layers == 1


@pytest.mark.parametrize(("references", "wanted"), [(1, [0]), (3, [0, 2, 5]), (4, [0, 2, 4, 6])])
def test_EfficientVDiT_frames_see_themselves_and_evenly_spread_references(
    attention_call, references, wanted
):
    recipe = EfficientVDiT(references=references, block=(16, 16))
    table = seen(attention_call(TokenGrid(frames=8, height=4, width=8)), recipe)
    for t, u in itertools.product(range(8), repeat=2):
        part = table[t * 32 : t * 32 + 32, u * 32 : u * 32 + 32]
        kept = t == u or t in wanted or u in wanted
        assert bool((part == kept).all())
    dropped = (8 - references) * (7 - references) / 64
    assert float(table.float().mean()) == pytest.approx(1 - dropped)


class TestRandomBlocks:
    GRID = TokenGrid(frames=4, height=8, width=8)

    def test_density_is_exact_and_the_draw_follows_seed_step_layer_and_head(self, attention_call):
        def table(layer=1, step=3, **fields):
            recipe = RandomBlocks(density=0.25, block=(16, 16), **fields)
            ctx = attention_call(self.GRID, layer=layer, step=StepContext(step=step))
            return recipe.plan(ctx).mask.to_dense()

        first = table()
        assert bool((first.sum(-1) == 4).all())
        assert torch.equal(first, table())
        for other in (table(seed=1), table(step=4), table(layer=2)):
            assert not torch.equal(first, other)
        assert not torch.equal(first[:, 0], first[:, 1])

    def test_every_block_is_drawn_about_equally_often(self, attention_call):
        recipe = RandomBlocks(density=0.25, block=(16, 16))
        mask = recipe.plan(attention_call(self.GRID, heads=400)).mask.to_dense()
        share = mask.float().mean((0, 1))
        assert float((share - 0.25).abs().max()) < 0.1
