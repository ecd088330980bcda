"""Weights files: what is written is what is read, and what is damaged is never used."""

import errno
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tubelet.core.errors import ModelError, TubeletError
from tubelet.nn import weights
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import load_weights, read_card, save_weights, shipped

RECORD = {"command": "tubelet train", "seed": 3}
ARCHITECTURE = "VideoViT"


def build(seed: int = 0, **changes) -> VideoViT:
    torch.manual_seed(seed)
    fields = {"width": 16, "depth": 1, "heads": 2, "frames": 4, "size": (16, 16)}
    model = VideoViT(VideoViTConfig(**{**fields, "tasks": {"left": 3}, **changes}))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape))
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    """Path without extension of a saved model."""
    save_weights(tmp_path / "vit", build(), record=RECORD, summary="a test")
    return tmp_path / "vit"


def rewrite(path: Path, **changes) -> None:
    card = path.with_name(path.name + ".json")
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trip


def test_a_model_comes_back_within_the_rounding_of_float16(saved):
    model, again = build(), load_weights(saved)
    assert type(again) is VideoViT
    assert again.config == model.config
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert state[name].dtype == torch.float32
        # Half of the distance of neighbouring float16 numbers, relative; 2**-25 below the normal.
        assert bool(((state[name] - value).abs() <= value.abs() * 2**-11 + 2**-25).all()), name
        assert torch.equal(state[name], value.half().float())
    pixels = torch.randn(1, 4, 3, 16, 16)
    assert torch.allclose(again(pixels).logits, model(pixels).logits, atol=0.05)


def test_the_card_says_where_the_weights_come_from(saved):
    card = read_card(saved)
    assert (card.architecture, card.summary, card.attach) == (ARCHITECTURE, "a test", None)
    assert card.record == RECORD
    assert VideoViTConfig.from_dict(card.config) == build().config


@pytest.mark.parametrize("dots", ["vit", "vit-0.2"])
def test_files_are_found_with_and_without_extension(tmp_path, dots):
    path = save_weights(tmp_path / dots, build(), record={})
    assert names(tmp_path) == [f"{dots}.json", f"{dots}.safetensors"]
    for name in (path, str(path), tmp_path / dots):
        assert load_weights(name).config == build().config


def test_weights_load_in_another_precision(saved):
    model = load_weights(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    before = (tmp_path / "vit.safetensors").read_bytes()
    save_weights(tmp_path / "again", load_weights(saved), record=RECORD, summary="a test")
    assert (tmp_path / "again.safetensors").read_bytes() == before
    assert read_card(tmp_path / "again") == read_card(saved)


def test_loading_leaves_the_random_numbers_of_the_caller_alone(saved):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_weights(saved)
    assert torch.equal(torch.rand(3), wanted)


def test_shipped_weights_are_known_by_name(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    save_weights(tmp_path / "dit", build(), record={})
    monkeypatch.chdir(Path(__file__).parent)
    assert shipped() == ["dit", "vit"]
    assert load_weights("vit").config == build().config
    with pytest.raises(ModelError, match="no weights 'vitt'; tubelet ships dit, vit, or give"):
        load_weights("vitt")


@pytest.mark.parametrize("name", ["", "no\0body", "long" * 200, "."])
def test_names_that_are_no_files_are_refused(name):
    with pytest.raises(ModelError, match="no weights"):
        load_weights(name)


# Damage


def test_changed_tensors_are_refused(saved, tmp_path):
    path = tmp_path / "vit.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="does not have the checksum of its card"):
        load_weights(saved)


def test_a_card_of_other_weights_is_detected(saved, tmp_path):
    # As after a crash between the two renames of `save_weights`: new card, old tensors.
    save_weights(tmp_path / "new", build(seed=1), record={})
    os.replace(tmp_path / "new.json", tmp_path / "vit.json")
    with pytest.raises(ModelError, match="checksum"):
        load_weights(saved)


def test_another_architecture_than_needed_is_refused(saved):
    assert load_weights(saved, expect="VideoViT") is not None
    with pytest.raises(ModelError, match=r"vit\.safetensors holds a VideoViT, wanted a VideoDiT"):
        load_weights(saved, expect="VideoDiT")


def test_an_unknown_architecture_is_refused(saved):
    rewrite(saved, architecture="VideoMLP")
    with pytest.raises(ModelError, match="unknown 'VideoMLP'; known: VideoViT, VideoDiT"):
        load_weights(saved)


@pytest.mark.parametrize("changes", [{"width": 32}, {"depth": 2}, {"tasks": {"right": 3}}])
def test_tensors_that_do_not_fit_the_configuration_are_refused(saved, changes):
    rewrite(saved, config={**build().config.to_dict(), **changes})
    with pytest.raises(ModelError, match="does not fit its configuration") as caught:
        load_weights(saved)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_safetensors_is_refused(saved, tmp_path):
    import hashlib

    (tmp_path / "vit.safetensors").write_bytes(b"nothing")
    rewrite(saved, sha256=hashlib.sha256(b"nothing").hexdigest())
    with pytest.raises(ModelError, match="does not fit"):
        load_weights(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        '{"architecture": "VideoViT"}',
        '{"architecture": ["VideoViT"], "config": {}, "sha256": ""}',
        '{"architecture": "VideoViT", "config": {}, "sha256": "", "attach": "../x"}',
        '{"architecture": "VideoViT", "config": {}, "sha256": "", "colour": 3}',
    ],
)
def test_a_damaged_card_is_refused(saved, tmp_path, text):
    (tmp_path / "vit.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"vit\.json is not a card of weights"):
        load_weights(saved)


def test_a_missing_card_is_refused(saved, tmp_path):
    (tmp_path / "vit.json").unlink()
    with pytest.raises(ModelError, match=r"vit\.json is not a card of weights"):
        load_weights(saved)


@pytest.mark.parametrize("config", [None, {"width": 15}, {"colour": 3}])
def test_a_damaged_configuration_is_refused(saved, config):
    rewrite(saved, config=config)
    with pytest.raises(ModelError, match="VideoViT"):
        load_weights(saved)


# What is not saved


def test_another_model_is_not_saved(tmp_path):
    with pytest.raises(ModelError, match="cannot save a Linear; known: VideoViT"):
        save_weights(tmp_path / "x", nn.Linear(2, 2), record={})
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_float16_does_not_hold_are_not_saved(saved, tmp_path, value):
    model = build()
    with torch.no_grad():
        model.norm.bias[2] = value
    before = (tmp_path / "vit.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"norm\.bias has values that are not finite"):
        save_weights(saved, model, record={})
    assert (tmp_path / "vit.safetensors").read_bytes() == before


def disk_full(*call, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    disk_full()


def fail_late(target: str):
    """`os.replace` that fails for one target."""
    replace = os.replace

    def moved(source, place):
        if str(place).endswith(target):
            disk_full()
        replace(source, place)

    return moved


@pytest.mark.parametrize("where", ["tensors", "card"])
def test_a_full_disk_leaves_the_old_files_and_nothing_else(saved, tmp_path, monkeypatch, where):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as broken:
        if where == "tensors":
            broken.setattr(Path, "write_bytes", half_written)
        else:
            broken.setattr(os, "replace", fail_late(".json"))
        with pytest.raises(TubeletError, match=r"cannot write .*No space left"):
            save_weights(saved, build(seed=1), record={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_weights(saved).config == build().config


def test_a_failed_last_step_leaves_no_part_and_is_noticed(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail_late(".safetensors"))
        with pytest.raises(TubeletError, match="No space left"):
            save_weights(saved, build(seed=1), record={})
    assert names(tmp_path) == ["vit.json", "vit.safetensors"]
    with pytest.raises(ModelError, match="checksum"):
        load_weights(saved)


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(TubeletError, match=r"cannot write .*No such file"):
        save_weights(tmp_path / "none" / "vit", build(), record={})


# A second file


@dataclass(frozen=True)
class PartsConfig:
    width: int = 4

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "PartsConfig":
        return cls(**data)


class Reducers(nn.ModuleDict):
    """Stands in for tubelet's own: a float weight and a counter."""

    def __init__(self, config: PartsConfig) -> None:
        super().__init__({"vtm": nn.Linear(config.width, 2)})
        self.config = config
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))


@pytest.fixture
def parts(tmp_path, monkeypatch) -> Reducers:
    """Reducers saved beside a model whose card names them."""
    home = SimpleNamespace(Reducers=Reducers, PartsConfig=PartsConfig)
    monkeypatch.setitem(sys.modules, "tubelet_test_parts", home)
    entry = ("tubelet_test_parts", "Reducers", "PartsConfig")
    monkeypatch.setitem(weights.ARCHITECTURES, "Reducers", entry)
    made = Reducers(PartsConfig(width=6))
    made.seen.fill_(2**31 + 1)
    save_weights(tmp_path / "vit-parts", made, record={})
    save_weights(tmp_path / "vit", build(), record={}, attach="vit-parts")
    return made


def test_an_attached_file_becomes_the_reducers(parts, tmp_path):
    model = load_weights(tmp_path / "vit", dtype=torch.bfloat16)
    assert type(model.reducers) is Reducers
    assert model.reducers.config.width == 6
    assert not model.reducers.training
    wanted = parts["vtm"].weight.half().bfloat16()
    assert torch.equal(model.reducers["vtm"].weight, wanted)
    # Numbers that are no floats come back exactly.
    assert int(model.reducers.seen) == 2**31 + 1


def test_an_attached_file_must_be_there_unchanged_and_hold_reducers(parts, tmp_path):
    rewrite(tmp_path / "vit-parts", sha256="0" * 64)
    with pytest.raises(ModelError, match=r"vit-parts\.safetensors does not have the checksum"):
        load_weights(tmp_path / "vit")
    save_weights(tmp_path / "vit-parts", build(), record={})
    with pytest.raises(ModelError, match="holds a VideoViT, wanted a Reducers"):
        load_weights(tmp_path / "vit")
    (tmp_path / "vit-parts.safetensors").unlink()
    with pytest.raises(ModelError, match="vit-parts"):
        load_weights(tmp_path / "vit")


def test_a_model_with_reducers_is_saved_without_them(parts, tmp_path):
    model = load_weights(tmp_path / "vit")
    with pytest.raises(ModelError, match="carries reducers"):
        save_weights(tmp_path / "again", model, record={})
    save_weights(tmp_path / "again", model, record={}, attach="vit-parts")
    again = load_weights(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
