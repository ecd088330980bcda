"""`tubelet clips`."""

import json

import pytest

from tubelet.train.clips import TASKS, make_clips
from tubelet.video import read_clip


def test_a_video_of_several_clips(run, tmp_path):
    out = tmp_path / "x.mp4"
    code, text, _ = run("clips", "--task", "shells", "--count", 5, "--seed", 4, "--out", out)
    assert code == 0
    assert "shell game" in text
    clip = read_clip(out)
    # Three columns, two rows, three times enlarged, four pixels between.
    assert clip.frames.shape == (16, 3, 2 * 196, 3 * 196)
    drawn = make_clips("shells", 5, 4).pixels[4]
    # Second row, second column.
    tile = clip.frames[:, :, 196 + 1 : 196 + 192 : 3, 196 + 1 : 196 + 192 : 3].float() / 255
    assert (tile - drawn).abs().mean() < 0.05


def test_a_sheet_with_a_row_per_clip(run, tmp_path):
    out = tmp_path / "x.png"
    args = ("--task", "mask", "--count", 2, "--frames", 8, "--size", 32, "--out", out)
    code, text, _ = run("clips", *args)
    assert code == 0
    assert "per token" in text
    assert out.read_bytes().startswith(b"\x89PNG")
    assert read_clip(out, num_frames=1).frames.shape == (1, 3, 2 * 100, 8 * 100)


def test_json_names_every_label(run, tmp_path):
    out = tmp_path / "x.mp4"
    args = ("--background", "mixed", "--count", 3, "--seed", 2, "--out", out, "--json")
    code, text, _ = run("clips", *args)
    assert code == 0
    told = json.loads(text)
    labels = make_clips("direction", 3, 2, background="mixed").labels.tolist()
    assert [row["label"] for row in told["clips"]] == labels
    assert told["out"] == str(out)


def test_the_list_shows_every_task(run):
    code, text, _ = run("clips", "--list")
    assert code == 0
    assert all(name in text for name in TASKS)
    code, text, _ = run("clips", "--list", "--json")
    rows = json.loads(text)
    assert [row["name"] for row in rows] == list(TASKS)
    assert all(row["chance"] <= row["floor"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--task", "shels"), "did you mean shells"),
        (("--background", "pann"), "did you mean pan"),
        (("--task", "ego-motion", "--background", "black"), "no answer"),
        (("--count", 0), "count"),
        (("--frames", 2), "frames"),
        (("--out", "nowhere/x.mp4"), "not a folder"),
        (("--out", "x.txt"), "suffix"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("clips", *args)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
