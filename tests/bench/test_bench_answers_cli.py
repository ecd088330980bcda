"""`tubelet bench answers`: a whole small run, shards, refusals."""

import json
from dataclasses import replace

import pytest
import torch

from tubelet.bench.answers import quiz
from tubelet.bench.answers import run as answers_run
from tubelet.bench.answers.result import read_answers
from tubelet.bench.answers.run import FILES, Request, checked_parts, join_files, run_answers
from tubelet.core.errors import TubeletError
from tubelet.nn.video_llm import VideoLLM, VideoLLMConfig
from tubelet.nn.weights import save_weights
from tubelet.train.clips import TEST_SEED
from tubelet.train.questions import words

ANSWERS = ("bench", "answers", "--quick")


def silent(*what: object) -> None:
    pass


@pytest.fixture
def model(tmp_path_factory) -> str:
    """A file of weights that answer yes or no, and so are right now and then."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(4)
    llm = VideoLLM(VideoLLMConfig(words=words(), **answers_run.QUICK_MODEL))
    with torch.no_grad():
        yes, no = llm.tokenizer.convert_tokens_to_ids(["yes", "no"])
        llm.host.lm_head.weight.zero_()
        llm.host.lm_head.weight[yes].normal_()
        llm.host.lm_head.weight[no] = -llm.host.lm_head.weight[yes]
    save_weights(folder / "small", llm, record={})
    return str(folder / "small")


def test_a_quick_run_writes_its_files(run, tmp_path):
    code, text, _ = run(*ANSWERS, "--out", tmp_path)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    found = read_answers(tmp_path / "answers.json")
    assert found.quick
    assert found.complete
    assert (found.backgrounds, found.kinds) == (["static", "noise"], ["colour", "hit"])
    assert found.failures == {}
    assert found.first_seed == TEST_SEED
    assert {"command", "commit", "hardware", "versions"} <= found.environment.keys()
    for cell in found.cells:
        assert list(cell.entries) == list(found.variants)
        assert {entry.right.shape for entry in cell.entries.values()} == {(2, 4)}
    families = {line.family for line in found.variants.values()}
    assert {"dense", "RandomPrompt", "VidCom2", "HoliTom + HoliTomInner", "ZipCache"} <= families
    used = found.cells[0].entries["VidCom2 0.25"].used
    assert (used.entering, used.layers) == pytest.approx((0.25, 0.25))
    assert "smoke test" in text
    assert "answers.html" in text
    page = (tmp_path / "answers.html").read_text()
    assert "VidCom2" in page
    assert "<script" not in page


def test_json_holds_the_figures(run, tmp_path, model):
    code, text, _ = run(
        *ANSWERS, "--model", model, "--recipes", "EVS", "--kinds", "hit", "--backgrounds", "pan",
        "--keep", "0.5", "--clips", 2, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(text)
    assert {row["background"] for row in rows} == {"pan"}
    assert [row["variant"] for row in rows if row["family"] == "EVS"] == ["EVS 0.5"]
    assert rows[0]["difference"]["value"] == 0
    assert len(read_answers(tmp_path / "answers.json").model["sha256"]) == 64


def test_shards_join_into_the_whole_run(tmp_path, model, monkeypatch):
    monkeypatch.setattr(answers_run, "quick", lambda request: request)
    for module in (answers_run, quiz):
        monkeypatch.setattr(module, "PART", 4)
    request = Request(
        out=tmp_path / "whole",
        model=model,
        kinds=("hit", "exists"),
        backgrounds=("static", "pan"),
        recipes=("EVS", "LLaVAScissor"),
        keeps=(0.25,),
        clips=6,
        quick=True,
    )
    whole = run_answers(request, silent)
    files = []
    for part in (1, 2, 3):
        out = tmp_path / str(part)
        run_answers(replace(request, out=out, shard=(part, 3)), silent)
        files.append(out / "answers.json")
    joined = join_files(files, tmp_path / "joined")
    assert joined.complete
    assert whole.variants == joined.variants
    for cell in whole.cells:
        other = joined.cell(cell.background)
        assert sorted(other.parts) == [0, 1]
        for name, entry in cell.entries.items():
            # Parts may stand in another order.
            assert entry.right.shape == other.entries[name].right.shape == (2, 6)
            assert torch.equal(entry.right.sum(1), other.entries[name].right.sum(1))
            assert entry.used.layers == pytest.approx(other.entries[name].used.layers)
    answered = torch.stack([cell.entries["dense"].right for cell in whole.cells])
    assert 0 < answered.mean() < 1
    with pytest.raises(TubeletError, match="in two files"):
        join_files([files[0], files[0]], tmp_path / "twice")


def test_a_variant_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    asked, seen = answers_run.ask, []

    def fails(llm, prompts, recipes):
        if [recipe.name for recipe in recipes] == ["EVS"] and not seen:
            seen.append(1)
            raise RuntimeError("out of\nmemory")
        return asked(llm, prompts, recipes)

    monkeypatch.setattr(answers_run, "ask", fails)
    request = Request(out=tmp_path, recipes=("EVS", "VidCom2"), keeps=(0.5,), clips=2, quick=True)
    found = run_answers(request, silent)
    assert found.failures == {"EVS 0.5": "RuntimeError: out of memory"}
    assert "VidCom2 0.5" in found.cells[0].entries
    # It is not tried again on other questions.
    assert all("EVS 0.5" not in cell.entries for cell in found.cells)
    assert "not measured: EVS at 0.5: RuntimeError" in (tmp_path / "answers.md").read_text()


def test_a_run_cut_off_keeps_the_parts_it_has(tmp_path, monkeypatch):
    drawn = answers_run.draw_quiz

    def stopped(llm, kinds, background, *rest):
        if background == "noise":
            raise KeyboardInterrupt
        return drawn(llm, kinds, background, *rest)

    monkeypatch.setattr(answers_run, "draw_quiz", stopped)
    request = Request(out=tmp_path, recipes=("EVS",), keeps=(0.5,), clips=2, quick=True)
    with pytest.raises(KeyboardInterrupt):
        run_answers(request, silent)
    found = read_answers(tmp_path / "answers.json")
    assert found.backgrounds == ["static"]
    assert not found.complete
    assert "EVS 0.5" in found.cells[0].entries


def test_parts_are_shared_out():
    request = Request(out=None, clips=40, backgrounds=("static", "pan"))
    whole = checked_parts(request)
    assert whole == [(name, part) for name in ("static", "pan") for part in range(3)]
    shards = [checked_parts(replace(request, shard=(i, 4))) for i in (1, 2, 3, 4)]
    assert sorted(pair for shard in shards for pair in shard) == sorted(whole)


def test_long_runs_on_a_cpu_want_a_yes(tmp_path, model, monkeypatch):
    monkeypatch.setattr(answers_run, "PATIENCE", 0)
    request = Request(out=tmp_path, model=model, recipes=("EVS",), kinds=("hit",), clips=1)
    with pytest.raises(TubeletError, match=r"would take .* confirm with --yes"):
        run_answers(request, silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--recipes", "ToMe"], ["'ToMe'", "VidCom2"]),
        (["--kinds", "smell"], ["kind of question 'smell'", "colour"]),
        (["--kinds", "hit,hit"], ["once"]),
        (["--backgrounds", "snow"], ["background 'snow'", "static"]),
        (["--shard", "3/2"], ["1 <= i <= n"]),
        (["--shard", "9/9"], ["nothing to ask", "2 parts"]),
        (["--shard", "one"], ["--shard takes i/n"]),
        (["--keep", "0"], ["(0, 1]"]),
        (["--keep", "1"], ["below 1"]),
        (["--keep", "much"], ["--keep takes numbers"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--model", "tubelet-vit-small"], ["VideoViT", "VideoLLM"]),
        (["--device", "cuda:99"], ["not there"]),
        (["--join", "missing.json"], ["cannot read missing.json"]),
    ],
    ids=str,
)
def test_wrong_options_exit_2_and_write_nothing(run, tmp_path, options, told):
    code, _, err = run(*ANSWERS, "--out", tmp_path / "out", *options)
    assert code == 2, err
    assert err.count("\n") == 1
    for word in told:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(run, tmp_path):
    wrong = tmp_path / "x.json"
    wrong.write_text('{"kind": "tubelet llm", "schema": 1}')
    code, _, err = run("bench", "answers", "--join", wrong, "--out", tmp_path / "out")
    assert code == 2
    assert "is not a result of `tubelet bench answers`" in err
