"""The weights that come with tubelet: complete cards, right checksums, right answers."""

import hashlib

import pytest
import torch
from torch import Tensor

from tubelet.models.accelerate import accelerate
from tubelet.models.load import load_model, presets
from tubelet.nn.weights import (
    ARCHITECTURES,
    ASSETS,
    PIXEL_MEAN,
    PIXEL_STD,
    load_weights,
    read_card,
    shipped,
)
from tubelet.recipes import GumbelKeep
from tubelet.train.clips import TEST_SEED, make_clips
from tubelet.train.jobs import jobs
from tubelet.train.questions import make_questions, packing
from tubelet.train.questions.make import OBJECT_KINDS

NAMES = (
    "tubelet-dit",
    "tubelet-llm",
    "tubelet-vit",
    "tubelet-vit-elastic",
    "tubelet-vit-elastic-reducers",
    "tubelet-vit-small",
)
LARGEST = 20_000_000
"""Bytes of one file."""

FRESH = TEST_SEED + 77_000_000
"""A seed that neither training nor any evaluation of it has used."""

RECORD = ("command", "job", "seed", "steps", "training_minutes", "hardware", "torch", "scores")


def test_these_weights_are_shipped_each_with_its_card():
    assert shipped() == list(NAMES)
    expected = {f"{name}{end}" for name in NAMES for end in (".safetensors", ".json")}
    assert {path.name for path in ASSETS.iterdir()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_small_and_what_its_card_says(name):
    data = (ASSETS / f"{name}.safetensors").read_bytes()
    assert len(data) < LARGEST
    card = read_card(name)
    assert hashlib.sha256(data).hexdigest() == card.sha256
    assert card.architecture in ARCHITECTURES
    assert card.summary


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_how_its_weights_were_made(name):
    record = read_card(name).record
    while record is not None:
        missing = [field for field in RECORD if record.get(field) is None]
        if "note" in record:
            # Of some early stages only the figures printed at the end were kept.
            assert set(missing) <= {"hardware", "torch"}, record["note"]
        else:
            assert missing == []
        assert record["command"].startswith("tubelet train ")
        assert record["command"].split()[2] == record["job"]
        assert record["job"] in jobs()
        assert record["training_minutes"] > 0
        assert record["steps"] > 0
        # A stage that started from weights says how those were made, unless they are here as well.
        if record.get("init") not in (None, *shipped()):
            assert record.get("before") is not None
        record = record.get("before")


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_into_what_they_belong_to(name):
    model = load_weights(name, expect=read_card(name).architecture)
    assert not model.training
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert (getattr(model, "reducers", None) is not None) == (name == "tubelet-vit-elastic")


def test_encoders_are_presets_of_the_loader():
    assert {name for name in NAMES if name.startswith("tubelet-vit") and name in presets()} == {
        "tubelet-vit", "tubelet-vit-elastic", "tubelet-vit-small",
    }  # fmt: skip
    loaded = load_model("tubelet-vit")
    assert not loaded.random_weights
    assert (loaded.mean, loaded.std) == ((PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)


# What they answer


@pytest.fixture(scope="module")
def encoder():
    return load_weights("tubelet-vit")


@pytest.fixture(scope="module")
def elastic():
    return load_weights("tubelet-vit-elastic")


@torch.inference_mode()
def answers(model, pixels: Tensor, task: str) -> Tensor:
    parts = ((pixels - PIXEL_MEAN) / PIXEL_STD).split(4)
    return torch.cat([model(part, task=task).logits.argmax(-1) for part in parts])


def accuracy(model, task: str, clips: int) -> float:
    batch = make_clips(task, clips, FRESH)
    return (answers(model, batch.pixels, task) == batch.labels).float().mean().item()


@pytest.mark.parametrize("task", ["direction", "collisions", "shells", "ego-motion"])
def test_the_encoder_answers_fresh_clips(encoder, task):
    assert accuracy(encoder, task, 32) >= 0.9


@pytest.mark.slow
def test_the_encoder_finds_the_needle(encoder):
    # 0.83 over hundreds of clips; 64 have a standard error of 0.05.
    assert accuracy(encoder, "needle", 64) >= 0.65


@pytest.mark.parametrize("task", ["direction", "collisions"])
def test_the_elastic_encoder_answers_with_half_of_its_tokens(elastic, task):
    with accelerate(elastic, GumbelKeep(keep_ratio=0.5)) as handle:
        assert accuracy(elastic, task, 32) >= 0.85
    report = handle.report().to_dict()
    assert report["tokens_per_layer"][-1] == 1 + 256


@pytest.fixture(scope="module")
def questions():
    """96 fresh clips of objects with up to eight questions each."""
    return make_questions(96, FRESH, kinds=OBJECT_KINDS, background="static")


@torch.inference_mode()
def test_the_video_language_model_answers_fresh_questions(questions):
    llm = load_weights("tubelet-llm")
    pixels = (questions.pixels - PIXEL_MEAN) / PIXEL_STD
    slots, there = packing.to_slots(questions), questions.kind >= 0
    every = torch.arange(llm.num_video).expand(len(questions), -1)

    def score(video: Tensor) -> float:
        logits = packing.answers(llm, video, every, slots)[..., 0, :]
        return float((logits.argmax(-1) == slots.wanted[..., 0])[there].float().mean())

    video = llm.video_tokens(pixels)
    assert score(video) > 0.93
    assert score(video.roll(1, 0)) < 0.5
