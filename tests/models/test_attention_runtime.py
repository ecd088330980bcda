"""The runtime of attention recipes: warm-up, state, padding, reuse, compensation, verification."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tubelet.core.context import AttentionContext, Site, StepContext
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import AttentionOptions, Handle
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import SparseAttention
from tubelet.kernels.attention import attention
from tubelet.models.attention_runtime import AttentionRuntime
from tubelet.recipes import (
    DeltaRows,
    MaskReuse,
    RandomBlocks,
    Rettention,
    TempScale,
    ZerothOrder,
)

SITES = [Site(name=f"blocks.{i}", layer=i, num_layers=3, kind="joint") for i in range(3)]
GRID = TokenGrid(frames=4, height=4, width=4)
HALF = RandomBlocks(density=0.5, block=(16, 16))


class Model:
    """Stands for a host in reports."""


def runtime(*recipes, **options) -> AttentionRuntime:
    handle = Handle(Model(), recipes, 3, AttentionOptions(**options))
    return AttentionRuntime(recipes, SITES, handle)


def inputs(tokens=64, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, 2, tokens, 16, generator=generator)


def call(made, qkv, layer=1):
    """(output, whether the host was asked)."""
    asked = []

    def host():
        asked.append(True)
        return attention(*qkv)[0]

    return made.attend(SITES[layer], *qkv, 0.25, host), bool(asked)


def at(step, num_steps=10, branch="cond") -> StepContext:
    return StepContext(step=step, num_steps=num_steps, branch=branch)


def test_a_sparse_call_follows_the_plan_and_is_reported():
    made, qkv = runtime(HALF), inputs()
    made.begin(GRID, at(3))
    out, asked = call(made, qkv)
    ctx = AttentionContext(
        site=SITES[1], grid=GRID, query=qkv[0], key=qkv[1], value=qkv[2], scale=0.25, step=at(3)
    )
    wanted = attention(*qkv, HALF.plan(ctx), scale=0.25)[0]
    assert torch.allclose(out, wanted, atol=1e-6)
    assert not asked
    assert not torch.allclose(out, attention(*qkv, scale=0.25)[0], atol=1e-2)
    (entry,) = made.handle.report().densities()
    assert (entry["layer"], entry["step"], entry["branch"]) == (1, 3, "cond")
    assert entry["heads"] == pytest.approx([0.5, 0.5])
    assert "mean block density of 1 calls: 50.0%" in str(made.handle.report())


def test_layers_without_a_recipe_stay_with_the_host():
    made = runtime(RandomBlocks(density=0.5, block=(16, 16), dense_layers=2))
    made.begin(GRID, at(0))
    assert call(made, inputs(), layer=1)[1]
    assert not call(made, inputs(), layer=2)[1]


def test_warm_up_is_a_share_of_the_steps_and_counted():
    made = runtime(RandomBlocks(density=0.5, block=(16, 16), dense_steps=0.3))
    asked = []
    for step in range(10):
        made.begin(GRID, at(step))
        asked.append(call(made, inputs())[1])
    assert asked == [True] * 3 + [False] * 7
    assert made.handle.report().fallbacks == {"RandomBlocks: dense while warming up": 3}


def test_warm_up_without_a_number_of_steps_is_refused_with_what_to_give():
    made = runtime(RandomBlocks(density=0.5, block=(16, 16), dense_steps=0.3))
    made.begin(GRID, at(0, num_steps=None))
    with pytest.raises(UnsupportedError, match=r"accelerate\(\.\.\., num_steps=\)"):
        call(made, inputs())


@pytest.mark.parametrize(
    "recipes", [(HALF,), (HALF, ZerothOrder()), (HALF, DeltaRows(stride=8)), (TempScale(),)]
)
def test_padding_behind_the_text_never_matters(recipes):
    grid = TokenGrid(frames=4, height=4, width=4, after=9)
    for lengths in ([70, 70], [68, 73]):
        clean, foul = inputs(73, 2), inputs(73, 2)
        for row, length in enumerate(lengths):
            clean[1:, row, :, length:], foul[1:, row, :, length:] = 0.0, 1e4
        outs = []
        for qkv in (clean, foul):
            made = runtime(*recipes)
            made.begin(grid, at(0), lengths)
            outs.append(call(made, qkv)[0])
        for row, length in enumerate(lengths):
            assert torch.allclose(outs[0][row, :, :length], outs[1][row, :, :length], atol=1e-5)


def test_samples_of_different_lengths_equal_themselves_alone():
    grid, qkv = TokenGrid(frames=4, height=4, width=4, after=9), inputs(73, 2)
    made = runtime(SVG_LIKE)
    made.begin(grid, at(0), [66, 71])
    both = call(made, qkv)[0]
    for row, length in enumerate((66, 71)):
        made.begin(grid, at(0), [length])
        alone = call(made, qkv[:, row : row + 1])[0]
        assert torch.allclose(both[row : row + 1], alone, atol=1e-5)


def test_wrong_geometry_is_refused():
    made = runtime(HALF)
    with pytest.raises(ShapeError, match="geometry is None"):
        call(made, inputs())
    made.begin(GRID, at(0))
    with pytest.raises(ShapeError, match="63 tokens, the geometry is 4x4x4"):
        call(made, inputs(63))
    with pytest.raises(ShapeError, match="only text may be padded"):
        made.begin(GRID, at(0), [40])


@dataclass(frozen=True, kw_only=True)
class Counting(SparseAttention):
    """Keeps one more query block's neighbours at every call of a run."""

    identity: ClassVar = {}

    def plan(self, ctx):
        ctx.state["calls"] = ctx.state.get("calls", 0) + 1
        share = min(ctx.state["calls"] / 4, 1.0)
        return RandomBlocks(density=share, block=(16, 16)).plan(ctx)


SVG_LIKE = RandomBlocks(density=0.75, block=(16, 16))


def densities(made) -> list[float]:
    return [entry["heads"][0] for entry in made.handle.report().densities()]


def test_state_is_kept_per_branch_and_site_and_ends_with_the_run():
    made = runtime(Counting())
    for branch in ("cond", "uncond"):
        for step in range(2):
            made.begin(GRID, at(step, branch=branch))
            call(made, inputs())
    made.begin(GRID, at(2))
    call(made, inputs(), layer=2)
    made.end_run()
    made.begin(GRID, at(0))
    call(made, inputs())
    assert densities(made) == [0.25, 0.5, 0.25, 0.5, 0.25, 0.25]


def test_another_geometry_begins_anew():
    made = runtime(Counting())
    for grid in (GRID, GRID, TokenGrid(frames=2, height=4, width=8)):
        made.begin(grid, at(0))
        call(made, inputs())
    assert densities(made) == [0.25, 0.5, 0.25]


def test_reuse_serves_the_plan_of_an_earlier_call():
    made = runtime(Counting(), MaskReuse(most=2, tolerance=None))
    for step in range(6):
        made.begin(GRID, at(step))
        call(made, inputs())
    assert densities(made) == [0.25] * 3 + [0.5] * 3
    assert made.handle.report().attention["MaskReuse(most=2, tolerance=None): plan reused"] == 4


def test_compensation_terms_reach_the_kernel():
    qkv, plain = inputs(), runtime(HALF)
    plain.begin(GRID, at(0))
    sparse = call(plain, qkv)[0]
    dense = attention(*qkv, scale=0.25)[0]
    made = runtime(HALF, ZerothOrder())
    made.begin(GRID, at(0))
    better = call(made, qkv)[0]
    assert (better - dense).norm() < (sparse - dense).norm()
    assert made.handle.report().attention["ZerothOrder: applied"] == 1


def test_Rettention_is_exact_on_the_step_it_looks_and_close_after_it():
    made, plain, qkv = runtime(HALF, Rettention(refresh=3)), runtime(HALF), inputs()
    dense, errors = attention(*qkv, scale=0.25)[0], []
    for step in range(4):
        made.begin(GRID, at(step))
        out, asked = call(made, qkv)
        assert not asked
        errors.append(float((out - dense).norm() / dense.norm()))
    plain.begin(GRID, at(1))
    bare = float((call(plain, qkv)[0] - dense).norm() / dense.norm())
    assert errors[0] < 1e-5
    assert errors[3] < 1e-5
    assert 1e-4 < errors[1] < bare
    assert made.handle.report().fallbacks["Rettention: dense to compare with"] == 2


def test_terms_without_a_policy_are_refused():
    with pytest.raises(UnsupportedError, match="give one beside it"):
        runtime(ZerothOrder())
    with pytest.raises(UnsupportedError, match="MaskReuse"):
        runtime(MaskReuse())


def test_verify_measures_error_and_recall_of_live_calls():
    qkv = inputs()
    made = runtime(RandomBlocks(density=1.0, block=(16, 16)), verify=2)
    made.begin(GRID, at(0))
    call(made, qkv)
    whole = made.handle.report().verified()
    made = runtime(HALF, verify=4)
    made.begin(GRID, at(5))
    out = call(made, qkv)[0]
    dense = attention(*qkv, scale=0.25)[0]
    (entry,) = made.handle.report().verified()
    # All four query blocks were checked, so this is the error of the call.
    assert entry["error"] == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-4)
    assert entry["cost"] == 1.0
    assert 0.3 < entry["recall"] < 0.7
    assert all(e["error"] < 1e-5 and e["recall"] > 0.999 for e in whole)
    assert "verified at 100.00% of dense" in str(made.handle.report())


def test_an_error_above_the_limit_makes_the_call_dense_and_counts():
    qkv, dense = inputs(), attention(*inputs(), scale=0.25)[0]
    for limit, same in ((1e-3, True), (10.0, False)):
        made = runtime(HALF, verify=1, max_error=limit)
        made.begin(GRID, at(0))
        assert torch.allclose(call(made, qkv)[0], dense, atol=1e-6) is same
        assert bool(made.handle.report().fallbacks) is same


def test_a_broken_output_counts_as_too_wrong():
    qkv = inputs()
    qkv[2, :, :, 3] = torch.nan
    made = runtime(HALF, verify=4, max_error=0.9)
    made.begin(GRID, at(0))
    call(made, qkv)
    assert made.handle.report().fallbacks["RandomBlocks: error above 0.9"] == 1


@pytest.mark.parametrize(
    "options", [{"verify": -1}, {"max_error": 0.1}, {"verify": 1, "max_error": 0.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UnsupportedError):
        AttentionOptions(**options)


def test_the_empty_plan_leaves_the_call_to_the_host():
    @dataclass(frozen=True, kw_only=True)
    class Nothing(SparseAttention):
        def plan(self, ctx):
            return AttentionPlan()

    made = runtime(Nothing())
    made.begin(GRID, at(0))
    assert call(made, inputs())[1]


def test_state_is_never_shared_over_other_lengths_or_batches():
    grid = TokenGrid(frames=4, height=4, width=4, after=9)
    made = runtime(Counting(), MaskReuse(most=9, tolerance=None))
    for lengths, batch in (([70], 1), ([66], 1), ([70, 70], 2), ([70], 1)):
        made.begin(grid, at(0), lengths)
        call(made, inputs(73, batch))
    assert made.handle.report().attention["MaskReuse(most=9, tolerance=None): plan reused"] == 1


def test_Rettention_gets_its_dense_look_under_a_limit_on_the_error():
    made, qkv = runtime(HALF, Rettention(refresh=3), verify=4, max_error=0.5), inputs()
    for step in range(3):
        made.begin(GRID, at(step))
        call(made, qkv)
    report = made.handle.report()
    assert report.fallbacks["Rettention: dense to compare with"] == 1
    assert report.attention["Rettention(refresh=3): applied"] == 2


def test_recall_is_unknown_where_the_rest_is_approximated():
    made = runtime(HALF, ZerothOrder(), verify=2)
    made.begin(GRID, at(0))
    call(made, inputs())
    (entry,) = made.handle.report().verified()
    assert entry["recall"] is None
    assert "recall" not in str(made.handle.report())
