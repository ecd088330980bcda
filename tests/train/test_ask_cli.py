"""`tubelet ask` and `tubelet clips --questions`."""

import json

import pytest
import torch

from tubelet.nn.video_llm import VideoLLM, VideoLLMConfig
from tubelet.nn.video_tower import as_pictures
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import PIXEL_MEAN, PIXEL_STD, load_weights, save_weights
from tubelet.train.questions import make_questions, words
from tubelet.train.questions.make import OBJECT_KINDS
from tubelet.video import normalise, read_clip

QUESTION = "Which way does the red square go?"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(5)
    shape = {"width": 32, "depth": 2, "heads": 2, "frames": 8, "size": (32, 32)}
    save_weights(
        folder / "enc", VideoViT(VideoViTConfig(**shape, tasks={"direction": 8})), record={}
    )
    config = VideoLLMConfig(
        words=words(), encoder=str(folder / "enc"), taps=(2,), width=32, depth=3, heads=2,
        mlp_width=64,
    )  # fmt: skip
    save_weights(folder / "tiny", VideoLLM(config), record={})
    return str(folder / "tiny")


@pytest.fixture
def clip(run, tmp_path) -> str:
    path = tmp_path / "clip.mp4"
    assert run("clips", "--questions", "--count", 1, "--seed", 4, "--out", path)[0] == 0
    return str(path)


def ask(run, model, clip, *more):
    code, text, err = run("ask", clip, QUESTION, "--model", model, "--json", *more)
    assert code == 0, err
    return json.loads(text)


def test_the_answer_is_the_models_own(run, model, clip):
    told = ask(run, model, clip, "--top", 5)
    (dense,) = told["answers"]
    llm = load_weights(model)
    frames = read_clip(clip, num_frames=8, size=(32, 32)).frames
    pixels = normalise(frames, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)[None]
    given = {**llm.prompts([QUESTION]), "pixel_values_videos": as_pictures(pixels, 2)}
    with torch.inference_mode():
        shares = llm.host(**given).logits[0, -1].softmax(-1)
    best = shares.topk(5)
    found = [(row["word"], row["probability"]) for row in dense["top"]]
    for (word, share), number, wanted in zip(found, best.indices, best.values, strict=True):
        assert word == llm.tokenizer.convert_ids_to_tokens(int(number))
        assert share == pytest.approx(float(wanted), rel=1e-4)
    assert dense["answer"].startswith(found[0][0]) or found[0][0].startswith("<")
    assert (dense["variant"], dense["kept"], dense["video_tokens"]) == ("dense", 64, 64)
    assert told["question"] == QUESTION


def test_recipes_come_behind_the_dense_answer_with_their_tokens_and_times(run, model, clip):
    recipes = ("EVS(keep_ratio=0.25)", "UniformFrames(keep_ratio=0.5) + FastV(layer=1)")
    told = ask(run, model, clip, *(part for r in recipes for part in ("--recipe", r)))
    rows = told["answers"]
    assert [row["kept"] for row in rows] == [64, 16, 16]
    assert next(row["variant"] for row in rows) == "dense"
    assert rows[1]["variant"].startswith("EVS(")
    assert rows[2]["tokens_per_layer"][0] > rows[2]["tokens_per_layer"][-1]
    for row in rows:
        spent = row["seconds"]
        assert set(spent) == {"decode video", "vision", "plan", "prompt", "prefill", "answer"}
        assert all(value >= 0 for value in spent.values())
        assert min(spent[name] for name in ("decode video", "vision", "prefill")) > 0
    assert rows[0]["seconds"]["plan"] == 0 < rows[1]["seconds"]["plan"]


def test_people_get_a_table(run, model, clip):
    code, text, err = run("ask", clip, QUESTION, "--model", model, "--recipe", "EVS")
    assert (code, err) == (0, "")
    assert QUESTION in text
    assert "64 of 64" in text
    assert "times in ms" in text


def test_the_sample_clip_can_be_asked_about(run, model):
    told = ask(run, model, "sample")
    assert told["clip"] == "rendered sample clip"
    assert "a red square goes " in told["shows"]
    assert told["shows"].count("from frame") == 3


def test_clips_unlike_those_of_the_training_come_with_a_word_of_warning(run, model, clip):
    assert "trained on clips of simple objects" in ask(run, model, clip)["shows"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("sample", "which way does the cat go?"), "does not know 'cat'. It knows: , ? a after"),
        (("nowhere.mp4", QUESTION), "nowhere.mp4"),
        (("sample", QUESTION, "--recipe", "EVC"), "did you mean EVS"),
        (("sample", QUESTION, "--recipe", "ToMe"), "ToMe cannot run on Llava"),
        (("sample", QUESTION, "--recipe", "EVS + DivPrune"), "both decide"),
        (("sample", QUESTION, "--model", "tubelet-vit"), "wanted a VideoLLM"),
        (("sample", QUESTION, "--model", "nothing"), "no weights 'nothing'"),
        (("sample", "?", "--top", 0), "top"),
        (("sample", QUESTION, "--top", 1000), "--top 1000: the model knows"),
        (("sample", " "), "the question is empty"),
        (("sample", QUESTION, "--device", "quantum"), "device"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, model, args, words):
    if "--model" not in args:
        args = (*args, "--model", model)
    code, text, err = run("ask", *args)
    assert code == 2, err
    assert words in err
    assert err.count("\n") == 1, err
    assert text == ""


def test_clips_are_drawn_with_their_questions(run, tmp_path):
    out = tmp_path / "x.mp4"
    args = ("--questions", "--count", 2, "--seed", 3, "--background", "pan", "--out", out)
    code, text, _ = run("clips", *args, "--json")
    assert code == 0
    told = json.loads(text)
    batch = make_questions(2, 3, kinds=OBJECT_KINDS, background="pan")
    wanted = [batch.texts(clip) for clip in range(2)]
    found = [[tuple(row.values()) for row in rows] for rows in told["clips"]]
    assert found == wanted
    drawn = read_clip(out).frames[:, :, 1:193:3, 1:193:3].float() / 255
    assert (drawn - batch.pixels[0]).abs().mean() < 0.05
    code, text, _ = run("clips", *args)
    assert code == 0
    assert wanted[0][0][1] in text
    code, _, err = run("clips", *args, "--task", "shells")
    assert code == 2
    assert "leave out --task" in err
