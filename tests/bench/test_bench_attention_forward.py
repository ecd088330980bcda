"""`tubelet bench forward`: the dense pass taken apart, the prediction, the measurement."""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tubelet.bench.attention import forward
from tubelet.bench.attention.forward import ForwardBench
from tubelet.core.errors import TubeletError
from tubelet.core.grid import TokenGrid
from tubelet.models.generator_presets import GENERATOR_PRESETS
from tubelet.recipes import RandomBlocks

CPU = torch.device("cpu")
GRID = TokenGrid(frames=4, height=8, width=8)


class _Host(nn.Module):
    """Self-attention, cross-attention and something slow, in every layer."""

    def __init__(self, layers=3, rest=0.0, scale=1.0):
        super().__init__()
        self.layers, self.rest, self.scale = layers, rest, scale

    def forward(self, x):
        text = x[:, :, :16]
        for layer in range(self.layers):
            x = F.scaled_dot_product_attention(x + layer, x, x)
            x = F.scaled_dot_product_attention(query=x, key=text, value=text)
            time.sleep(self.rest)
        return (x * self.scale,)


def bench(host=None, repeats=1):
    inputs = {"x": torch.randn(1, 2, GRID.num_tokens, 32)}
    return ForwardBench(host or _Host(), inputs, GRID, CPU, repeats, lambda *what: None)


@pytest.fixture
def no_recipe_at_work(monkeypatch):
    """The sparse pass takes as long as the dense one."""
    handle = SimpleNamespace(report=lambda: SimpleNamespace(to_dict=dict))
    monkeypatch.setattr(forward, "accelerate", lambda model, recipe: nullcontext(handle))


def test_only_attention_over_all_tokens_is_counted():
    found = bench()
    split = found.dense_split()
    assert found.layers == 3
    assert split.dense == pytest.approx(sum(found.calls))
    assert split.speedup == pytest.approx(1.0)


def test_what_is_not_attention_is_rest(monkeypatch):
    depth = [0]

    def clock(run, device):
        """Ten seconds for a forward pass, one for each attention call inside."""
        depth[0] += 1
        run()
        depth[0] -= 1
        return 1.0 if depth[0] else 10.0

    monkeypatch.setattr(forward, "seconds", clock)
    split = bench().dense_split()
    assert (split.dense, split.rest, split.call_dense) == (3.0, 7.0, 1.0)


def test_the_second_layer_is_what_a_policy_decides_on():
    host, found = _Host(layers=2), bench()
    found.model = host
    found.dense_split()
    x = found.inputs["x"]
    first = F.scaled_dot_product_attention(x, x, x)
    second = F.scaled_dot_product_attention(first, x[:, :, :16], x[:, :, :16]) + 1
    assert torch.allclose(found.caught[0], second, atol=1e-5)


def test_the_prediction_puts_the_measured_call_in_place_of_the_dense_ones(monkeypatch):
    def timed(runs, device, repeats):
        for run in runs:
            run()
        return [[0.25], [0.5]]

    monkeypatch.setattr(forward, "take_turns", timed)
    found = bench(_Host(layers=4))
    dense = replace(found.dense_split(), dense=8.0, rest=2.0, call_dense=2.0)
    split = found.predict(RandomBlocks(density=0.5, dense_layers=1), dense)
    assert split.dense_calls == 0.25
    assert 0.3 < split.density <= 0.8
    assert split.speedup == pytest.approx(10.0 / (2.0 + 2.0 + 3 * (0.25 + 0.5)))


def test_prediction_comes_before_the_measurement_and_is_compared_with_it(no_recipe_at_work):
    found, said = bench(_Host(rest=0.03), repeats=3), []
    row = found.attempt(RandomBlocks(density=0.5), found.dense_split(), 0.4, said.append)
    assert "predicted" in said[0]
    assert "measured" in said[1]
    assert len(row["dense_samples"]) == len(row["sparse_samples"]) == 3
    off = row["predicted_speedup"] / row["measured_speedup"] - 1
    assert row["prediction_off_by"] == pytest.approx(off)
    assert f"{off:+.1%}" in said[1]
    assert row["predicted_from_flops"] > 1


def test_a_recipe_that_fails_is_recorded(monkeypatch):
    found, said = bench(), []

    def refuse(model, recipe):
        raise TubeletError("not here")

    monkeypatch.setattr(forward, "accelerate", refuse)
    row = found.attempt(RandomBlocks(), found.dense_split(), 0.4, said.append)
    assert row["error"] == "TubeletError: not here"
    assert "not measured" in said[-1]


def test_a_model_without_attention_over_all_tokens_is_refused():
    with pytest.raises(TubeletError, match="no attention call over 256"):
        bench(_Host(layers=0)).dense_split()


def test_an_output_that_is_not_finite_is_refused():
    with pytest.raises(TubeletError, match="not finite"):
        bench(_Host(scale=torch.inf)).dense_split()


@pytest.fixture
def small_wan(monkeypatch):
    """`wan2.1-1.3b` with a few narrow layers."""
    whole = GENERATOR_PRESETS["wan2.1-1.3b"]
    narrow = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32}
    tiny = replace(whole, config={**whole.config, **narrow})
    monkeypatch.setitem(GENERATOR_PRESETS, whole.name, tiny)


def test_a_published_transformer_is_predicted_and_measured(run, small_wan, tmp_path):
    code, text, err = run(
        "bench", "forward", "--preset", "wan2.1-1.3b", "--layers", 2, "--frames", 17, "--height",
        128, "--width", 128, "--recipe", "RandomBlocks(density=0.5)", "--recipe",
        "DraftAttention(density=0.5)", "--repeats", 1, "--out", tmp_path / "new",
    )  # fmt: skip
    assert code == 0, err
    assert text.index("predicted") < text.index("measured")
    found = json.loads((tmp_path / "new" / "forward.json").read_text())
    assert (found["tokens"], found["layers"]) == (5 * 8 * 8, 2)
    dense = found["dense"]
    assert dense["attention"] + dense["rest"] == pytest.approx(dense["seconds"])
    row, warming = found["recipes"]
    # One forward pass would be warm-up, and is measured as a later step.
    assert warming["recipe"]["dense_steps"] == 0.0
    assert sum(warming["report"]["attention"].values()) == 1
    assert row["recipe"] == {"recipe": "RandomBlocks", **row["recipe"]}
    assert sum(row["report"]["attention"].values()) == 2
    assert row["prediction"]["density"] < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "wan"], ["unknown preset 'wan'", "hunyuanvideo"]),
        (["--recipe", "ToMe(r=8)"], ["no sparse attention"]),
        (["--layers", 99], ["30 layers"]),
        (["--height", 8], ["16 x 16"]),
        (["--backend", "magic", "--layers", 1], ["'magic'"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(run, small_wan, tmp_path, options, words):
    code, _, err = run(
        "bench", "forward", "--preset", "wan2.1-1.3b", "--out", tmp_path / "out", *options
    )
    assert code == 2, err
    assert all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
