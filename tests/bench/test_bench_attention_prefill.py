"""`bench attention` on prompts: causal calls with grouped heads, dense and by prefill recipes."""

import json
from dataclasses import replace

import pytest
import torch

from tubelet.bench.attention import probe as probing
from tubelet.bench.attention.cases import (
    Attempts,
    add_dense,
    add_lists,
    add_policies,
    measure,
    of_prompts,
)
from tubelet.bench.attention.density import causal_density
from tubelet.bench.attention.inputs import SINKS, make_inputs, random_lists
from tubelet.bench.attention.probe import probe
from tubelet.bench.attention.run import policies
from tubelet.bench.attention.shapes import SHAPES, chosen_shapes
from tubelet.core.errors import TubeletError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention
from tubelet.recipes import AShape, GridAttention, RandomBlocks, VerticalSlash

CPU = torch.device("cpu")
TINY = SHAPES["tiny-prompt"]
GRID = GridAttention(block=(16, 16), window=32, sink=16)


def inputs(kind="structured", shape=TINY, dtype=torch.float32):
    return make_inputs(shape, kind, seed=0, device=CPU, dtype=dtype)


def token_pairs(plan: AttentionPlan, shape=TINY) -> torch.Tensor:
    """[H, N, N] pairs that are computed, one by one."""
    table = torch.ones(shape.heads, shape.tokens, shape.tokens, dtype=torch.bool)
    if plan.mask is not None:
        found = plan.mask.token_mask()[0].expand(shape.heads, -1, -1)
        for head in range(shape.heads):
            order = torch.arange(shape.tokens)
            if plan.order is not None:
                order = plan.order[head * len(plan.order) // shape.heads]
            table[head, order[:, None], order] = found[head]
    return table.tril()


@pytest.mark.parametrize(("name", "tokens"), [("qwen3-vl-32k", 2**15), ("qwen3-vl-128k", 2**17)])
def test_prompts_are_those_of_the_model(name, tokens):
    shape = SHAPES[name]
    assert (shape.tokens, shape.heads, shape.key_heads, shape.width) == (tokens, 32, 8, 128)
    assert shape.groups == 4
    assert shape.flops == 4 * (tokens * (tokens + 1) // 2) * 32 * 128
    video, place = shape.layout()
    text = video < 0
    # 14 words, then 7 words, a frame of 16 x 16 tokens and a word again and again.
    assert text[: 14 + 7].all()
    assert not text[21 : 21 + 256].any()
    assert place[21 : 21 + 256].tolist() == list(range(256))
    assert text[277 : 277 + 8].all()
    assert place[285] == 256
    assert text[-shape.grid.after - 1 :].all()
    assert not text[-shape.grid.after - 2]
    assert int((~text).sum()) == shape.grid.num_video
    assert torch.equal(place[~text], torch.arange(shape.grid.num_video))


def test_heads_of_a_prompt_stay_grouped():
    (shape,) = chosen_shapes(["qwen3-vl-32k"], "cpu", 8)
    assert (shape.heads, shape.key_heads, shape.groups) == (8, 2, 4)
    with pytest.raises(TubeletError, match="4 query heads per key head"):
        chosen_shapes(["qwen3-vl-32k"], "cpu", 6)


def test_inputs_of_prompts_have_sinks_and_a_line_per_key_head():
    q, k, v = inputs()
    assert q.shape == (1, TINY.heads, TINY.tokens, TINY.width)
    assert k.shape == v.shape == (1, TINY.key_heads, TINY.tokens, TINY.width)
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v))
    assert q.square().mean() == pytest.approx(1.0, abs=0.01)
    video, place = TINY.layout()
    for group, spacing in enumerate((TINY.grid.per_frame, TINY.grid.width)):
        heads = slice(2 * group, 2 * group + 2)
        weights = (q[0, heads] @ k[0, group].mT * TINY.width**-0.5).softmax(-1).mean((0, 1))
        assert weights[:SINKS].mean() > 3 * weights.mean()
        by_phase = torch.stack(
            [weights[(video == 0) & (place % spacing == phase)].mean() for phase in range(spacing)]
        )
        first, second = by_phase.topk(2).values
        assert first > 2 * second
    assert make_inputs(TINY, "random", seed=0, device=CPU, dtype=torch.float32)[1].shape == k.shape


def plans():
    mask = random_lists(TINY, (64, 32), 0.4, seed=0, device=CPU)
    order = torch.stack([torch.randperm(TINY.tokens) for _ in range(2)])
    shared = replace(mask, counts=mask.counts[:, :1], indices=mask.indices[:, :1])
    return {
        "dense": AttentionPlan(),
        "lists": AttentionPlan(mask=mask),
        "shared lists": AttentionPlan(mask=shared),
        "an order per key head": AttentionPlan(mask=mask, order=order),
        "one order": AttentionPlan(mask=mask, order=order[:1]),
        "shared lists in orders": AttentionPlan(mask=shared, order=order),
    }


@pytest.mark.parametrize("name", plans())
def test_density_counts_the_pairs_up_to_the_diagonal(name):
    plan = plans()[name]
    exact = int(token_pairs(plan).sum()) / (TINY.heads * TINY.tokens * (TINY.tokens + 1) // 2)
    if plan.mask is not None:
        assert causal_density(plan.mask, plan.order) == pytest.approx(exact, rel=1e-9)
        assert causal_density(plan.mask, plan.order) < 1
    every = random_lists(TINY, (64, 32), 1.0, seed=0, device=CPU)
    assert causal_density(every, plan.order) == 1.0


@pytest.mark.parametrize("name", plans())
def test_the_probe_knows_causality_and_groups(name, monkeypatch):
    monkeypatch.setattr(probing, "ROWS", TINY.tokens)
    monkeypatch.setattr(probing, "HEADS", 99)
    plan, given = plans()[name], inputs()
    out, lse = attention(*given, plan, causal=True, impl="reference")
    right = probe(given, plan, out, lse, causal=True)
    assert right.kernel_error < 1e-5
    assert right.lse_error < 1e-4
    q, k = given[0], given[1].repeat_interleave(2, 1)
    every = torch.ones(TINY.tokens, TINY.tokens, dtype=torch.bool).tril()
    logits = (q @ k.mT * TINY.width**-0.5)[0].masked_fill(~every, -torch.inf)
    recall = (logits.softmax(-1) * token_pairs(plan)).sum(-1).mean()
    assert right.recall == pytest.approx(float(recall), abs=1e-5)
    # A result that sees later tokens, or another key head, is wrong.
    later = attention(*given, plan, impl="reference")
    assert probe(given, plan, *later, causal=True).kernel_error > 0.01
    other = attention(q, given[1].flip(1), given[2], plan, causal=True, impl="reference")
    assert probe(given, plan, *other, causal=True).kernel_error > 0.01


def test_dense_calls_lists_and_policies_are_measured_on_prompts():
    attempts, given = Attempts(TINY), inputs(dtype=torch.bfloat16)
    add_dense(attempts, given, ["sdpa", "flex", "fa4"])
    add_lists(attempts, given, ["cpu"], [(64, 64)], [1.0], seed=0)
    recipes = [GRID, AShape(block=(16, 16), window=32, sink=16), RandomBlocks(density=0.4)]
    add_policies(attempts, given, "structured", recipes)
    rows = measure(attempts, CPU, 1, lambda: None)
    assert [row.kind for row in rows] == ["dense", "dense", "lists", "policy", "policy"]
    dense, flex, lists, grid, shape = rows
    assert lists.density == 1.0
    assert dense.tflops == pytest.approx(TINY.flops / dense.seconds / 1e12)
    assert all(row.kernel_error < 0.02 for row in rows)
    times = {"sdpa": dense.seconds, "flex": flex.seconds}
    assert grid.over == {name: seconds / grid.seconds for name, seconds in times.items()}
    assert grid.density < 0.7
    assert shape.density < grid.density
    # The grid reorders tokens, the A shape does not; neither has a first step.
    assert grid.reordering > 0
    assert shape.reordering is None
    assert grid.first is None
    assert grid.seconds > grid.selection > 0
    reasons = {entry.name: entry.reason for entry in attempts.skipped}
    assert "not installed" in reasons["fa4 dense"]
    assert "stage 'prefill'" in reasons["RandomBlocks(density=0.4) on structured inputs"]


def test_a_layer_of_a_prompt_is_measured_with_each_kernel_that_takes_it():
    assert of_prompts(["sdpa", "fa4", "triton", "flex"]) == ["triton", "fa4"]
    assert of_prompts(["sdpa"]) == ["auto"]
    attempts, given = Attempts(TINY), inputs(dtype=torch.bfloat16)
    add_policies(attempts, given, "structured", [GRID], ["fa4", "cpu", "flex"])
    assert [case.row.impl for case in attempts.cases] == ["cpu", "flex"]
    assert {case.row.name for case in attempts.cases} == {str(GRID)}
    (skipped,) = attempts.skipped
    assert skipped.name == f"{GRID} by fa4 on structured inputs"
    assert "not installed" in skipped.reason


def test_a_policy_for_prompts_is_skipped_elsewhere():
    attempts = Attempts(SHAPES["tiny"])
    given = inputs(shape=SHAPES["tiny"])
    add_policies(attempts, given, "structured", [GRID])
    assert not attempts.cases
    assert "tiny is none" in attempts.skipped[0].reason


def test_all_prefill_recipes_run_where_none_is_named():
    found = policies([])
    assert {GridAttention(), AShape(), VerticalSlash()} <= set(found)


def test_a_run_takes_the_recipes_of_each_kind_of_call(run, tmp_path):
    code, text, err = run(
        "bench", "attention", "--shape", "tiny-prompt", "--impl", "sdpa", "--impl", "cpu",
        "--no-kernels", "--inputs", "random", "--repeats", 1, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    (data,) = json.loads((tmp_path / "attention.json").read_text())["runs"]
    named = {row["name"] for row in data["cases"] if row["kind"] == "policy"}
    # At their own sizes prompts this short stay dense.
    assert named == {"GridAttention", "AShape", "VerticalSlash"}
    assert "4 heads x 32, 2 key heads, causal" in text
