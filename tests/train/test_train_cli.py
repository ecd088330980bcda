"""`tubelet train`."""

import json

import pytest
import torch

from tubelet.train.jobs import jobs


def options(out, *more: object) -> tuple[object, ...]:
    fixed = ("--quick", "--device", "cpu", "--steps", 1, "--batch", 1, "--size", 32, "--seed", 3)
    return ("train", "mask", *fixed, "--out", out, *more)


def test_the_list_shows_every_job(run):
    code, text, _ = run("train", "--list")
    assert code == 0
    assert all(name in text for name in jobs())
    code, text, _ = run("train", "--list", "--json")
    assert code == 0
    rows = json.loads(text)
    assert [row["name"] for row in rows] == list(jobs())
    assert all(row["summary"] and row["minutes"] > 0 for row in rows)


def test_a_run_prints_its_scores_and_files(run, tmp_path):
    code, text, err = run(*options(tmp_path / "out"))
    assert code == 0
    assert err == ""
    assert "mask after 1 steps" in text
    assert "mask/static" in text
    assert f"wrote {tmp_path / 'out' / 'encoder-mask.safetensors'}" in text
    card = json.loads((tmp_path / "out" / "encoder-mask.json").read_text())
    assert card["record"]["command"].startswith("tubelet train mask --quick --device cpu --steps 1")


def test_json_is_all_that_is_printed(run, tmp_path):
    code, text, err = run(*options(tmp_path, "--json"))
    assert (code, err) == (0, "")
    told = json.loads(text)
    assert told["steps"] == 1
    assert set(told["scores"]) == {"mask/static", "mask/noise", "mask/pan"}
    assert told["files"] == [str(tmp_path / n) for n in ("encoder-mask.safetensors", "log.jsonl")]


def test_a_second_run_in_a_folder_needs_resume(run, tmp_path):
    assert run(*options(tmp_path))[0] == 0
    code, _, err = run(*options(tmp_path))
    assert code == 2
    assert "already holds a run" in err
    assert err.count("\n") == 1
    assert run(*options(tmp_path, "--resume"))[0] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("encodr",), "did you mean encoder"),
        (("encoder", "--device", "cpu"), "add --quick"),
        (("encoder", "--device", "quantum"), "device"),
        (("encoder", "--quick", "--device", "cpu", "--init", "nowhere"), "no weights"),
        (("encoder", "--quick", "--device", "cpu", "--init", "tubelet-dit"), "wanted a VideoViT"),
        (("encoder", "--quick", "--device", "cpu", "--init", "tubelet-vit"), "another shape"),
        (("mask", "--quick", "--device", "cpu", "--steps", 1, "--minutes", 1), "either minutes"),
        (("mask", "--steps", 0), "steps"),
        (("mask", "--size", 8), "size"),
        (("mask", "--batch", 0), "batch"),
        (("mask", "--bogus"), "bogus"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, text, err = run("train", *args)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1, err
    assert text == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_default_says_what_to_add(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train")
    assert code == 2
    assert "--device cpu --quick" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
