"""Procedural test clips as the input of a model: "task:NAME"."""

import pytest
import torch

from tubelet.bench.clip_inputs import gather_inputs
from tubelet.bench.compare import compare
from tubelet.core.errors import ClipError, TubeletError
from tubelet.models.catalogue import adapter_for
from tubelet.models.load import LoadedModel
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import PIXEL_MEAN, PIXEL_STD
from tubelet.recipes import RandomDrop
from tubelet.testing import tiny
from tubelet.train.clips import TASKS, TEST_SEED, make_clips
from tubelet.video import write_video


def encoder(**changes) -> LoadedModel:
    torch.manual_seed(0)
    shape = {"width": 16, "depth": 3, "heads": 2, "frames": 16, "size": (32, 32)}
    tasks = {"direction": 8, "needle": 10, "own": 3}
    model = VideoViT(VideoViTConfig(**{**shape, "tasks": tasks, **changes})).eval()
    return loaded(model, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)


def loaded(model, mean=(0.5,) * 3, std=(0.25,) * 3) -> LoadedModel:
    clip = adapter_for(model).clip(model.config)
    return LoadedModel(model=model, name="tiny", random_weights=True, clip=clip, mean=mean, std=std)


@pytest.mark.parametrize("task", ["direction", "needle"])
def test_clips_of_a_task_are_different_ones_with_their_answers(task):
    inputs = gather_inputs(f"task:{task}", encoder(), batch=4)
    frames = TASKS[task].frames
    made = make_clips(task, 4, TEST_SEED, size=32)
    pixels = inputs.arguments["pixel_values"]
    assert pixels.shape == (4, frames, 3, 32, 32)
    assert pixels.dtype == torch.float32
    # Through bytes, as a video would come.
    assert (pixels * PIXEL_STD + PIXEL_MEAN - made.pixels).abs().max() < 0.51 / 255
    assert all(not torch.equal(pixels[0], other) for other in pixels[1:])
    assert inputs.arguments["task"] == task
    assert torch.equal(inputs.labels, made.labels)
    assert (inputs.clip.frames.float() / 255 - made.pixels[0]).abs().max() < 0.51 / 255
    assert len(inputs.clip.times) == frames
    assert inputs.description == f"4 test clips of {task}, {frames} frames of 32x32"


def test_the_dense_task_is_asked_without_labels():
    inputs = gather_inputs("task:mask", encoder(), batch=2)
    assert inputs.arguments["task"] == "mask"
    assert inputs.labels is None


def test_a_model_that_does_not_know_the_task_gets_clips_of_its_own_length():
    inputs = gather_inputs("task:shells", encoder(), batch=2)
    assert set(inputs.arguments) == {"pixel_values"}
    assert inputs.labels is None
    host = loaded(tiny.build("videomae"))
    inputs = gather_inputs("task:needle", host, batch=3)
    (pixels,) = inputs.arguments.values()
    assert pixels.shape == (3, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE)
    assert inputs.labels is None
    assert "8 frames of 32x32" in inputs.description
    with torch.inference_mode():
        assert host.model(**inputs.arguments).logits.shape == (3, 7)


def test_half_precision_models_get_their_own_dtype():
    model = encoder()
    model.model.to(torch.bfloat16)
    assert gather_inputs("task:direction", model).arguments["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["shels", "", "own", "x" * 400], ids=lambda name: name[:5])
def test_an_unknown_task_is_refused_with_the_known_names(name):
    with pytest.raises(TubeletError, match=r"unknown task .*known: direction, needle") as caught:
        gather_inputs(f"task:{name}", encoder())
    assert "\n" not in str(caught.value)
    if name == "shels":
        assert "did you mean shells" in str(caught.value)


def test_a_rate_means_nothing_to_a_task():
    with pytest.raises(ClipError, match=r"task:direction: .* leave the rate out"):
        gather_inputs("task:direction", encoder(), rate=8.0)


def test_clips_that_do_not_fit_the_model_are_refused():
    with pytest.raises(TubeletError, match="square"):
        gather_inputs("task:direction", encoder(size=(32, 48)))
    with pytest.raises(TubeletError, match="batch"):
        gather_inputs("task:direction", encoder(), batch=0)


def test_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = torch.randint(0, 255, (20, 3, 32, 32), dtype=torch.uint8)
    write_video("x.mp4", frames, 10.0)
    (tmp_path / "x.mp4").rename(tmp_path / "task:shells")
    inputs = gather_inputs("task:shells", encoder())
    assert inputs.labels is None
    assert inputs.description == "task:shells, 16 frames of 32x32"


def test_a_comparison_with_labels_reports_accuracy():
    host = encoder()
    inputs = gather_inputs("task:direction", host, batch=8)
    with torch.no_grad():
        # Answers class 5 whatever it sees; balanced labels make that right once in eight.
        host.model.heads["direction"].bias[5] = 100.0
    options = {"repeats": 1, "ceiling": False}
    result = compare(
        host.model, inputs.arguments, RandomDrop(keep_ratio=0.5), labels=inputs.labels, **options
    )
    assert [row.accuracy for row in result.rows] == [1 / 8, 1 / 8]
    right = torch.full_like(inputs.labels, 5)
    result = compare(
        host.model, inputs.arguments, RandomDrop(keep_ratio=0.5), labels=right, **options
    )
    assert [row.accuracy for row in result.rows] == [1.0, 1.0]
    assert "100%" in result.table()
    result = compare(host.model, inputs.arguments, RandomDrop(keep_ratio=0.5), **options)
    assert [row.accuracy for row in result.rows] == [None, None]
