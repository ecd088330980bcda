"""Plans on disk."""

import json

import pytest
import torch

import tubelet
from tubelet.core.errors import RecipeError, TubeletError, UnsupportedError
from tubelet.recipes import RLT, TempScale, ToMe
from tubelet.testing import tiny


def test_a_saved_plan_does_the_same_after_loading(tmp_path) -> None:
    host, pixels = tiny.build("videomae"), tiny.clip(1)
    with torch.no_grad():
        with tubelet.accelerate(host, RLT(threshold=0.2), ToMe(r=(3, 2)), TempScale()) as handle:
            wanted = host(pixels).logits
            path = handle.save(tmp_path / "plan.json")
        plan = tubelet.load_plan(path)
        with tubelet.accelerate(host, plan):
            assert torch.equal(host(pixels).logits, wanted)
    assert plan.grid is not None
    assert str(plan.grid) == "4x4x4"
    assert plan.recipes == (RLT(threshold=0.2), ToMe(r=(3, 2)), TempScale())


def test_a_plan_for_another_model_is_refused(tmp_path) -> None:
    with tubelet.accelerate(tiny.build("videomae"), ToMe(r=3)) as handle:
        plan = tubelet.load_plan(handle.save(tmp_path / "plan.json"))
    with pytest.raises(UnsupportedError, match="made for VideoMAE"):
        tubelet.accelerate(tiny.build("vivit"), plan)
    with pytest.raises(UnsupportedError, match="4 layers"):
        tubelet.accelerate(tiny.build("videomae", num_hidden_layers=2), plan)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nonsense", '{"format": 99}', "null", '{"format": 1, "grid": 3}']
)
def test_what_is_no_plan_is_refused(tmp_path, text) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"plan\.json"):
        tubelet.load_plan(path)


def test_unknown_recipes_in_a_plan_are_named(tmp_path) -> None:
    path = tmp_path / "plan.json"
    entry = {"recipe": "Nope"}
    path.write_text(
        json.dumps({"format": 1, "model": "x", "num_layers": 1, "grid": None, "recipes": [entry]})
    )
    with pytest.raises(RecipeError, match="unknown recipe 'Nope'"):
        tubelet.load_plan(path)


def test_missing_files_and_folders_are_clear_errors(tmp_path) -> None:
    with pytest.raises(RecipeError, match="cannot read plan"):
        tubelet.load_plan(tmp_path / "absent.json")
    with (
        tubelet.accelerate(tiny.build("videomae"), ToMe(r=3)) as handle,
        pytest.raises(TubeletError, match="cannot write"),
    ):
        handle.save(tmp_path / "absent" / "plan.json")
    assert list(tmp_path.iterdir()) == []
