"""The command line, run in process; exit codes and one-line errors."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tubelet.testing import tiny
from tubelet.video import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, loaded back by the real loading code."""
    path = tmp_path_factory.mktemp("host")
    tiny.build("videomae").save_pretrained(path)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def _refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_compare_writes_a_report_from_a_local_folder(run, folder, tmp_path) -> None:
    out = tmp_path / "new" / "out"
    code, text, _ = run(
        "compare", "sample", "--model", folder, "--recipe", "ToMe(r=8)", "--recipe",
        "RLT(threshold=0.1) + ToMe(r=4)", "--repeats", 1, "--dtype", "float32", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert "ToMe(r=8)" in text
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.json"]
    data = json.loads((out / "report.json").read_text())
    assert data["random_weights"] is False
    assert "random weights" not in (out / "report.html").read_text()
    assert [row["name"] for row in data["rows"]] == ["dense", "ToMe(r=8)", "RLT + ToMe(r=4)"]


def test_compare_takes_a_user_clip(run, folder, tmp_path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, torch.randint(0, 255, (12, 3, 48, 64), dtype=torch.uint8), 12.0)
    code, text, _ = run(
        "compare", clip, "--model", folder, "--recipe", "RandomDrop", "--repeats", 1,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["input"] == "clip.mp4, 8 frames of 32x32"


def test_the_preset_marks_its_random_weights() -> None:
    from tubelet.models.load import load_model

    loaded = load_model("videomae-small")
    assert loaded.random_weights
    assert loaded.model.config.hidden_size == 384
    again = load_model("videomae-small")
    first, second = (next(x.model.parameters()) for x in (loaded, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("command", ["methods", "models", "doctor"])
def test_listings_print_tables_and_json(run, command) -> None:
    code, text, _ = run(command)
    assert code == 0
    assert len(text.splitlines()) > 5
    code, text, _ = run(command, "--json")
    assert code == 0
    assert isinstance(json.loads(text), list)


def test_the_matrix_gives_reasons(run) -> None:
    _, text, _ = run("models", "--json")
    rows = {row["model"]: row for row in json.loads(text)}
    assert "class token" in rows["VideoMAE"]["recipes"]["ATS"]
    assert rows["VideoMAE"]["recipes"]["ToMe"] is None
    assert rows["TimeSformer, divided"]["presets"] == ["timesformer-base"]


def test_doctor_tells_which_kernels_take_block_lists(run) -> None:
    _, text, _ = run("doctor", "--json")
    found = {line["what"]: line["found"] for line in json.loads(text)}
    floats = "float32, float16, bfloat16"
    sizes = "block lists of 16, 32, 64, 128 tokens"
    assert found["attention flex on cpu"] == f"dense in {floats}; {sizes} in {floats}"
    assert found["attention cpu on cpu"].endswith(f"{sizes} in every dtype")
    assert "no block lists" in found["attention sdpa on cpu"]
    assert found["attention on cpu"] == (
        "dense: sdpa, flex, reference; block lists: cpu, flex, reference; "
        "causal block lists: cpu, flex, reference; 64 x 64 lists, heads of 64: cpu, flex, reference"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "Tome"], ["unknown recipe", "ToMe"]),
        (["--recipe", "ToMe(k=1)"], ["no field", "r"]),
        (["--recipe", "ToMe(r=-1)"], [">= 0"]),
        (["--recipe", "ToMe(r=__import__('os'))"], ["cannot read recipe"]),
        (["--recipe", "ATS"], ["ATS cannot run", "class token"]),
        (["--recipe", "ToMe(r=1) + ToMe(r=2)"], ["both decide"]),
        (["--model", "videomae-bas"], ["unknown model", "videomae-base"]),
        (["--device", "cuda:99"], ["not there"]),
        (["--device", "quantum"], ["device"]),
        (["--repeats", "0"], ["repeats"]),
        (["--dtype", "int3"], ["dtype"]),
        (["--bogus"], ["bogus"]),
    ],
)
def test_wrong_options_exit_2_with_one_line(run, folder, tmp_path, options, words) -> None:
    args = ["--model", folder, "--recipe", "ToMe(r=4)", "--out", tmp_path / "out"]
    _refused(run("compare", "sample", *args, *options), *words)
    assert not (tmp_path / "out").exists()


def _clip_of(kind: str, path: Path) -> Path:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "corrupt":
        path.write_bytes(os.urandom(5000))
    elif kind == "short":
        write_video(path, torch.zeros(3, 3, 16, 16, dtype=torch.uint8), 8.0)
    elif kind == "one frame":
        write_video(path, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 8.0)
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "corrupt", "short", "one frame"])
def test_bad_clips_exit_2_with_one_line(run, folder, tmp_path, kind) -> None:
    clip = _clip_of(kind, tmp_path / "bad.mp4")
    result = run("compare", clip, "--model", folder, "--recipe", "ToMe", "--out", tmp_path / "o")
    _refused(result, "bad.mp4")
    assert not (tmp_path / "o").exists()


def test_an_unwritable_folder_exits_2_before_the_model_runs(run, folder, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("compare", "sample", "--model", folder, "--recipe", "ToMe", "--out", blocked / "x")
    _refused(result, "cannot write")


def test_a_damaged_model_folder_exits_2(run, folder, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"not weights")
    _refused(run("compare", "sample", "--model", broken, "--out", tmp_path / "o"), "cannot load")


def test_a_failing_run_exits_1_with_one_line(run, folder, tmp_path, monkeypatch) -> None:
    def explode(*args: object, **named: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("tubelet.bench.run.compare", explode)
    code, _, err = run("compare", "sample", "--model", folder, "--out", tmp_path / "out")
    assert code == 1
    assert "out of luck" in err
    assert not (tmp_path / "out").exists()


def test_weights_missing_from_a_checkpoint_are_told(run, folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    weights = load_file(partial / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("classifier")}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    code, text, _ = run(
        "compare", "sample", "--model", partial, "--recipe", "ToMe", "--repeats", 1,
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert code == 0
    assert "2 weights are not in the checkpoint" in text


def test_a_rate_that_would_repeat_frames_is_refused(run, folder, tmp_path) -> None:
    args = ["--model", folder, "--recipe", "RLT", "--out", tmp_path / "o"]
    _refused(run("compare", "sample", "--rate", 100000, *args), "repeat frames")


def test_a_folder_in_place_of_a_report_is_refused_at_once(run, folder, tmp_path) -> None:
    (tmp_path / "report.html").mkdir()
    result = run("compare", "sample", "--model", folder, "--recipe", "ToMe", "--out", tmp_path)
    _refused(result, "report.html is a folder")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "options", [["--seed", 2**70], ["--model", "m" * 400], ["--out", "o" * 400]], ids=str
)
def test_absurd_options_exit_2(run, folder, tmp_path, options) -> None:
    args = ["--model", folder, "--recipe", "ToMe", "--out", tmp_path / "o", *options]
    _refused(run("compare", "sample", *args))


def test_the_version_is_printed(run) -> None:
    import tubelet

    assert run("--version") == (0, f"tubelet {tubelet.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": None},
        {"name": "videomae-small", "dtype": "bfloat16"},
        {"name": "videomae-small", "device": "bogus"},
        {"name": "videomae-small", "device": "cuda:77"},
        {"name": "videomae-small", "seed": 2**70},
        {"name": "/nonexistent/folder"},
        {"name": "a" * 5000},
    ],
    ids=str,
)
def test_load_model_names_what_is_wrong(arguments) -> None:
    from tubelet.core.errors import TubeletError
    from tubelet.models.load import load_model

    with pytest.raises(TubeletError):
        load_model(**arguments)
