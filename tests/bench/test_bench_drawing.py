"""Drawing clips with a generator and reading them back: `draw` and `tubelet generate`."""

import json

import pytest
import torch

from tubelet.bench.drawing import DrawRequest, draw
from tubelet.core.errors import ClipError, ModelError, UnsupportedError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.flow import generate
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import load_weights, save_weights
from tubelet.train.world import make_world, parse_attributes
from tubelet.video import read_clip

SIDE, FRAMES = 32, 4
PROMPTS = ("large red disc moving left on dark", "small blue square", "ring")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny generator with random weights, as a path."""
    torch.manual_seed(0)
    config = VideoDiTConfig(width=16, depth=1, heads=2, frames=FRAMES, size=(SIDE, SIDE))
    path = tmp_path_factory.mktemp("generator") / "dit"
    network = VideoDiT(config)
    with torch.no_grad():
        # A fresh one draws grey, whatever it is asked for.
        for value in network.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    save_weights(path, network, record={})
    return str(path)


def quiet(*told: object) -> None:
    pass


def sheet(path) -> torch.Tensor:
    return read_clip(path, num_frames=1).frames[0].float() / 255


def test_a_sheet_shows_what_the_generator_draws_for_each_prompt(model, tmp_path):
    out = tmp_path / "new" / "x.png"
    drawn = draw(DrawRequest(prompts=PROMPTS, model=model, steps=2, seed=4, out=out), quiet)
    assert drawn.wanted[0] == PROMPTS[0]
    # What a prompt leaves open is completed.
    assert all(set(PROMPTS[i].split()) <= set(drawn.wanted[i].split()) for i in (1, 2))
    assert all(bool((parse_attributes(text) >= 0).all()) for text in drawn.wanted)
    assert len(drawn.found) == 3
    assert drawn.seconds > 0
    assert [path.name for path in out.parent.iterdir()] == ["x.png"]
    picture = sheet(out)
    cell = 2 * SIDE + 4
    assert picture.shape == (3, 3 * cell, FRAMES * cell)
    network = load_weights(model)
    for row, prompt in enumerate(drawn.wanted):
        asked = parse_attributes(prompt)[None]
        options = {"steps": 2, "guidance": 1.0, "dtype": torch.bfloat16}
        wanted = generate(network, asked, seed=4 + row, **options)[0]
        for column in range(FRAMES):
            top, left = row * cell, column * cell
            found = picture[:, top : top + 2 * SIDE : 2, left : left + 2 * SIDE : 2]
            assert (found - wanted[column]).abs().max() < 0.01


def test_what_is_drawn_is_read_back_by_the_detector(model, tmp_path, monkeypatch):
    asked = []

    def perfect(network, attributes, *, seed, steps, method, guidance, dtype, callback):
        asked.append((seed, steps, method, guidance))
        for step in range(steps):
            callback(step, attributes, attributes)
        values = attributes.clamp(min=0)
        return make_world(1, seed, frames=8, size=64, attributes=values).pixels

    monkeypatch.setattr("tubelet.bench.drawing.generate", perfect)
    told = []
    request = DrawRequest(
        prompts=("small green cross moving up on stripes", "large cyan ring moving right on dark"),
        model=model,
        steps=3,
        method="midpoint",
        guidance=2.5,
        seed=9,
        out=tmp_path / "x.png",
    )
    drawn = draw(request, lambda *what: told.append(what))
    assert drawn.found == drawn.wanted == list(request.prompts)
    assert asked == [(9, 3, "midpoint", 2.5), (10, 3, "midpoint", 2.5)]
    drawing = [(done, total) for what, done, total in told if what.startswith("drawing, 2")]
    assert drawing == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompts": ("red dics",)}, UnsupportedError, "unknown word 'dics'; did you mean 'disc'"),
        ({"prompts": ("red blue disc",)}, UnsupportedError, "two values of colour"),
        ({"device": "quantum"}, UnsupportedError, "device"),
        ({"model": "nowhere"}, ModelError, "no weights 'nowhere'"),
        ({"method": "magic"}, UnsupportedError, "unknown sampler 'magic'"),
        ({"out": "x.txt"}, UnsupportedError, "x.txt: cannot hold"),
        ({"out": "."}, ClipError, "folder"),
        ({"out": "file/x.mp4"}, ClipError, "cannot write .*file/x.mp4"),
        ({"out": "n" * 300 + ".mp4"}, ClipError, "cannot"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_drawn_is_refused(model, tmp_path, changes, error, words):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / changes.pop("out", "x.png")
    fields = {"prompts": ("red disc",), "model": model, "steps": 1, "out": out}
    with pytest.raises(error, match=words) as caught:
        draw(DrawRequest(**{**fields, **changes}), quiet)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_is_told_before_drawing(model, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tubelet.bench.drawing.generate", lambda *a, **k: drawn.append(a))
    for name in ("x.txt", "file/x.mp4"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises((ClipError, UnsupportedError)):
            draw(DrawRequest(prompts=("disc",), model=model, out=tmp_path / name), quiet)
    assert drawn == []


def test_an_encoder_cannot_draw(tmp_path):
    shape = {"width": 16, "depth": 1, "heads": 2, "frames": 4, "size": (16, 16)}
    save_weights(tmp_path / "vit", VideoViT(VideoViTConfig(**shape)), record={})
    with pytest.raises(ModelError, match="holds a VideoViT, wanted a VideoDiT"):
        draw(
            DrawRequest(prompts=("disc",), model=str(tmp_path / "vit"), out=tmp_path / "x.png"),
            quiet,
        )


# tubelet generate


def test_generate_writes_a_video_with_all_prompts(run, model, tmp_path):
    out = tmp_path / "x.mp4"
    code, text, err = run("generate", *PROMPTS, "--model", model, "--steps", 1, "--out", out)
    assert (code, err) == (0, "")
    assert "small blue square" in text
    assert f"wrote {out}" in text
    # Two columns and two rows, enlarged twice, four pixels between.
    assert read_clip(out, num_frames=FRAMES).frames.shape == (FRAMES, 3, 2 * 68, 2 * 68)


def test_generate_writes_a_sheet_and_json(run, model, tmp_path):
    out = tmp_path / "x.png"
    args = ("generate", "red  Disc, moving LEFT", "--model", model, "--steps", 1, "--out", out)
    code, text, err = run(*args, "--json")
    assert (code, err) == (0, "")
    told = json.loads(text)
    assert told["out"] == str(out)
    (wanted,) = [clip["wanted"] for clip in told["clips"]]
    assert "red disc moving left" in wanted
    assert set(told["clips"][0]) == {"wanted", "found"}
    assert told["seconds"] > 0
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert run(*args)[0] == 0
    assert out.read_bytes() == first
    assert run(*args, "--seed", 1)[0] == 0
    assert out.read_bytes() != first


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("red dics",), "did you mean 'disc'"),
        (("disc", "--model", "tubelet-dot"), "no weights 'tubelet-dot'"),
        (("disc", "--model", "tubelet-vit"), "wanted a VideoDiT"),
        (("disc", "--method", "magic"), "unknown sampler"),
        (("disc", "--device", "cuda:99"), "not there"),
        (("disc", "--steps", 0), "steps"),
        (("disc", "--guidance", -1), "guidance"),
        (("disc", "--out", "x.txt"), "x.txt"),
        ((), "prompt"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, model, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    chosen = args if "--model" in args else (*args, "--model", model)
    chosen = chosen if "--out" in args else (*chosen, "--out", "x.png")
    code, text, err = run("generate", *chosen)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1, err
    assert text == ""
    assert list(tmp_path.iterdir()) == []
