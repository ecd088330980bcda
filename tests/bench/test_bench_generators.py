"""`tubelet compare` on a generator: a tiny network with random weights, saved and loaded back."""

import json
import re

import pytest
import torch

from tubelet.bench.generators import page
from tubelet.bench.generators import run as generators
from tubelet.bench.generators.page import FILES
from tubelet.bench.generators.result import Row
from tubelet.bench.generators.run import PROMPT, GeneratorRequest, is_generator, run_generators
from tubelet.core.errors import ModelError, UnsupportedError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.flow import generate
from tubelet.nn.weights import load_weights, save_weights
from tubelet.train.world import parse_attributes
from tubelet.video import read_clip

STEPS, LAYERS, HEADS = 5, 3, 2
SIDE, FRAMES = 32, 8
SPARSE = "SubBlock(density=0.3, block=(32, 32), dense_steps=0.2) + ZerothOrder"
CONTROL = "RandomBlocks(density=0.5, block=(32, 32), dense_layers=1)"
WHOLE = "RandomBlocks(density=1.0, block=(32, 32))"


def saved(folder, name: str = "dit", **changes) -> str:
    torch.manual_seed(0)
    config = {"width": 32, "depth": LAYERS, "heads": HEADS, "frames": FRAMES, "size": (SIDE, SIDE)}
    network = VideoDiT(VideoDiTConfig(**(config | changes)))
    for weight in network.parameters():
        # A new model draws grey, whatever its attention does.
        torch.nn.init.normal_(weight, std=0.1)
    save_weights(folder / name, network, record={})
    return str(folder / name)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A comparison, its folder, and all that was told in order."""
    out, told = tmp_path_factory.mktemp("compared") / "new" / "out", []
    request = GeneratorRequest(
        prompt=PROMPT, model=model, out=out, recipes=(WHOLE, SPARSE, CONTROL), steps=STEPS, seed=3
    )
    found = run_generators(
        request, lambda what, *numbers: told.append(what), lambda words: told.append(words)
    )
    return found, out, told


def test_the_folder_holds_report_page_video_and_sheet(done) -> None:
    found, out, _ = done
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    data = json.loads((out / "report.json").read_text())
    assert data["prompt"] == PROMPT
    assert data["rows"][0]["name"] == "dense"
    assert data["rows"] == json.loads(json.dumps(found.to_dict()["rows"]))
    cell = 2 * SIDE + 4
    video = read_clip(out / "compare.mp4", num_frames=FRAMES).frames
    assert video.shape == (FRAMES, 3, 2 * cell, 2 * cell)


def test_the_sheet_shows_the_dense_clip_first(done, model) -> None:
    found, out, _ = done
    sheet = read_clip(out / "sheet.png", num_frames=1).frames[0]
    cell = SIDE + 4
    assert sheet.shape == (3, len(found.rows) * cell, FRAMES * cell)
    asked = parse_attributes(PROMPT)[None]
    clip = generate(load_weights(model), asked, seed=3, steps=STEPS, guidance=1.0)[0]
    for frame in (0, FRAMES - 1):
        shown = sheet[:, :SIDE, frame * cell : frame * cell + SIDE]
        assert torch.equal(shown, clip[frame].mul(255).round().to(torch.uint8))


def test_figures_are_against_the_dense_clip_of_the_same_noise(done) -> None:
    dense, whole, sparse, control = done[0].rows
    assert (dense.psnr, dense.ssim, dense.latent_error) == (100.0, 1.0, [0.0] * STEPS)
    # A fifth of five steps is dense; afterwards errors grow.
    assert sparse.latent_error[0] == 0.0
    assert 0 < sparse.latent_error[1] < sparse.latent_error[-1]
    assert control.latent_error[0] > 0
    assert control.psnr < whole.psnr
    assert max(whole.latent_error) < 1e-5
    assert 0 <= dense.attributes <= 1


def test_densities_are_kept_by_layer_step_and_head(done) -> None:
    dense, whole, sparse, control = done[0].rows
    assert dense.densities == []
    assert [len(layer) for layer in sparse.by_step] == [STEPS] * LAYERS
    assert [layer[0] for layer in sparse.by_step] == [None] * LAYERS
    assert control.by_step[0] == [None] * STEPS
    assert control.by_head[0] == [None] * HEADS
    assert control.density == pytest.approx(0.5)
    assert (control.dense_calls, control.computed) == (STEPS, pytest.approx(2 / 3))
    assert whole.density == whole.computed == 1.0
    assert sparse.fallbacks == {"SubBlock: dense while warming up": LAYERS}


def test_sparse_calls_are_verified(done) -> None:
    dense, whole, sparse, control = done[0].rows
    assert dense.error is None
    assert whole.error < 1e-5
    assert whole.recall == pytest.approx(1.0, abs=1e-4)
    assert 0 < control.error <= control.worst_error
    assert 0.3 < control.recall < 0.7
    assert sparse.worst_error >= sparse.error > whole.error
    # What approximation counts is no recall.
    assert sparse.recall is None


def test_the_time_is_split_and_adds_up(done) -> None:
    for row in done[0].rows:
        assert len(row.step_seconds) == STEPS
        assert 0 < row.attention_seconds < sum(row.step_seconds) <= row.seconds


def test_predictions_are_told_before_any_run(done) -> None:
    found, _, told = done
    predicted = [i for i, words in enumerate(told) if ": predicted: " in words]
    drawing = [i for i, words in enumerate(told) if words.startswith("drawing")]
    assert len(predicted) == 3
    assert max(predicted) < min(drawing)
    for row in found.rows[1:]:
        assert row.prediction["by_density"] <= row.prediction["limit"]
    assert found.rows[2].prediction["dense_calls"] == pytest.approx(1 / STEPS)
    assert found.rows[3].prediction["density"] == pytest.approx(0.5)


def test_the_page_stands_alone(done) -> None:
    text = (done[1] / "report.html").read_text()
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    assert re.findall(r'src="(?!data:)', text) == []
    # Three maps by step, two of which have a map by head, bars and curves.
    assert text.count("<svg") == 3 * 2 + 2
    assert text.count("data:video/mp4") == 1
    assert text.count("data:image/jpeg") == 4 * FRAMES
    assert "SubBlock(block=(32, 32), density=0.3) + ZerothOrder" in text


def test_both_branches_of_guidance_are_compared(model, tmp_path) -> None:
    request = GeneratorRequest(
        prompt="ring", model=model, out=tmp_path, recipes=(CONTROL,), steps=2, guidance=2.0
    )
    found = run_generators(request, lambda *a: None, lambda words: None)
    assert found.rows[1].density == pytest.approx(0.5)
    assert found.rows[1].latent_error[-1] > 0
    assert set(["ring"]) < set(found.prompt.split())


def test_a_recipe_that_never_acts_becomes_a_note(model, tmp_path, recwarn) -> None:
    idle = "RandomBlocks(block=(32, 32), dense_steps=1.0)"
    request = GeneratorRequest(prompt=PROMPT, model=model, out=tmp_path, recipes=(idle,), steps=2)
    found = run_generators(request, lambda *a: None, lambda words: None)
    row = found.rows[1]
    assert any("never changed anything" in note for note in found.notes)
    assert (row.density, row.computed) == (None, 1.0)
    assert row.prediction["speedup"] == pytest.approx(1.0)
    assert row.psnr == 100.0
    assert "No call was sparse" in (tmp_path / "report.html").read_text()
    assert not recwarn


def test_a_failure_at_the_end_leaves_what_was_there(model, tmp_path, monkeypatch) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("out of luck")

    (tmp_path / "report.json").write_text("before")
    monkeypatch.setattr(page, "render", explode)
    request = GeneratorRequest(
        prompt=PROMPT, model=model, out=tmp_path, recipes=(CONTROL,), steps=1
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        run_generators(request, lambda *a: None, lambda words: None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "before"


def _timed(name: str, step: float, limit: float | None = None) -> Row:
    return Row(
        name=name,
        recipes=[],
        seconds=4 * step,
        step_seconds=[step] * 4,
        attention_seconds=step,
        psnr=1.0,
        ssim=1.0,
        latent_error=[0.0] * 4,
        attributes=1.0,
        found="",
        prediction=None if limit is None else {"limit": limit},
    )


def test_times_that_cannot_be_are_noted() -> None:
    dense = _timed("dense", 10.0)
    rows = [dense, _timed("fine", 5.0, limit=2.5), _timed("wild", 3.0, limit=2.5)]
    (note,) = generators.busy_notes(rows)
    assert "wild" in note
    assert "fine" not in note
    dense.step_seconds = [8.0, 8.0, 8.0, 16.0]
    assert "8.0 to 16.0 s" in generators.busy_notes(rows)[0]


def test_the_command_takes_a_prompt_or_its_default(run, model, tmp_path) -> None:
    args = ["--model", model, "--recipe", CONTROL, "--steps", 2, "--out", tmp_path / "o"]
    code, text, _ = run("compare", "small blue ring moving up on dark", *args)
    assert code == 0
    assert "predicted: attention is" in text
    assert "small blue ring moving up on dark" in text
    code, text, _ = run("compare", *args, "--json")
    assert code == 0
    data = json.loads(text)
    assert (data["prompt"], data["steps"], data["guidance"]) == (PROMPT, 2, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "SubBloc"], ["unknown recipe", "SubBlock"]),
        (["--recipe", "SubBlock(density=2)"], ["<= 1"]),
        (["--recipe", "ToMe(r=4)"], ["ToMe cannot run", "VideoDiT"]),
        (["--recipe", "ZerothOrder"], ["sparse attention recipe"]),
        (["--recipe", CONTROL], ["given twice"]),
        (["--recipe", "RandomBlocks + SubBlock"], ["both decide"]),
        (["--steps", "0"], ["steps must be at least 1"]),
        (["--guidance", "-1"], ["guidance"]),
        (["--guidance", "nan"], ["guidance"]),
        (["--device", "cuda:99"], ["not there"]),
        (["--batch", "2", "--rate", "3"], ["is a generator", "--rate, --batch"]),
        (["--dtype", "float32"], ["--dtype"]),
        (["--repeats", "4"], ["--repeats"]),
        (["--no-ceiling"], ["--no-ceiling"]),
    ],
)
def test_wrong_options_exit_2_and_write_nothing(run, model, tmp_path, options, words) -> None:
    out = tmp_path / "out"
    args = ["--model", model, "--recipe", CONTROL, "--out", out]
    code, _, err = run("compare", PROMPT, *args, *options)
    assert (code, err.count("\n")) == (2, 1), err
    for word in words:
        assert word in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("prompt", "word"), [("", "empty"), ("  ", "empty"), ("purple cow", "unknown word 'purple'")]
)
def test_wrong_prompts_exit_2(run, model, tmp_path, prompt, word) -> None:
    code, _, err = run("compare", prompt, "--model", model, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert word in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_loading(
    run, model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(generators, "load_weights", None)
    (tmp_path / "sheet.png").mkdir()
    code, _, err = run("compare", PROMPT, "--model", model, "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1), err
    assert "sheet.png is a folder" in err


def test_recipes_are_refused_before_any_forward(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generators, "probe", None)
    request = GeneratorRequest(
        prompt=PROMPT, model=model, out=tmp_path, recipes=(CONTROL, "ToMe"), steps=2
    )
    with pytest.raises(UnsupportedError, match="ToMe cannot run"):
        run_generators(request, lambda *a: None, lambda words: None)


def test_options_of_generators_are_refused_for_encoders(run, tmp_path) -> None:
    for option in (["--steps", 4], ["--guidance", 2]):
        code, _, err = run("compare", "--model", "tubelet-vit", *option, "--out", tmp_path / "o")
        assert (code, err.count("\n")) == (2, 1), err
        assert "no generator" in err
        assert option[0] in err


def test_only_weights_of_a_video_dit_are_generators(model, tmp_path) -> None:
    assert is_generator(model)
    assert is_generator("tubelet-dit")
    assert not is_generator("tubelet-vit")
    assert not is_generator("videomae-base")
    assert not is_generator(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"attributes": (2, 2)}, "not trained on"), ({"frames": 2, "size": (16, 32)}, "2 frames of")],
)
def test_models_that_cannot_be_read_back_are_refused(tmp_path, changes, words) -> None:
    request = GeneratorRequest(
        prompt=PROMPT, model=saved(tmp_path, **changes), out=tmp_path / "out", recipes=(CONTROL,)
    )
    with pytest.raises(ModelError, match=words):
        run_generators(request, lambda *a: None, lambda words: None)
    assert not (tmp_path / "out").exists()
