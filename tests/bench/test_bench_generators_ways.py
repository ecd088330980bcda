"""Accelerated ways in `tubelet bench generation`."""

import json
from dataclasses import replace

import pytest
import torch

from tubelet.bench.fidelity import generation as bench
from tubelet.bench.fidelity.generation import GenerationRequest, run_generation
from tubelet.bench.fidelity.generation_result import read_generation
from tubelet.bench.fidelity.generation_tables import generation_table
from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.weights import save_weights

# Half of the steps stay dense: a share that only a run of known length has.
SPARSE = "RandomBlocks(density=0.25, block=(16, 16), dense_steps=0.5) + ZerothOrder"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, depth=2, heads=2, frames=4, size=(32, 32))
    network = VideoDiT(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("ways") / "dit"
    save_weights(path, network, record={})
    return str(path)


def request(model, out, *recipes: str) -> GenerationRequest:
    return GenerationRequest(out=out, model=model, pairs=2, steps=2, quick=True, recipes=recipes)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A result and its folder."""
    out = tmp_path_factory.mktemp("generation")
    return run_generation(request(model, out, SPARSE), lambda *a: None), out


def test_a_sparse_way_is_measured_with_its_density(done) -> None:
    found, out = done
    sparse = found.outcomes[-1]
    assert (sparse.kind, sparse.label) == ("recipe", "lossy")
    assert sparse.name.endswith("+ ZerothOrder")
    assert sparse.density == pytest.approx(0.25)
    assert all(outcome.density is None for outcome in found.outcomes[:-1])
    assert read_generation(out / "generation.json").outcomes[-1].density == sparse.density
    table = (out / "generation.md").read_text()
    assert table.splitlines()[2].endswith("| to dense | density |")
    assert "| 25.0% |" in table
    assert "<td >25.0%</td>" in (out / "generation.html").read_text()


def test_results_without_densities_still_load_and_show_no_column(done, tmp_path) -> None:
    data = json.loads((done[1] / "generation.json").read_text())
    data["outcomes"] = data["outcomes"][:2]
    for outcome in data["outcomes"]:
        del outcome["density"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    assert generation_table(read_generation(path)).splitlines()[2].endswith("| to dense |")


def test_recipes_that_cannot_run_are_refused_before_drawing(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "measure", None)
    asked = request(model, tmp_path / "o", "ToMe")
    with pytest.raises(UnsupportedError, match="ToMe cannot run"):
        run_generation(asked, lambda *a: None)
    with pytest.raises(RecipeError, match="given twice"):
        run_generation(replace(asked, recipes=(SPARSE, SPARSE)), lambda *a: None)
    assert not (tmp_path / "o").exists()


def test_the_command_takes_recipes(run, model, tmp_path) -> None:
    code, text, _ = run(
        "bench", "generation", "--model", model, "--pairs", 1, "--steps", 2, "--quick",
        "--recipe", SPARSE, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["outcomes"][-1]["density"] == pytest.approx(0.25)
