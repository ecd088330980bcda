"""Report: the numbers, as data and as text."""

import json

import pytest
import torch

from tubelet.core.context import StepContext
from tubelet.core.report import Report


@pytest.fixture
def report() -> Report:
    report = Report("Host", ("ToMe(r=8)", "Random"))
    for _ in range(2):
        report.start_run(100)
    for layer, seen in {1: (60, 40), 0: (100, 100)}.items():
        for tokens in seen:
            report.enter_layer(layer, tokens)
    report.change("ToMe(r=8)", "layers.0", 100, 60)
    report.change("ToMe(r=8)", "layers.0", 100, 40)
    report.attention["flex"] += 3
    report.fallbacks["float64"] += 2
    return report


def test_tokens_are_averaged_over_runs_and_layers_sorted(report):
    assert report.calls == 2
    assert report.tokens_per_layer == [100, 50]
    assert report.mean_tokens == 75


def test_a_new_report_is_empty():
    report = Report("Host", ())
    assert report.tokens_per_layer == []
    assert report.mean_tokens is None
    assert str(report) == "Host: no recipe, 0 runs"


def test_reports_do_not_share_their_counters(report):
    assert Report("Host", ()).to_dict()["changes"] == []
    assert not Report("Host", ()).attention


def test_data_is_ready_for_json(report):
    assert json.loads(json.dumps(report.to_dict())) == {
        "model": "Host",
        "recipes": ["ToMe(r=8)", "Random"],
        "calls": 2,
        "tokens_in": 100,
        "tokens_per_layer": [100, 50],
        "changes": [{"recipe": "ToMe(r=8)", "site": "layers.0", "before": 100, "after": 50}],
        "attention": {"flex": 3},
        "fallbacks": {"float64": 2},
        "densities": [],
        "verified": [],
        "cache_bytes": None,
        "stored": {},
    }


def test_text_shows_every_number(report):
    assert str(report).splitlines() == [
        "Host: ToMe(r=8), Random, 2 runs",
        "tokens entering each layer (of 100): 100 50",
        "mean over layers: 75.0 (75.0%)",
        "  ToMe(r=8) at layers.0: 100 -> 50",
        "  attention flex: 3 calls",
        "  fall-back: float64: 2 times",
    ]


def test_sparse_and_verified_calls_are_told_by_layer_step_and_head(report):
    step = StepContext(step=3, num_steps=8, branch="uncond")
    report.sparse_call(2, step, torch.tensor([0.25, 0.75]))
    report.sparse_call(5, None, torch.tensor([0.1]))
    report.verified_call(2, step, torch.tensor(0.2), torch.tensor(0.5), 0.01)
    report.verified_call(4, step, torch.tensor(0.4), torch.tensor(0.7), 0.01)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["densities"][0] == {
        "layer": 2, "step": 3, "branch": "uncond", "heads": [0.25, 0.75],
    }  # fmt: skip
    assert (data["densities"][1]["layer"], data["densities"][1]["step"]) == (5, None)
    assert report.mean_density == pytest.approx(0.3)
    assert data["verified"][1]["error"] == pytest.approx(0.4)
    text = str(report)
    assert "mean block density of 2 calls: 30.0%" in text
    assert "verified at 1.00% of dense: error 0.300 (worst 0.400 in layer 4), recall 60.0%" in text


def test_a_recipe_acted_when_it_shrank_something_or_planned_attention(report):
    assert report.acted("ToMe(r=8)")
    assert not report.acted("Random")
    report.change("Random", "layers.1", 50, 50)
    assert not report.acted("Random")
    report.attention["Random: flex"] += 1
    assert report.acted("Random")


def test_recipes_with_a_common_prefix_are_told_apart(report):
    report.attention["RandomBlocks: flex"] += 1
    assert not report.acted("Random")
