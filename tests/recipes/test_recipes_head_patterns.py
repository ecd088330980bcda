"""Head patterns: heads whose attention is known are recognised."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.ops.block_mask import Blocks
from tubelet.recipes import SVG, SparseVDiT
from tubelet.recipes.head_patterns import PATTERNS, band_width, bands

GRID = TokenGrid(frames=8, height=4, width=16)
RASTER = torch.arange(512)


def marks(group):
    """Queries and keys under which tokens attend to all of their group, and to no other."""
    return 12 * F.one_hot(group, 64).float()


# Groups of 32 neighbours in a frame; of 16 places in all frames.
SPATIAL, TEMPORAL = marks(RASTER // 32), marks(RASTER % 64 // 16)


def heads(*kinds):
    return torch.stack(kinds)[None]


@pytest.fixture
def context(attention_call):
    def build(x, key=None, grid=GRID):
        ctx = attention_call(
            grid, heads=x.shape[1], width=64, query=x, key=x if key is None else key
        )
        values = torch.randn(*x.shape[:3], 64)
        return dataclasses.replace(ctx, value=values)

    return build


def mean_error(ctx, mask):
    dense = (ctx.query @ ctx.key.mT * ctx.scale).softmax(-1) @ ctx.value
    logits = (ctx.query @ ctx.key.mT * ctx.scale).masked_fill(~mask.token_mask(), -torch.inf)
    out = logits.softmax(-1) @ ctx.value
    return ((out - dense).square().sum((2, 3)) / dense.square().sum((2, 3)))[0]


class TestSVG:
    RECIPE = SVG(block=(16, 16), sink=False)

    def test_spatial_and_temporal_heads_are_told_apart_in_every_sample(self, context):
        x = torch.cat([heads(SPATIAL, TEMPORAL), heads(TEMPORAL, SPATIAL)])
        ctx = context(x)
        table = self.RECIPE.plan(ctx).mask.to_dense()
        blocks = Blocks(size=(16, 16), num_video=512, num_tokens=512, num_keys=512)
        spatial, temporal = bands(GRID, blocks, 0.25, False, torch.device("cpu"))
        assert torch.equal(table[0, 0], spatial)
        assert torch.equal(table[0, 1], temporal)
        assert torch.equal(table[1], table[0].flip(0))
        assert float(mean_error(ctx, self.RECIPE.plan(ctx).mask).max()) < 1e-3

    def test_bands_cover_about_the_density(self):
        grid = TokenGrid(frames=12, height=24, width=32)
        blocks = Blocks(size=(16, 16), num_video=9216, num_tokens=9216, num_keys=9216)
        for density in (0.1, 0.25, 0.5):
            for table in bands(grid, blocks, density, False, torch.device("cpu")):
                assert float(table.float().mean()) == pytest.approx(density, rel=0.15)

    def test_width_counts_text_as_kept(self):
        plain = Blocks(size=(16, 16), num_video=900, num_tokens=900, num_keys=900)
        text = dataclasses.replace(plain, num_tokens=1000, num_keys=1000)
        assert band_width(plain, 0.36) == pytest.approx(900 * 0.2)
        assert band_width(text, 0.56) == pytest.approx(1000 * 0.2)
        assert band_width(text, 0.1) == 0

    def test_temporal_band_sees_its_places_in_every_frame(self):
        blocks = Blocks(size=(16, 16), num_video=512, num_tokens=512, num_keys=512)
        _, temporal = bands(GRID, blocks, 0.1, False, torch.device("cpu"))
        tokens = temporal.repeat_interleave(16, 0).repeat_interleave(16, 1)
        for token in (0, 63, 200, 511):
            assert bool(tokens[token, token % 64 :: 64].all())

    def test_the_first_frame_is_a_sink(self, context):
        ctx = context(heads(SPATIAL, TEMPORAL))
        table = SVG(block=(16, 16)).plan(ctx).mask.to_dense()
        assert bool(table[..., :4].all())
        assert not bool(self.RECIPE.plan(ctx).mask.to_dense()[..., :4].all())


def stripes():
    """Queries and keys of a head in which all queries attend to one stretch of 32 keys."""
    query, key = torch.zeros(2, 512, 64)
    query[:, 0], key[160:192, 0] = 8, 16
    return query, key


class TestSparseVDiT:
    RECIPE = SparseVDiT(block=(16, 16))

    def found(self, ctx, **fields):
        return dataclasses.replace(self.RECIPE, **fields).search(ctx)

    def all_kinds(self, context):
        q, k = stripes()
        flat = torch.zeros(512, 64)
        return context(heads(SPATIAL, TEMPORAL, q, flat), heads(SPATIAL, TEMPORAL, k, flat))

    def test_bands_and_stripes_are_recognised(self, context):
        found = self.found(self.all_kinds(context))
        assert found[:3] == ["diagonal", "multi-diagonal", "stripes"]

    def test_the_chosen_pattern_loses_little(self, context):
        ctx = self.all_kinds(context)
        error = mean_error(ctx, self.RECIPE.plan(ctx).mask)
        assert float(error[:3].max()) < 1e-3

    def test_zero_tolerance_keeps_every_head_full(self, context):
        ctx = context(torch.randn(1, 4, 512, 64))
        assert self.found(ctx, tolerance=0.0) == ["full"] * 4

    def test_tolerance_bounds_the_loss(self, context):
        # The patterns of a quarter of the map lose 0.5 * 0.25 when they are exact.
        ctx = context(heads(SPATIAL))
        assert self.found(ctx, tolerance=0.2) == ["diagonal"]
        assert self.found(ctx, tolerance=0.05) == ["full"]

    def test_a_great_weight_of_cost_skips_every_head(self, context):
        ctx = self.all_kinds(context)
        assert self.found(ctx, weight=1e6, tolerance=1e9) == ["skip"] * 4

    def test_without_weight_the_least_error_wins(self, context):
        ctx = context(3 * torch.randn(1, 3, 512, 64))
        found = self.found(ctx, weight=0.0, tolerance=1e9, rows=512)
        call = self.RECIPE.arrange(ctx)
        tables = self.RECIPE._tables(call)
        errors = torch.stack(
            [mean_error(ctx, call.blocks.mask(table.expand(1, 3, -1, -1))) for table in tables[1:]]
        )
        assert found == [PATTERNS[1 + int(best)] for best in errors.argmin(0)]

    def test_searched_once_per_run(self, context):
        state = {}
        first = dataclasses.replace(context(heads(SPATIAL, TEMPORAL)), state=state)
        swapped = dataclasses.replace(context(heads(TEMPORAL, SPATIAL)), state=state)
        fresh = dataclasses.replace(swapped, state={})
        tables = [self.RECIPE.plan(ctx).mask.to_dense() for ctx in (first, swapped, fresh)]
        assert torch.equal(tables[0], tables[1])
        assert torch.equal(tables[0].flip(1), tables[2])

    def test_profile_replaces_the_search(self, context, tmp_path):
        ctx = context(heads(SPATIAL, TEMPORAL))
        path = self.RECIPE.save(tmp_path / "p.json", {0: self.RECIPE.search(ctx)})
        swapped = context(heads(TEMPORAL, SPATIAL))
        told = dataclasses.replace(self.RECIPE, profile=str(path))
        assert torch.equal(
            told.plan(swapped).mask.to_dense(), self.RECIPE.plan(ctx).mask.to_dense()
        )
        assert swapped.state == {}
        self.RECIPE.save(tmp_path / "bad.json", {0: ["full", "banana"]})
        with pytest.raises(RecipeError, match="must name full, skip"):
            dataclasses.replace(self.RECIPE, profile=str(tmp_path / "bad.json")).plan(ctx)
