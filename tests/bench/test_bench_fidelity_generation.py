"""The generation bench on a tiny network with random weights."""

import re
from pathlib import Path

import pytest
import torch

from tubelet.bench.fidelity.generation import (
    GenerationRequest,
    Way,
    make_variants,
    measure,
    run_generation,
)
from tubelet.bench.fidelity.generation_result import FIGURES, Generation, Outcome, label_of
from tubelet.bench.fidelity.generation_tables import generation_table, write_generation
from tubelet.core.errors import TubeletError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(
        width=32, depth=2, heads=2, patch=(2, 8, 8), frames=8, size=(32, 32)
    )  # fmt: skip
    model = VideoDiT(config).eval()
    for weight in (model.head.weight, model.modulation.weight):
        torch.nn.init.normal_(weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def found(model) -> Generation:
    request = GenerationRequest(out=Path(), steps=8, quick=True)
    ways = make_variants(8, torch.device("cpu"))
    return measure(request, model, "0" * 64, ways, lambda *a: None)


def test_the_ways_are_reference_floor_and_controls() -> None:
    ways = make_variants(24, torch.device("cpu"))
    assert [way.kind for way in ways[:3]] == ["reference", "floor", "floor"]
    assert [way.steps for way in ways if way.kind == "control"] == [12, 8, 6, 4, 12]
    midpoint = next(way for way in ways if way.method == "midpoint")
    assert midpoint.calls == ways[0].calls
    cuda = make_variants(24, torch.device("cuda"), [("sparse", ())])
    assert {way.name for way in cuda if way.kind == "floor"} >= {"float32", "flex attention"}
    assert cuda[-1] == Way(name="sparse", kind="recipe", steps=24, dtype=torch.bfloat16)


def test_the_labels_tell_rounding_from_loss(found) -> None:
    labels = {outcome.name: outcome.label for outcome in found.outcomes}
    assert labels["dense again"] == "exact"
    assert labels["reference attention"] == "lossless to rounding"
    assert labels["4 steps"] == labels["midpoint, 4 steps"] == "lossy"
    errors = [
        next(o for o in found.outcomes if o.name == f"{n} steps").middle("latent_error").value
        for n in (4, 2, 1)
    ]
    assert errors == sorted(errors)
    assert errors[0] > 1e-3


def test_the_kernel_is_taken_off_again(found, model) -> None:
    assert all(getattr(module, "runtime", None) is None for module in model.modules())


def _outcome(errors: list[float], exact: bool = False) -> Outcome:
    figures = dict.fromkeys(FIGURES, [1.0] * len(errors)) | {"latent_error": errors}
    return Outcome(name="x", kind="recipe", calls=1, seconds=1.0, exact=exact, figures=figures)


def test_the_worst_pair_decides_the_label() -> None:
    floor = [_outcome([1e-6, 5e-6])]
    assert label_of(_outcome([5e-6, 1e-6]), floor) == "lossless to rounding"
    assert label_of(_outcome([0.0, 6e-6]), floor) == "lossy"
    assert label_of(_outcome([0.0, 0.0], exact=True), floor) == "exact"
    assert label_of(_outcome([0.0, 1e-9]), []) == "lossy"


def test_medians_and_bad_ends_have_intervals() -> None:
    outcome = _outcome([float(i) for i in range(101)])
    assert outcome.middle("latent_error").value == 50
    assert outcome.bad_end("latent_error").value == 95
    assert outcome.middle("latent_error").low < 50 < outcome.middle("latent_error").high
    outcome.figures["psnr"] = [float(i) for i in range(101)]
    assert outcome.bad_end("psnr").value == 5


def test_the_page_stands_alone(found, tmp_path) -> None:
    write_generation(tmp_path, found)
    page = (tmp_path / "generation.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", page)
    assert "<svg" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "generation.html", "generation.json", "generation.md",
    ]  # fmt: skip
    assert "| dense again | exact |" in generation_table(found)


def test_a_long_run_on_a_cpu_is_refused(model) -> None:
    request = GenerationRequest(out=Path(), pairs=10**6)
    with pytest.raises(TubeletError, match=r"would take about .* hours"):
        measure(request, model, "0", make_variants(24, torch.device("cpu")), lambda *a: None)


def test_numbers_out_of_range_are_refused(tmp_path) -> None:
    for wrong in ({"pairs": 0}, {"steps": 1}):
        with pytest.raises(TubeletError, match="must be at least"):
            run_generation(GenerationRequest(out=tmp_path, **wrong), lambda *a: None)
