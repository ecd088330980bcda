"""`tubelet bench llm`: files, refusals, runs cut off, joining."""

import json
from dataclasses import replace

import pytest
import torch

from tubelet.bench.llm import run as llm_run
from tubelet.bench.llm.page import render
from tubelet.bench.llm.result import LLMRun, Row, Throughput, merged, read_runs
from tubelet.bench.llm.run import FILES, default_combinations
from tubelet.bench.llm.table import cells, headers, markdown
from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.models.llm_presets import llm_preset
from tubelet.video import write_video

QUICK = ("bench", "llm", "--quick", "--dtype", "float32", "--new-tokens", 2, "--concurrency", 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> LLMRun:
    """A whole run with a control, a refused recipe and a combination."""
    out = tmp_path_factory.mktemp("llm")
    request = llm_run.Request(
        out=out,
        quick=True,
        dtype="float32",
        concurrencies=(1, 2),
        recipes=("RandomPrompt(keep_ratio=0.25)", "FastV(layer=1)", "EVS + FastV(layer=3)"),
    )
    (run,) = llm_run.run_llm(request, lambda *what: None, lambda words: None)
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    assert read_runs(out / "llm.json") == [run]
    return run


def refused(result, *words):
    code, _, err = result
    assert code == 2, err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_run_holds_dense_and_every_recipe(found):
    names = ["dense", "RandomPrompt(keep_ratio=0.25)", "FastV(layer=1)", "EVS + FastV(layer=3)"]
    assert [row.name for row in found.rows] == names
    assert [row.error is None for row in found.rows] == [True, True, False, True]
    both = found.rows[3]
    assert both.kept.entering == pytest.approx(39 / 128)
    assert both.kept.layers < both.kept.entering
    assert found.model == "tiny-qwen3-vl"
    assert found.quick
    assert found.notes[0].startswith("a smoke test")
    assert found.attention == {
        "text": "sdpa",
        "vision": "sdpa; fused: frames packed, patch embedding",
    }


def test_table_and_page_tell_what_was_not_measured(found):
    shown, page = markdown([found]), render([found])
    for text in (shown, page):
        assert "FastV(layer=1)" in text
        assert "from layer 2 on" in text
        assert "random weights" in text
    assert len({len(cells(row, found)) for row in found.rows}) == 1
    assert shown.count("\n| ") == 1 + sum(row.error is None for row in found.rows)
    # No sparse prefill was measured.
    assert "| kept |" in shown
    assert "density" not in shown
    assert "<script" not in page
    assert "http" not in page
    # A bar for each row that was measured, and the bound of each recipe.
    assert page.count('class="llm" x=') == 3
    assert page.count('class="expected"') == 2


def test_the_share_of_the_bound_is_shown(found):
    row = found.rows[1]
    texts = dict(zip(headers(found), cells(row, found), strict=True))
    assert texts["of bound"] == f"{row.speedup / row.bound:.0%}"
    assert texts["kept"] == "25.0%"
    assert texts["2 at once"].endswith(f"({row.throughput[1].over_dense:.2f}x)")


def test_command_prints_bounds_first(run, tmp_path):
    out = tmp_path / "new" / "folder"
    code, text, _ = run(*QUICK, "--recipe", "UniformFrames(keep_ratio=0.25)", "--out", out)
    assert code == 0
    assert text.index("at most") < text.index("measured") < text.index("llm.html")
    data = json.loads((out / "llm.json").read_text())
    assert data["kind"] == "tubelet llm"
    environment = data["runs"][0]["environment"]
    assert {"command", "commit", "hardware", "versions"} <= environment.keys()


def test_a_clip_is_read_and_its_time_told(run, tmp_path):
    clip = tmp_path / "clip.mp4"
    write_video(clip, torch.randint(0, 255, (20, 3, 48, 64), dtype=torch.uint8), 12.0)
    code, text, _ = run(
        *QUICK, "--preset", "tiny-llava-onevision", "--clip", clip, "--recipe",
        "RandomPrompt(keep_ratio=0.5)", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    (data,) = json.loads(text)
    assert data["decode_video"] > 0
    assert data["input"] == "clip.mp4, 8 frames of 32x32"
    assert data["attention"]["vision"] == "sdpa; fused: pooling as a matrix product"


@pytest.mark.parametrize("vision", ["fused", "host", "unsupported"])
def test_the_vision_tower_is_fused_for_all_rows_where_it_can_be(monkeypatch, tmp_path, vision):
    seen, parts = [], []

    def row(self, *recipes):
        parts.append(self.model.model.visual.patch_embed)
        seen.append("forward" in vars(parts[0]))
        return Row(name="a row", bound=1.0)

    def refuse(model):
        raise UnsupportedError("Host has no vision tower")

    monkeypatch.setattr(llm_run.LLMBench, "dense", row)
    monkeypatch.setattr(llm_run.LLMBench, "attempt", row)
    monkeypatch.setattr(llm_run, "_without_effect", lambda row: False)
    monkeypatch.setattr(llm_run, "render", lambda runs: "")
    if vision == "unsupported":
        monkeypatch.setattr(llm_run, "fuse_vision", refuse)
    chosen = "host" if vision == "host" else "fused"
    request = llm_run.Request(out=tmp_path, quick=True, dtype="float32", vision=chosen)
    (run,) = llm_run.run_llm(request, lambda *what: None, lambda words: None)
    assert seen == [vision == "fused"] * 3
    assert "forward" not in vars(parts[0])
    assert ("fused" in run.attention["vision"]) == (vision == "fused")
    notes = [note for note in run.notes if "vision tower runs as the host has it" in note]
    assert len(notes) == (vision == "unsupported")


def test_a_run_cut_off_keeps_what_it_has(monkeypatch, tmp_path):
    attempt = llm_run.LLMBench.attempt

    def stopped(self, recipes):
        if recipes[0].name == "UniformFrames":
            raise KeyboardInterrupt
        return attempt(self, recipes)

    monkeypatch.setattr(llm_run.LLMBench, "attempt", stopped)
    request = llm_run.Request(out=tmp_path, quick=True, dtype="float32", concurrencies=(1,))
    with pytest.raises(KeyboardInterrupt):
        llm_run.run_llm(request, lambda *what: None, lambda words: None)
    (run,) = read_runs(tmp_path / "llm.json")
    assert [row.name for row in run.rows] == ["dense", "RandomPrompt(keep_ratio=0.25)"]
    assert "RandomPrompt" in (tmp_path / "llm.html").read_text()


def test_shards_share_the_recipes_and_join(monkeypatch, run, tmp_path):
    monkeypatch.setattr(llm_run.LLMBench, "dense", lambda self: Row(name="dense", bound=1.0))
    monkeypatch.setattr(
        llm_run.LLMBench, "attempt", lambda self, recipes: Row(name=str(recipes[0]))
    )
    monkeypatch.setattr(llm_run, "_without_effect", lambda row: False)
    monkeypatch.setattr(llm_run, "render", lambda runs: "")
    files = []
    for part in (1, 2):
        out = tmp_path / str(part)
        request = llm_run.Request(out=out, preset="tiny-qwen3-vl", shard=(part, 2))
        llm_run.run_llm(request, lambda *what: None, lambda words: None)
        files.append(out / "llm.json")
    joined = llm_run.join_files(files, tmp_path / "both")
    (whole,) = joined
    assert [row.name for row in whole.rows].count("dense") == 1
    assert whole.dense.name == "dense"
    seen = [row.name for row in whole.rows[1:]]
    assert sorted(seen) == sorted(str(c[0]) for c in default_combinations(0.25))
    assert "2 processes" in whole.notes[-1]
    assert read_runs(tmp_path / "both" / "llm.json") == joined


@pytest.mark.parametrize("change", ["seed", "commit", "concurrency"])
def test_runs_of_other_settings_stay_apart(monkeypatch, tmp_path, change):
    monkeypatch.setattr(llm_run.LLMBench, "dense", lambda self: Row(name="dense", bound=1.0))
    monkeypatch.setattr(llm_run.LLMBench, "attempt", lambda self, r: Row(name=str(r[0])))
    monkeypatch.setattr(llm_run, "_without_effect", lambda row: False)
    monkeypatch.setattr(llm_run, "render", lambda runs: "")
    request = llm_run.Request(out=tmp_path, quick=True, dtype="float32")
    runs = [llm_run.run_llm(request, lambda *w: None, lambda w: None)[0] for _ in range(2)]
    if change == "seed":
        runs[1] = replace(runs[1], seed=1)
    elif change == "commit":
        runs[1].environment["commit"] = "another"
    else:
        runs[1].dense.throughput.append(Throughput(concurrency=8))
    assert merged(runs) == runs


def test_controls_come_first_at_the_ratio_that_was_asked_for():
    names = [recipe.name for (recipe,) in default_combinations(0.4)]
    assert names[:2] == ["RandomPrompt", "UniformFrames"]
    assert {"VidCom2", "DivPrune", "FastV"} <= set(names)
    assert all(recipe.keep_ratio == 0.4 for (recipe,) in default_combinations(0.4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "VidCom"], ["unknown recipe", "VidCom2"]),
        (["--recipe", "EVS", "--recipe", "EVS"], ["given twice"]),
        (["--preset", "qwen"], ["neither a preset", "qwen3-vl-8b"]),
        (["--grid", "8x8"], ["--grid", "64x16x16"]),
        (["--grid", "0x4x4"], ["--grid"]),
        (["--preset", "tiny-llava-onevision", "--grid", "4x3x4"], ["4x4 tokens"]),
        (["--keep", "0"], ["--keep"]),
        (["--question", "1"], ["question"]),
        (["--concurrency", "0"], ["--concurrency"]),
        (["--vision", "fast"], ["fused or host"]),
        (["--dtype", "int3"], ["dtype"]),
        (["--layers", "9"], ["4 layers"]),
        (["--shard", "9/9"], ["no recipe"]),
        (["--device", "cuda:99"], ["not there"]),
        (["--clip", "missing.mp4"], ["missing.mp4"]),
    ],
    ids=str,
)
def test_wrong_options_exit_2_and_write_nothing(run, tmp_path, options, words):
    refused(run(*QUICK, "--out", tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists()


def test_a_run_without_any_figure_fails(run, tmp_path):
    refused(
        run(*QUICK, "--recipe", "FastV(layer=1)", "--out", tmp_path / "out"),
        "no recipe was measured",
    )
    # What stopped it is kept.
    assert "from layer 2 on" in (tmp_path / "out" / "llm.md").read_text()


def test_files_that_are_no_results_are_refused(run, tmp_path):
    wrong = tmp_path / "x.json"
    wrong.write_text('{"kind": "other", "schema": 1}')
    refused(run("bench", "llm", "--join", wrong, "--out", tmp_path / "out"), "is not a result")


def test_a_local_folder_takes_the_place_of_a_preset(run, tmp_path):
    folder = tmp_path / "model"
    llm_preset("tiny-qwen2.5-vl").build(dtype=torch.float32).save_pretrained(folder)
    code, text, _ = run(
        *QUICK, "--preset", folder, "--grid", "4x2x2", "--recipe", "RandomPrompt", "--out",
        tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    (data,) = json.loads(text)
    assert (data["model"], data["random_weights"]) == ("model", False)
    assert data["video_tokens"] == 16


def test_compare_measures_language_models_on_a_clip(run, tmp_path):
    clip = torch.randint(0, 255, (20, 3, 48, 64), dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", clip, 8)
    recipe, out = "VidCom2 + FastV(layer=3)", tmp_path / "out"
    options = ("--dtype", "float32", "--repeats", 1, "--seed", 2**63 - 1, "--out", out, "--json")
    code, text, err = run(
        "compare", tmp_path / "a.mp4", "--model", "tiny-qwen3-vl", "--recipe", recipe, *options
    )
    assert code == 0, err
    (data,) = json.loads(text)
    assert data["input"].startswith("a.mp4")
    assert data["decode_video"] > 0
    assert [row["name"] for row in data["rows"]] == ["dense", recipe]
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("sample", "--model", "tubelet-llm"), ("tubelet ask", "bench answers")),
        (("sample", "--model", "tiny-qwen3-vl", "--batch", 2), ("cannot be used", "--batch")),
        (("nowhere.mp4", "--model", "tiny-qwen3-vl"), ("no such file",)),
    ],
)
def test_what_compare_cannot_do_for_language_models_is_refused(run, tmp_path, options, words):
    out = tmp_path / "out"
    refused(run("compare", *options, "--out", out), *words)
    assert not out.exists()


def test_a_ratio_beyond_a_recipe_is_told_before_anything_runs():
    with pytest.raises(RecipeError):
        default_combinations(1.5)
