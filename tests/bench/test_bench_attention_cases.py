"""`bench attention` piece by piece: inputs, lists, the check of results, cases that fail."""

from dataclasses import dataclass, replace

import pytest
import torch

from tubelet.bench.attention import cases
from tubelet.bench.attention import probe as probing
from tubelet.bench.attention.cases import (
    Attempts,
    add_dense,
    add_lists,
    add_policies,
    implementations,
    measure,
)
from tubelet.bench.attention.inputs import make_inputs, random_lists
from tubelet.bench.attention.probe import kept_keys, probe
from tubelet.bench.attention.shapes import SHAPES
from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import SparseAttention, param
from tubelet.kernels.attention import attention

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def inputs(kind="random", seed=0, shape=TINY, dtype=torch.float32):
    return make_inputs(shape, kind, seed=seed, device=CPU, dtype=dtype)


def lists(block=(64, 32), density=0.4, seed=0):
    return random_lists(TINY, block, density, seed=seed, device=CPU)


@dataclass(frozen=True, kw_only=True)
class _FirstBlocks(SparseAttention):
    """Computes the first blocks only, and counts in the state how often it was asked."""

    share: float = param(0.5, "share of the key blocks")

    def plan(self, ctx):
        ctx.state["asked"] = ctx.state.get("asked", 0) + 1
        ASKED.append((ctx.step.step, ctx.state["asked"]))
        tokens = ctx.query.shape[2]
        rows, columns = -(-tokens // 64), -(-tokens // 64)
        kept = (torch.arange(columns) < self.share * columns).expand(1, 1, rows, columns)
        mask = BlockMask.from_dense(kept, block=(64, 64), num_queries=tokens, num_keys=tokens)
        return AttentionPlan(mask=mask)


ASKED: list[tuple[int, int]] = []


@dataclass(frozen=True, kw_only=True)
class _Failing(SparseAttention):
    """Never has a plan."""

    def plan(self, ctx):
        raise torch.OutOfMemoryError("no memory for\n this plan")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models(name):
    shape = SHAPES[name]
    known = {"wan-480p": 32_760, "wan-720p": 75_600, "hunyuan-720p": 118_800 + 256}
    for start, tokens in known.items():
        if name.startswith(start):
            assert shape.tokens == tokens
    if name.endswith("-d64"):
        whole = SHAPES[name.removesuffix("-d64")]
        assert (shape.width, shape.flops) == (64, whole.flops)
    pairs = shape.tokens * (shape.tokens + 1) // 2 if shape.causal else shape.tokens**2
    assert shape.flops == 4 * pairs * shape.heads * shape.width


def test_structured_inputs_attend_to_near_places_and_random_ones_do_not():
    shape = replace(SHAPES["cpu-16k"], heads=3, width=64)
    grid, near = shape.grid, {}
    for kind in ("structured", "random"):
        q, k, _ = inputs(kind, shape=shape)
        rows = torch.arange(0, shape.tokens, 97)
        weights = (q[0, :, rows] @ k[0].transpose(-1, -2) / 8).softmax(-1)
        places = grid.coordinates()
        close = (places[rows][:, None] - places).abs().amax(-1) <= 4
        near[kind] = float((weights * close).sum(-1).mean() / close.float().mean())
    assert near["random"] == pytest.approx(1.0, abs=0.1)
    assert near["structured"] > 4


def test_inputs_follow_the_seed_and_have_the_memory_order_of_hosts():
    q, k, v = inputs("structured")
    assert q.shape == k.shape == v.shape == (1, TINY.heads, TINY.tokens, TINY.width)
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v))
    assert q.square().mean() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(inputs("structured")[1], k)
    assert not torch.equal(inputs("structured", seed=1)[1], k)


def test_random_lists_have_the_density_and_differ_from_row_to_row():
    mask = lists(density=0.25)
    columns = mask.grid[1]
    assert (mask.counts == round(0.25 * columns)).all()
    assert (mask.indices.diff(dim=-1) > 0).all()
    assert len({tuple(row) for row in mask.indices[0, 0].tolist()}) > 1
    assert not torch.equal(mask.indices[:, 0], mask.indices[:, 1])
    assert torch.equal(lists(density=0.25).indices, mask.indices)
    assert lists(density=1e-6).counts.max() == 1


@pytest.mark.parametrize("shared", [True, False])
def test_kept_keys_agree_with_the_whole_mask_in_any_order(shared):
    mask = lists()
    heads = 1 if shared else TINY.heads
    order = torch.stack([torch.randperm(TINY.tokens) for _ in range(heads)])
    rows = torch.tensor([0, 5, 300, TINY.tokens - 1])
    for head in range(TINY.heads):
        own = order[0 if shared else head]
        table = torch.zeros(TINY.tokens, TINY.tokens, dtype=torch.bool)
        table[own[:, None], own[None, :]] = mask.token_mask()[0, head]
        found = kept_keys(AttentionPlan(mask=mask, order=order), head, rows, TINY.tokens)
        assert torch.equal(found, table[rows])


def test_keys_behind_the_end_of_a_mask_are_not_kept():
    tokens, keys = 100, 70
    mask = BlockMask.from_dense(
        torch.ones(1, 1, 4, 3, dtype=torch.bool), block=(32, 32), num_queries=tokens, num_keys=keys
    )
    kept = kept_keys(AttentionPlan(mask=mask), 0, torch.tensor([0, 99]), tokens)
    assert kept[:, :keys].all()
    assert not kept[:, keys:].any()


def plans():
    order = torch.randperm(TINY.tokens)[None]
    return {
        "dense": AttentionPlan(),
        "lists": AttentionPlan(mask=lists()),
        "reordered": AttentionPlan(mask=lists(), order=order),
        "sharper": AttentionPlan(mask=lists(), temperature=0.5),
        "biased": AttentionPlan(bias=torch.randn(1, TINY.tokens)),
    }


@pytest.mark.parametrize("name", plans())
def test_probe_accepts_right_results_and_sees_one_wrong_row(name):
    plan, given = plans()[name], inputs()
    out, lse = attention(*given, plan, impl="reference")
    right = probe(given, plan, out, lse)
    assert right.kernel_error < 1e-5
    assert right.lse_error < 1e-4
    wrong = out.clone()
    wrong[0, -1, -1] += 0.1
    assert probe(given, plan, wrong, lse).kernel_error == pytest.approx(0.1, abs=1e-4)
    assert probe(given, plan, out, lse + 0.1).lse_error == pytest.approx(0.1, abs=1e-3)


def test_recall_and_error_are_those_of_all_rows(monkeypatch):
    monkeypatch.setattr(probing, "ROWS", TINY.tokens)
    q, k, v = given = inputs("structured")
    plan = AttentionPlan(mask=lists())
    out, lse = attention(*given, plan, impl="reference")
    weights = (q @ k.transpose(-1, -2) * TINY.width**-0.5).softmax(-1)
    dense = weights @ v
    found = probe(given, plan, out, lse)
    assert found.recall == pytest.approx(
        float((weights * plan.mask.token_mask()).sum(-1).mean()), abs=1e-5
    )
    assert found.error == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-4)
    everything = probe(given, AttentionPlan(), *attention(*given, impl="reference"))
    assert everything.recall == pytest.approx(1.0, abs=1e-5)
    assert everything.error < 1e-5


def test_a_plan_with_terms_of_its_own_has_no_kernel_error():
    given, plan = inputs(), AttentionPlan(mask=lists(), approximate=True)
    found = probe(given, plan, *attention(*given, AttentionPlan(mask=plan.mask)))
    assert found.kernel_error is None
    assert found.error > 0


def test_empty_rows_are_right_when_they_are_zero():
    given, mask = inputs(), lists()
    mask = replace(mask, counts=mask.counts * (torch.arange(mask.grid[0]) > 0).int())
    plan = AttentionPlan(mask=mask)
    found = probe(given, plan, *attention(*given, plan, impl="reference"))
    assert found.kernel_error < 1e-5
    assert found.lse_error < 1e-4


def test_dense_and_lists_are_measured_and_refusals_are_listed():
    attempts, given = Attempts(TINY), inputs(dtype=torch.bfloat16)
    add_dense(attempts, given, ["sdpa", "fa4"])
    add_lists(attempts, given, ["sdpa", "cpu"], [(64, 64)], [0.5, 0.2], seed=0)
    rows = measure(attempts, CPU, 1, lambda: None)
    assert [(row.kind, row.name) for row in rows] == [
        ("dense", "sdpa"), ("lists", "cpu"), ("lists", "cpu"),
    ]  # fmt: skip
    dense, half, fifth = rows
    assert half.density > 0.4 > fifth.density
    assert half.over["sdpa"] == pytest.approx(dense.seconds / half.seconds)
    assert half.tflops == pytest.approx(half.density * TINY.flops / half.seconds / 1e12)
    assert max(row.kernel_error for row in rows) < 0.02
    assert {entry.name for entry in attempts.skipped} == {
        "fa4 dense", "sdpa 64x64 at 0.5", "sdpa 64x64 at 0.2",
    }  # fmt: skip
    assert all(entry.reason for entry in attempts.skipped)


def test_one_failing_case_is_recorded_and_the_others_go_on():
    attempts, given = Attempts(TINY), inputs()
    add_policies(attempts, given, "random", [_Failing(), _FirstBlocks()])
    assert [case.row.name for case in attempts.cases] == ["_FirstBlocks"]
    assert attempts.skipped[0].reason == "OutOfMemoryError: no memory for this plan"


def test_a_result_that_is_not_finite_is_no_measurement(monkeypatch):
    monkeypatch.setattr(cases, "attention", lambda q, *rest, **named: (q * torch.nan, q[..., 0]))
    attempts = Attempts(TINY)
    add_dense(attempts, inputs(), ["sdpa"])
    assert not attempts.cases
    assert "not finite" in attempts.skipped[0].reason


def test_a_policy_is_timed_whole_and_in_parts_with_the_state_of_a_run():
    ASKED.clear()
    attempts, given = Attempts(TINY), inputs("structured", dtype=torch.bfloat16)
    add_dense(attempts, given, ["sdpa"])
    add_policies(attempts, given, "structured", [_FirstBlocks(share=0.5, dense_steps=0.2)])
    row = measure(attempts, CPU, 3, lambda: None)[1]
    assert (row.kind, row.field, row.block) == ("policy", "structured", (64, 64))
    assert 0.4 < row.density < 0.6
    assert 0 < row.recall < 1
    assert row.error > 0.01
    assert row.kernel_error < 0.02
    assert row.seconds > row.selection > 0
    assert row.attention > row.selection
    assert row.first > 0
    # The first sparse step is step 10 of 50, always without state; later ones keep it.
    assert {state for step, state in ASKED if step == 10} == {1}
    assert max(state for step, state in ASKED if step == 49) >= 7
    assert {step for step, _ in ASKED} == {10, 49}


def test_the_slow_reference_is_measured_on_request_only():
    assert "reference" not in implementations(())
    assert "sdpa" in implementations(())
    assert implementations(("reference", "reference")) == ["reference"]


def test_flex_is_refused_where_it_would_fill_the_memory():
    shape = replace(SHAPES["cpu-16k"], width=8)
    attempts = Attempts(shape)
    add_dense(attempts, inputs(shape=shape), ["flex"])
    assert "materialises" in attempts.skipped[0].reason
