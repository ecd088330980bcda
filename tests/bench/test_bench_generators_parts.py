"""The pieces of `tubelet compare` on generators: timing, prediction, figures and drawings."""

import re
from dataclasses import replace

import pytest
import torch

from tubelet.bench.amdahl import speedup
from tubelet.bench.generators.drawing import AttentionWatch, Drawn, Task, draw
from tubelet.bench.generators.prediction import planned_dense, predict, probe, sites_of
from tubelet.bench.generators.result import Row
from tubelet.bench.generators.svg import error_curves, heat_map
from tubelet.core.context import StepContext
from tubelet.core.report import Report
from tubelet.models.attend_op import open_places
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.recipes import RandomBlocks, SubBlock, ZerothOrder

BLOCK = (32, 32)
TASK = Task(attributes=torch.tensor([[1, 2, 3, 1, 0]]), steps=3, guidance=1.0, seed=0, dtype=None)


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, depth=4, heads=2, frames=8, size=(32, 32))
    made = VideoDiT(config).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return made


def test_every_attention_call_is_timed_and_the_model_left_alone(model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = draw(model, TASK)
    sparse = draw(model, TASK, (RandomBlocks(density=0.5, block=BLOCK), ZerothOrder()))
    for drawn in (dense, sparse):
        assert [len(step) for step in drawn.attention] == [4, 4, 4]
        assert all(0 < sum(a) < s for a, s in zip(drawn.attention, drawn.step_seconds, strict=True))
    assert torch.equal(draw(model, TASK).pixels, dense.pixels)
    assert not torch.equal(sparse.pixels, dense.pixels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert open_places() == 0
    assert not any("attend" in vars(block.attention) for block in model.blocks)


def test_the_watch_leaves_when_a_run_breaks(model) -> None:
    with pytest.raises(RuntimeError, match="broken"), AttentionWatch(model):
        raise RuntimeError("broken")
    assert not any("attend" in vars(block.attention) for block in model.blocks)


def test_a_probe_begins_at_once(model) -> None:
    late = RandomBlocks(density=0.5, block=BLOCK, dense_steps=1.0)
    report = probe(model, TASK, (late,)).report
    assert report is not None
    assert {call["step"] for call in report.densities()} == {0, 1}


def test_dense_calls_are_planned_by_layer_and_step(model) -> None:
    sites = sites_of(model)
    assert planned_dense(sites, (RandomBlocks(),), 8) == 0
    late = SubBlock(dense_layers=1, dense_steps=0.25)
    assert planned_dense(sites, (late, ZerothOrder()), 8) == pytest.approx(1 - 3 / 4 * 6 / 8)


def _drawn(attention: list[float], seconds: float, report: Report | None = None) -> Drawn:
    return Drawn(
        pixels=torch.empty(0), attention=[attention] * 2, step_seconds=[9.0, seconds], report=report
    )


def test_the_prediction_puts_sparse_calls_in_place_of_dense_ones(model) -> None:
    report = Report("VideoDiT", ())
    for step in (0, 1):
        for layer in (1, 2, 3):
            shares = torch.tensor([0.2, 0.4]) if step else torch.tensor([1.0, 1.0])
            report.sparse_call(layer, StepContext(step=step), shares)
    # Dense: 4 calls of 2 s and 2 s of rest. Sparse: layer 0 stays dense, others take 1 s.
    dense, sparse = _drawn([2.0] * 4, 10.0), _drawn([2.0, 1.0, 1.0, 1.0], 7.0, report)
    recipes = (RandomBlocks(dense_layers=1, dense_steps=0.5, block=BLOCK),)
    found = predict(sites_of(model), dense, sparse, recipes, steps=4)
    assert found.split.share == pytest.approx(0.8)
    assert found.split.density == pytest.approx(0.3)
    # A run of 4 steps: 40 s dense; 6 of 16 calls become 1 s cheaper.
    assert found.speedup == pytest.approx(40 / 34)
    assert found.by_density == pytest.approx(speedup(0.8, 0.3, dense_calls=10 / 16))
    assert found.to_dict()["efficiency"] == pytest.approx(0.6)


def test_no_sparse_call_predicts_no_gain(model) -> None:
    same = _drawn([2.0] * 4, 10.0, Report("VideoDiT", ()))
    found = predict(sites_of(model), same, same, (RandomBlocks(),), steps=4)
    assert found.speedup == pytest.approx(1.0)


ROW = Row(
    name="a <b>",
    recipes=[],
    seconds=4.0,
    step_seconds=[2.0, 2.0],
    attention_seconds=1.0,
    psnr=30.0,
    ssim=0.9,
    latent_error=[0.1, 0.4],
    attributes=1.0,
    found="",
    densities=[[None, [0.2, 0.4]], [[0.6, 0.6], [0.0, 0.4]], [None, None]],
)


def test_densities_are_averaged_over_heads_or_steps() -> None:
    for found, wanted in (
        (ROW.by_step, [[None, 0.3], [0.6, 0.2], [None, None]]),
        (ROW.by_head, [[0.2, 0.4], [0.3, 0.5], [None, None]]),
    ):
        for row, expected in zip(found, wanted, strict=True):
            assert row == [x if x is None else pytest.approx(x) for x in expected]
    assert ROW.density == pytest.approx((0.3 + 0.6 + 0.2) / 3)
    assert ROW.computed == pytest.approx((3 + 0.3 + 0.6 + 0.2) / 6)
    assert ROW.dense_calls == 3
    assert ROW.attention_share == 0.25


def test_a_heat_map_draws_a_cell_per_call() -> None:
    svg = heat_map(ROW.by_step, "density of a <b>", "step")
    assert svg.count("<rect") == 6
    assert svg.count('class="dense"') == 3
    assert [float(x) for x in re.findall(r'fill-opacity="([\d.]+)"', svg)] == [0.3, 0.6, 0.2]
    assert ">30</text>" in svg
    assert "layer 1, step 0: 60.0%" in svg
    assert "a &lt;b&gt;" in svg
    wide = heat_map([[0.5] * 40], "wide", "step")
    assert wide.count("<rect") == 40
    assert ">50</text>" not in wide
    assert heat_map([], "none", "step") == ""


def test_curves_rise_with_the_error_and_number_the_variants() -> None:
    svg = error_curves([ROW, replace(ROW, name="b", latent_error=[0.0, 0.2])])
    lines = re.findall(r'class="line solid" d="M([^"]+)"', svg)
    ends = [[float(point.split()[1]) for point in line.split("L")] for line in lines]
    assert ends[0][1] < ends[0][0]
    assert ends[0][1] < ends[1][1] < ends[1][0]
    assert re.findall(r'class="name"[^>]*>(\d)<', svg) == ["2", "3"]
    one = error_curves([replace(ROW, latent_error=[0.0])])
    assert one.count("<circle") == 1
