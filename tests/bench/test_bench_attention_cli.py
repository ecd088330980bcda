"""`tubelet bench attention`, run in process at tiny sizes."""

import json

import pytest

from tubelet.bench.attention.result import Measured, read_runs
from tubelet.bench.attention.run import policies
from tubelet.core.errors import RecipeError, TubeletError
from tubelet.recipes import RandomBlocks, ToMe

POLICY = "RandomBlocks(density=0.4)"


def test_a_smoke_test_writes_figures_and_table(run, tmp_path):
    out = tmp_path / "new"
    code, text, err = run(
        "bench", "attention", "--quick", "--density", "0.5", "--block", "64x64", "--impl", "sdpa",
        "--impl", "cpu", "--recipe", POLICY, "--inputs", "structured", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == ["attention.json", "attention.md"]
    data = json.loads((out / "attention.json").read_text())
    assert data["kind"] == "tubelet attention"
    (found,) = data["runs"]
    kinds = [(case["kind"], case["impl"]) for case in found["cases"]]
    assert kinds[:2] == [("dense", "sdpa"), ("lists", "cpu")]
    assert [kind for kind, _ in kinds[2:]] == ["policy"]
    assert found["cases"][2]["recall"] < 1
    assert {entry["name"] for entry in found["skipped"]} == {"cpu dense", "sdpa 64x64 at 0.5"}
    assert found["environment"]["command"]
    assert found["shapes"][0]["tokens"] == 709
    assert "smoke test" in text
    assert POLICY in text
    assert "over SDPA" in (out / "attention.md").read_text()


def test_files_come_back_and_join(run, tmp_path):
    for number in (1, 2):
        code, _, err = run(
            "bench", "attention", "--shape", "tiny", "--shape", "tiny", "--heads", 1 + number,
            "--no-policies", "--impl", "sdpa", "--impl", "cpu", "--block", "64x64", "--density",
            "0.5", "--repeats", 1, "--out", tmp_path / str(number),
        )  # fmt: skip
        assert code == 0, err
    files = [tmp_path / str(number) / "attention.json" for number in (1, 2)]
    code, text, err = run(
        "bench", "attention", "--join", files[0], "--join", files[1], "--out", tmp_path / "both"
    )
    assert code == 0, err
    runs = read_runs(tmp_path / "both" / "attention.json")
    assert [part.shapes[0]["heads"] for part in runs] == [2, 3]
    assert runs[0] == read_runs(files[0])[0]
    assert runs[0].cases[1].block == (64, 64)
    assert all(isinstance(case, Measured) for part in runs for case in part.cases)
    assert "tiny: 709 tokens, 3 heads x 32" in text


def test_json_holds_every_case(run, tmp_path):
    code, text, err = run(
        "bench", "attention", "--quick", "--no-policies", "--impl", "sdpa", "--json", "--out",
        tmp_path,
    )  # fmt: skip
    assert code == 0, err
    (found,) = json.loads(text)
    assert [case["kind"] for case in found["cases"]] == ["dense"]
    assert len(found["skipped"]) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "wan"], ["unknown shape 'wan'", "wan-720p"]),
        (["--impl", "fa5"], ["'fa5'", "sdpa"]),
        (["--recipe", "ToMe(r=8)"], ["no sparse attention"]),
        (["--recipe", "Nothing"], ["unknown recipe"]),
        (["--density", "0"], ["(0, 1]"]),
        (["--density", "half"], ["--density", "numbers"]),
        (["--policy-density", "1.5"], ["density"]),
        (["--block", "64"], ["--block", "128x64"]),
        (["--block", "0x64"], ["positive"]),
        (["--inputs", "smooth"], ["'smooth'", "structured"]),
        (["--shard", "2/1"], ["1 <= i <= n"]),
        (["--shard", "3/9", "--quick"], ["has no shape"]),
        (["--no-kernels", "--no-policies"], ["nothing to measure"]),
        (["--device", "quantum"], ["device"]),
        (["--join", "missing.json"], ["cannot read"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(run, tmp_path, options, words):
    code, _, err = run("bench", "attention", "--out", tmp_path / "out", *options)
    assert code == 2, err
    assert all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"kind": "tubelet fidelity", "schema": 1, "runs": []}')
    with pytest.raises(TubeletError, match="not a result"):
        read_runs(path)


def test_policies_without_names_are_all_that_have_a_density():
    found = [recipe for recipe in policies((), 0.1) if recipe.stage != "prefill"]
    assert {recipe.density for recipe in found} == {0.1}
    assert RandomBlocks(density=0.1) in found
    assert policies((POLICY,), 0.1) == [RandomBlocks(density=0.4)]
    with pytest.raises(RecipeError, match="tokens"):
        policies((str(ToMe()),), 0.1)
