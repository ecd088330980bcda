"""Curves of `tubelet bench generation` on a tiny network with random weights."""

import json
import math
import re

import pytest
import torch

from tubelet.bench.fidelity import generation as bench
from tubelet.bench.fidelity import generation_curves as curves
from tubelet.bench.fidelity.generation import GenerationRequest, join_files, run_generation
from tubelet.bench.fidelity.generation_curves import (
    COMPENSATED,
    TERMS,
    curve_policies,
    curve_recipes,
    settings_of,
)
from tubelet.bench.fidelity.generation_result import read_generation
from tubelet.core.errors import RecipeError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.weights import save_weights

LAYERS, STEPS, TOKENS = 2, 4, 256
"""Of the tiny network; a quick run of curves draws so many steps."""

NAMES = "SubBlock,RandomBlocks"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, depth=LAYERS, heads=2, frames=8, size=(32, 32))
    network = VideoDiT(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("curves") / "dit"
    save_weights(path, network, record={})
    return str(path)


def request(model: str, out, **changes) -> GenerationRequest:
    return GenerationRequest(out=out, model=model, quick=True, **{"curves": NAMES, **changes})


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A result and its folder."""
    out = tmp_path_factory.mktemp("drawn")
    return run_generation(request(model, out), lambda *a: None), out


def test_every_block_policy_has_a_curve_and_all_warm_up_alike() -> None:
    drawn = curve_recipes("all", 0.25)
    assert {"SVG", "SubBlock", "RandomBlocks", "VMoBA"} <= curve_policies().keys()
    assert {recipes[0].name for _, recipes in drawn} == curve_policies().keys()
    assert all((r[0].dense_steps, r[0].dense_layers) == (0.25, 0) for _, r in drawn)
    assert all(len(settings_of(cls)) >= 3 for cls in curve_policies().values())
    names = [name for name, _ in drawn]
    assert len(names) == len(set(names))
    assert "SubBlock(density=0.2)" in names
    assert not any("dense_" in name for name in names)


def test_compensated_settings_are_points_of_their_curves() -> None:
    names = [name for name, _ in curve_recipes("all", 0.2)]
    together = [name for name in names if " + " in name]
    assert len(together) == sum(map(len, COMPENSATED.values())) * len(TERMS)
    assert all(name.split(" + ")[0] in names for name in together)


def test_a_policy_that_nothing_steers_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(curves, "SETTINGS", {})
    assert settings_of(curve_policies()["SubBlock"])[0] == {"density": 0.5}
    with pytest.raises(RecipeError, match="VMoBA has no density"):
        settings_of(curve_policies()["VMoBA"])


def test_the_whole_run_counts_dense_calls_and_what_terms_add(done) -> None:
    found = {outcome.name: outcome for outcome in done[0].outcomes}
    # One step of four is dense; two blocks per row, of which a list keeps one.
    assert (done[0].outcomes[0].calls, done[0].dense_steps) == (STEPS, 0.2)
    alone = found["RandomBlocks(density=0.2)"]
    assert (alone.kind, alone.density, alone.kernels) == ("curve", 0.5, ["cpu"])
    assert alone.computed == pytest.approx((1 + 3 * 0.5) / 4)
    extra = {"ZerothOrder": 3 * 0.5 / 128, "DeltaRows": 3 / 64, "Rettention": 1}
    for term, added in extra.items():
        outcome = found[f"RandomBlocks(density=0.2) + {term}"]
        assert (outcome.kind, outcome.density) == ("compensated", 0.5)
        # Of the three sparse steps Rettention does the first densely too.
        assert outcome.computed == pytest.approx((1 + 3 * 0.5 + added) / 4)
    assert found[f"dense, {STEPS} steps"].computed is None


def test_shards_join_to_the_whole_run(done, model, tmp_path) -> None:
    whole, parts = done[0], [tmp_path / "1", tmp_path / "2"]
    for number, out in enumerate(parts, 1):
        shard = run_generation(request(model, out, shard=(number, 2)), lambda *a: None)
        assert len(shard.outcomes) < len(whole.outcomes)
    joined = join_files([out / "generation.json" for out in parts], tmp_path / "joined")
    figures = {o.name: (o.kind, o.label, o.density, o.figures["psnr"]) for o in joined.outcomes}
    wanted = {o.name: (o.kind, o.label, o.density, o.figures["psnr"]) for o in whole.outcomes}
    assert figures == wanted
    assert joined.outcomes[0].kind == "reference"
    assert [o.kind for o in joined.outcomes] == [o.kind for o in whole.outcomes]
    page = (tmp_path / "joined" / "generation.md").read_text()
    assert "**Compensation**" in page


def test_a_run_that_is_cut_off_keeps_what_it_has(model, tmp_path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "RandomBlocks(density=0.5)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_generation(request(model, tmp_path), stop)
    kept = read_generation(tmp_path / "generation.json")
    assert "SubBlock(density=0.5)" in {outcome.name for outcome in kept.outcomes}
    assert any(re.fullmatch(r"cut off: \d+ ways are missing", note) for note in kept.notes)
    assert kept.outcomes[1].label == "exact"


def test_a_point_that_fails_is_noted_and_the_others_go_on(model, tmp_path, monkeypatch) -> None:
    draw = bench._draw

    def failing(model, way, *rest):
        if way.name == "SubBlock(density=0.5)":
            raise RuntimeError("out of\nmemory")
        return draw(model, way, *rest)

    monkeypatch.setattr(bench, "_draw", failing)
    found = run_generation(request(model, tmp_path), lambda *a: None)
    assert "SubBlock(density=0.5) was not drawn: RuntimeError: out of memory" in found.notes
    names = {outcome.name for outcome in found.outcomes}
    assert "SubBlock(density=0.5)" not in names
    assert "SubBlock(density=0.05)" in names


def test_the_page_shows_every_curve_and_stands_alone(done) -> None:
    _, out = done
    page = (out / "generation.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", page)
    assert page.count("<svg") == 3
    for name in NAMES.split(","):
        assert re.search(rf'<g class="curve s\d+">[^§]*?<title>{name}\(density=0.05\): ', page)
    assert "<h2>Compensation</h2>" in page
    assert "NaN" not in page


def test_the_command_draws_and_joins(run, model, tmp_path) -> None:
    code, text, err = run(
        "bench", "generation", "--model", model, "--curves", "RandomBlocks", "--quick",
        "--dense-steps", 0.5, "--out", tmp_path / "a",
    )  # fmt: skip
    assert code == 0, err
    assert "2 of the 4 steps, from the first, are dense" in text
    code, text, err = run(
        "bench", "generation", "--join", tmp_path / "a" / "generation.json", "--json",
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(text)
    assert data["dense_steps"] == 0.5
    assert {o["density"] for o in data["outcomes"] if o["kind"] == "curve"} == {0.5}
    assert all(math.isfinite(o["computed"]) for o in data["outcomes"] if o["density"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--curves", "Tome"], ["'Tome'", "RandomBlocks"]),
        (["--curves", "TempScale"], ["'TempScale'", "SubBlock"]),
        (["--curves", "all", "--recipe", "SubBlock"], ["--recipe in another run"]),
        (["--curves", "all", "--dense-steps", 1], ["[0, 1)"]),
        (["--curves", "all", "--dense-steps", 0.99], ["leaves no sparse step"]),
        (["--shard", "3/2"], ["1 <= i <= n"]),
        (["--shard", "99/99"], ["has nothing to draw"]),
        (["--curves", "SubBlock", "--pairs", 100000], ["would take about", "--yes"]),
        (["--join", "none.json"], ["none.json"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(run, model, tmp_path, options, words) -> None:
    out = tmp_path / "out"
    code, _, err = run("bench", "generation", "--model", model, "--out", out, *options)
    assert code == 2, err
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not out.exists()
