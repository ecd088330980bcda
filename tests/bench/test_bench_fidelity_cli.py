"""`tubelet bench`, run in process with tiny models."""

import json

import pytest
import torch

from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Path of tiny untrained weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny"
    torch.manual_seed(0)
    model = VideoViT(VideoViTConfig(width=16, depth=3, heads=2))
    save_weights(path, model, record={})
    return path


@pytest.fixture
def run(run):
    """Run `tubelet bench ARGS`; returns (exit code, stdout, stderr)."""
    return lambda *args: run("bench", *args)


def test_a_smoke_test_writes_page_figures_and_table(run, weights, tmp_path) -> None:
    out = tmp_path / "new"
    code, text, err = run(
        "fidelity", "--quick", "--model", weights, "--small", weights, "--clips", 4, "--tasks",
        "direction", "--backgrounds", "static", "--recipes", "RLT", "--keep", "1,0.5",
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == [
        "fidelity.html", "fidelity.json", "fidelity.md",
    ]  # fmt: skip
    data = json.loads((out / "fidelity.json").read_text())
    entries = data["runs"][0]["cells"][0]["entries"]
    for variant in ("dense", "RandomDrop 0.5", "oracle 0.5", "fewer frames 0.5",
                    "lower resolution 0.5", "UniformPool 0.5", "RLT at 0.2", "single frame",
                    "regression on the mean frame"):  # fmt: skip
        assert variant in entries, variant
    assert all(0 < entry["share"] <= 1 for n, entry in entries.items() if "regression" not in n)
    assert {x["batch"] for x in data["runs"][0]["latencies"]} == {1}
    assert data["runs"][0]["models"][0]["sha256"]
    assert "smoke test" in text
    code, _, err = run("fidelity", "--join", out / "fidelity.json", "--out", tmp_path / "joined")
    assert code == 0, err
    joined = (tmp_path / "joined" / "fidelity.md").read_text()
    assert joined == (out / "fidelity.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "juggling"], ["unknown task 'juggling'", "direction"]),
        (["--backgrounds", "sky"], ["unknown background 'sky'", "pan"]),
        (["--recipes", "Tome"], ["'Tome'", "ToMe"]),
        (["--keep", "0.0001"], ["rounds to none", "0.002"]),
        (["--keep", "2"], ["(0, 1]"]),
        (["--keep", "half"], ["numbers"]),
        (["--shard", "3"], ["i/n"]),
        (["--shard", "3/2"], ["1 <= i <= n"]),
        (["--shard", "99/99"], ["has no cell"]),
        (["--model", "nothing"], ["no weights 'nothing'"]),
        (["--device", "quantum"], ["device"]),
        (["--clips", "100000"], ["would take about", "hours", "--yes"]),
        (["--join", "none.json"], ["cannot read"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, weights, tmp_path, options, words) -> None:
    out = tmp_path / "out"
    code, _, err = run("fidelity", "--model", weights, "--out", out, *options)
    assert code == 2, err
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not out.exists()


def test_a_changed_checkpoint_is_refused(run, weights, tmp_path) -> None:
    broken = tmp_path / "broken"
    for suffix in (".json", ".safetensors"):
        data = bytearray(weights.with_suffix(suffix).read_bytes())
        if suffix == ".safetensors":
            data[-1] ^= 1
        broken.with_suffix(suffix).write_bytes(data)
    code, _, err = run("fidelity", "--quick", "--model", broken, "--out", tmp_path / "o")
    assert code == 2
    assert "checksum" in err


def test_a_folder_that_cannot_be_written_is_refused_first(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for command in ("fidelity", "generation"):
        # The model does not exist either; the folder is looked at before.
        code, _, err = run(command, "--model", "nothing", "--out", tmp_path / "file" / "x")
        assert code == 2
        assert "cannot write" in err


def test_an_encoder_without_reducers_is_no_trained_host(run, weights, tmp_path) -> None:
    code, _, err = run(
        "fidelity", "--quick", "--model", weights, "--trained", weights, "--out", tmp_path / "o"
    )
    assert code == 2
    assert "no trained reducers" in err
