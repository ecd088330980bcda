"""Measuring video language models: time split, agreement, bytes, failures."""

import functools
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from tubelet.bench.llm import measure
from tubelet.bench.llm.clock import StageClock
from tubelet.bench.llm.inputs import Task, make_prompts, moving_clip
from tubelet.bench.llm.measure import LLMBench, cache_bytes
from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import Site
from tubelet.core.errors import NoEffectWarning, TubeletError
from tubelet.core.prompt import LayerContext, PromptContext
from tubelet.core.recipe import LayerReduction, PromptReduction
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.models.llm_presets import load_llm
from tubelet.recipes import AShape, FastV, RandomPrompt, UniformFrames, ZipCache

CPU = torch.device("cpu")
LOADED = {
    name: load_llm(name, dtype=torch.float32)
    for name in ("tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-llava-onevision")
}
TASK = Task(grid=LOADED["tiny-qwen3-vl"].grid, question=6, seed=0)


def bench(name="tiny-qwen3-vl", concurrencies=(1,), said=None, task=TASK):
    return LLMBench(
        LOADED[name],
        task,
        CPU,
        repeats=1,
        new_tokens=3,
        concurrencies=concurrencies,
        progress=lambda *what: None,
        announce=(lambda words: None) if said is None else said.append,
    )


@pytest.fixture(scope="module")
def measured():
    """A dense row and two recipes', measured once."""
    found, said = bench(concurrencies=(1, 2), said=(said := [])), said
    with torch.inference_mode():
        rows = [found.dense()]
        rows += [found.attempt((r,)) for r in (RandomPrompt(keep_ratio=0.25), FastV(layer=3))]
    return found, rows, said


# Time split


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def passes(self, duration):
        self.now += duration


@dataclass(frozen=True, kw_only=True)
class Thinking(PromptReduction):
    """Takes 3 seconds before the language model."""

    identity: ClassVar = {}
    clock: ClassVar[Clock]

    def plan(self, ctx: PromptContext) -> TokenAssignment:
        self.clock.passes(3)
        return TokenAssignment.keep(torch.arange(0, ctx.num_tokens, 2)[None], ctx.num_tokens)


@dataclass(frozen=True, kw_only=True)
class ThinkingInside(LayerReduction):
    """Takes 3 seconds inside it."""

    identity: ClassVar = {}
    clock: ClassVar[Clock]

    def acts_on(self, site: Site) -> bool:
        return site.kind == "llm" and site.layer == 2

    def plan(self, ctx: LayerContext) -> TokenAssignment:
        self.clock.passes(3)
        return TokenAssignment.keep(torch.arange(0, ctx.num_tokens, 2)[None], ctx.num_tokens)


@pytest.mark.parametrize("kind", [None, Thinking, ThinkingInside])
@pytest.mark.parametrize("name", LOADED)
def test_time_goes_to_the_part_that_took_it(name, kind, monkeypatch):
    clock, model = Clock(monkeypatch), LOADED[name].model
    text, inputs = adapter_for(model).text_model(model), make_prompts(LOADED[name], TASK, 1)
    features = model.model.get_video_features

    @functools.wraps(features)
    def slow(*args, **kwargs):
        clock.passes(100)
        return features(*args, **kwargs)

    monkeypatch.setattr(model.model, "get_video_features", slow)
    recipes = []
    if kind is not None:
        monkeypatch.setattr(kind, "clock", clock, raising=False)
        recipes.append(kind())
    hook = text.layers[1].register_forward_pre_hook(lambda *call: clock.passes(10))

    def generate():
        clock.passes(1)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    with torch.inference_mode(), StageClock(model, text, CPU) as stages:
        watched = [stages.watched(recipe) for recipe in recipes]
        with accelerate(model, *watched) if watched else nullcontext():
            split = stages.first_token(generate)
    hook.remove()
    plan = 0 if kind is None else 3
    assert (split.vision, split.plan, split.llm, split.prompt) == (100, plan, 10, 1)
    assert split.total == 111 + plan
    # What stood there before stands there again.
    assert vars(model.model)["get_video_features"] is slow


# Rows


def test_bounds_are_told_before_the_measurement(measured):
    _, rows, said = measured
    assert said[0].startswith("dense: 212 tokens")
    for row in rows[1:]:
        mine = [words for words in said if words.startswith(row.name)]
        assert "at most" in mine[0]
        assert f"{row.bound:.2f}x" in mine[0]
        assert f"measured {row.speedup:.2f}x" in mine[1]
        assert row.of_bound == row.speedup / row.bound
        host, mine = row.dense_split["prompt"], row.split["total"]
        wanted = (row.dense_split["total"] - host) / (mine - host)
        assert row.prefill_speedup == pytest.approx(wanted)
        assert row.prefill_of_bound == pytest.approx(wanted / row.bound)


def test_the_four_ratios_differ_where_they_should(measured):
    found, (dense, before, inside), _ = measured
    text = found.prompt_tokens - 128
    assert before.kept.entering == before.kept.layers == 0.25
    assert before.kept.cache == pytest.approx((32 + text) / (128 + text))
    # FastV(layer=3) of 4 layers: the whole prompt enters three of them, half the last.
    assert (inside.kept.entering, inside.kept.layers) == (1.0, 0.875)
    assert inside.kept.cache == pytest.approx((3 + (64 + text) / (128 + text)) / 4)
    assert before.kept.operations == before.work["llm"] / dense.work["llm"]
    assert 0.25 < before.kept.operations < inside.kept.operations < 1


def test_dense_is_its_own_reference(measured):
    _, (dense, *_), _ = measured
    assert (dense.speedup, dense.bound, dense.agreement.kl, dense.agreement.match) == (1, 1, 0, 1)
    assert [entry.over_dense for entry in dense.throughput] == [1, 1]


def test_throughput_counts_prompts_and_tokens(measured):
    _, rows, _ = measured
    for row in rows:
        assert [entry.concurrency for entry in row.throughput] == [1, 2]
        for entry in row.throughput:
            assert entry.requests == pytest.approx(entry.concurrency / entry.seconds)
            assert entry.tokens == pytest.approx(4 * entry.requests)
    two, base = rows[1].throughput[1], rows[0].throughput[1]
    assert two.over_dense == pytest.approx(two.requests / base.requests)


def test_sparse_prefill_and_packed_caches_are_counted():
    found, said = bench(said=(said := [])), said
    with torch.inference_mode():
        found.dense()
        sparse = found.attempt((AShape(block=(16, 16), window=32, sink=16),))
        stored = found.attempt((ZipCache(),))
    assert (sparse.error, stored.error) == (None, None)
    assert 0 < sparse.density < 1
    assert f"at density {sparse.density:.3f}" in said[1]
    share = sparse.work["attention"] / found.base.work["attention"]
    assert share == pytest.approx(sparse.density)
    assert sparse.kept.layers == stored.kept.layers == 1
    assert sparse.split["plan"] > 0
    assert stored.density is None
    assert stored.kept.cache < 1 == sparse.kept.cache


def test_densities_are_means_by_layer():
    calls = [{"layer": 0, "heads": [0.2, 0.4]}, {"layer": 2, "heads": [1.0]},
             {"layer": 0, "heads": [0.6, 0.8]}]  # fmt: skip
    assert measure.by_layer(calls) == pytest.approx({0: 0.5, 2: 1.0})


def test_a_recipe_that_keeps_all_agrees_wholly():
    found = bench()
    with torch.inference_mode():
        found.dense()
        with pytest.warns(NoEffectWarning):
            same = found.attempt((RandomPrompt(keep_ratio=1.0),))
        other = found.attempt((UniformFrames(keep_ratio=0.2),))
    assert (same.agreement.kl, same.agreement.match, same.bound) == (0.0, 1.0, 1.0)
    assert other.agreement.kl > 0.01


def test_agreement_by_hand():
    found = bench()
    reference = torch.tensor([[0.5, 0.25, 0.25]]).log()
    found.reference = measure.Answer(tokens=torch.tensor([[1, 2, 3, 4]]), logits=reference)
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log() + 7
    agreement = found._agreement(measure.Answer(tokens=torch.tensor([[1, 2, 9, 4]]), logits=logits))
    # 0.5 ln(0.5 / 0.7) + 0.25 ln(0.25 / 0.2) + 0.25 ln(0.25 / 0.1); the other way it is 0.0993.
    assert agreement.kl == pytest.approx(0.116623, abs=1e-5)
    assert (agreement.first, agreement.match) == (True, 0.5)


def test_cache_bytes_count_what_is_held(measured):
    found, (dense, *_), _ = measured
    # 4 layers, keys and values, 2 heads of 16 channels in float32.
    assert dense.cache_bytes == 4 * 2 * 2 * 16 * 4 * found.prompt_tokens
    held = torch.zeros(10)
    shared = SimpleNamespace(keys=held, values=held[:5], note="x")
    packed = SimpleNamespace(nbytes=lambda: 7, chunks=[held])
    assert cache_bytes(SimpleNamespace(layers=[shared, packed])) == 40 + 7


def test_out_of_memory_in_a_recipe_is_a_row(monkeypatch):
    found, said = bench(said=(said := [])), said
    with torch.inference_mode():
        found.dense()

        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

        monkeypatch.setattr(measure, "peak_memory", full)
        row = found.attempt((RandomPrompt(),))
    assert row.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 99 GiB"
    assert row.first is None
    assert "not measured" in said[-1]
    assert "generate" not in vars(found.model)


@pytest.mark.parametrize("most", [4, 2, 1, 0])
def test_batches_that_do_not_fit_are_served_in_parts(monkeypatch, most):
    make, made = measure.make_prompts, []

    def small(loaded, task, batch):
        if batch > most and made:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(batch)
        return make(loaded, task, batch)

    monkeypatch.setattr(measure, "make_prompts", small)
    found = bench(concurrencies=(1, 4))
    with torch.inference_mode():
        dense, row = found.dense(), found.attempt((RandomPrompt(),))
    assert row.error is None
    assert row.throughput[0].error is None
    for entry in (dense.throughput[1], row.throughput[1]):
        assert entry.together == (most or None)
        assert (entry.error is None) == (most > 0)
        if most:
            assert entry.requests == pytest.approx(4 / entry.seconds)
    assert row.throughput[1].over_dense == (
        pytest.approx(dense.throughput[1].seconds / row.throughput[1].seconds) if most else None
    )


def test_another_failure_of_a_batch_is_not_tried_in_parts(monkeypatch):
    found = bench(concurrencies=(1, 4))
    tried = []
    monkeypatch.setattr(found, "_serve", lambda *call: tried.append(call) or 1 / 0)
    with torch.inference_mode():
        entry = found.dense().throughput[1]
    assert len(tried) == 1
    assert "ZeroDivisionError" in entry.error


@pytest.mark.parametrize(("batch", "parts"), [(32, [32, 16, 8, 4, 2, 1]), (12, [12, 6, 3, 1])])
def test_parts_are_equal(batch, parts):
    assert measure._parts(batch) == parts


def test_a_refused_recipe_is_a_row():
    found = bench()
    with torch.inference_mode():
        found.dense()
        row = found.attempt((FastV(layer=1),))
    assert "from layer 2 on" in row.error


def test_a_dense_model_that_fails_is_an_error(monkeypatch):
    found = bench()
    monkeypatch.setattr(measure, "cache_bytes", lambda cache: 1 / 0)
    with pytest.raises(TubeletError, match="the dense model was not measured"):
        found.dense()


# Inputs


def test_clips_hold_what_stands_still_and_what_moves():
    clip = moving_clip((6, 24, 24), 0, CPU, torch.float32)
    assert clip.shape == (6, 3, 24, 24)
    assert 0 <= float(clip.min()) < float(clip.max()) <= 1
    change = (clip[1:] - clip[:-1]).abs().mean((0, 1))
    assert change[0].max() < 0.1
    assert change[12].max() > 0.1


def test_prompts_of_a_batch_differ_and_repeat():
    loaded = LOADED["tiny-qwen3-vl"]
    two, again = make_prompts(loaded, TASK, 2), make_prompts(loaded, TASK, 2)
    assert all(torch.equal(two[key], again[key]) for key in two)
    first, second = two["pixel_values_videos"].chunk(2)
    assert not torch.equal(first, second)
    assert not torch.equal(*two["input_ids"])
    other = make_prompts(loaded, replace(TASK, seed=1), 1)
    assert not torch.equal(other["input_ids"][0], two["input_ids"][0])


def test_a_given_clip_is_what_every_prompt_gets():
    loaded = LOADED["tiny-llava-onevision"]
    frames = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    made = make_prompts(loaded, replace(TASK, clip=frames), 2)["pixel_values_videos"]
    # White, at mean and deviation 0.5.
    assert torch.equal(made, torch.ones(2, 8, 3, 32, 32))
