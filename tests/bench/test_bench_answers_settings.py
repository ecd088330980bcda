"""What a budget means for each recipe, and where its layers go."""

import math

import pytest

from tubelet.bench.answers.settings import (
    CONTROL_KEEPS,
    KEEPS,
    Shape,
    Sweep,
    at_depth,
    check_families,
    families,
    has_budget,
    make_variants,
)
from tubelet.core.errors import RecipeError
from tubelet.core.grid import TokenGrid
from tubelet.core.recipe import KVPolicy, PositionPolicy, SparsePrefill
from tubelet.recipes import catalogue

SMALL = Shape(depth=6, grid=TokenGrid(frames=8, height=8, width=8))


def settings(shape=SMALL, keeps=KEEPS) -> dict:
    return {v.name: v for v in make_variants(keeps, shape)[0]}


def test_every_recipe_for_prompts_is_there_or_says_why():
    variants, notes = make_variants(KEEPS, SMALL, lacks={"class token": "none"})
    run = {name for v in variants for name in v.family.split(" + ")}
    for name, cls in catalogue().items():
        if issubclass(cls, PositionPolicy | SparsePrefill | KVPolicy):
            assert name in run or any(note.startswith(name) for note in notes), name
    assert len({v.name for v in variants}) == len(variants)
    assert [v.family for v in variants[:2]] == ["dense", "RandomPrompt"]
    # A refusal is told once for all budgets.
    assert sum("GlobalCom2" in note for note in notes) == 1


def test_controls_have_further_budgets_and_the_rest_has_none():
    found = settings()
    for keep in (*KEEPS, *CONTROL_KEEPS):
        assert found[f"UniformFrames {keep:g}"].keep == keep
    assert "EVS 0.75" not in found
    for name in ("AShape", "ZipCache", "TidalDecode"):
        assert found[name].keep is None
        assert not has_budget(found[name].recipes)
    assert has_budget(found["FastV 0.5"].recipes)


@pytest.mark.parametrize(
    ("name", "field"),
    [("SparseVLM", "layers"), ("PyramidDrop", "layers"), ("FastV", "layer"), ("VAR", "layer")],
)
def test_layers_are_the_authors_at_their_depth(name, field):
    (recipe,) = settings(Shape(depth=32, grid=SMALL.grid))[f"{name} 0.5"].recipes
    assert getattr(recipe, field) == catalogue()[name].__dataclass_fields__[field].default


def test_layers_keep_their_relative_depth_and_their_order():
    found = settings()
    assert found["HoliTom + HoliTomInner 0.25"].recipes[1].layer == 4
    assert found["PruneVidInner 0.25"].recipes[0].layer == 2
    assert found["SparseVLM 0.25"].recipes[0].layers == (1, 2, 3)
    assert found["PyramidDrop 0.25"].recipes[0].layers == (2, 3, 5)
    assert at_depth(2, 32, 6) == 1
    assert at_depth(31, 32, 6) == 5
    (pyramid,) = settings(Shape(depth=2, grid=SMALL.grid))["PyramidDrop 0.25"].recipes
    assert (pyramid.layers, pyramid.keep_ratio) == ((1,), 0.25)


def test_budgets_are_met_by_what_the_fields_mean():
    found = {name: v.recipes[0] for name, v in settings().items() if v.recipes}
    assert found["VidCom2 0.125"].keep_ratio == 0.125
    # Two of eight frames stay whole.
    assert found["DyCoke 0.5"].keep_ratio == pytest.approx(1 / 3, abs=1e-3)
    assert "DyCoke 0.125" not in found
    # Three cuts leave the budget behind the last.
    assert found["PyramidDrop 0.125"].keep_ratio == 0.5
    assert found["SparseVLM 0.25"].keep_ratios == (0.6818, 0.4545, 0.25)
    # Layers 3 to 5 lose a slope each: a mean of 1 - 2 slopes.
    assert found["AIMPruning 0.5"].slope == 0.25
    assert found["FlashVID + FastV 0.25"].keep_ratio == pytest.approx(0.3125)
    assert found["FlashVID 0.25"].segments == 2
    close = found["FreeVideoLLM 0.25"]
    kept = (close.slow + close.middle) * 28 + (8 - close.slow - close.middle) * close.side**2
    assert kept == 128
    assert (found["F2C 0.5"].box, found["F2C 0.25"].box) == (1, 2)


def test_budgets_that_follow_from_the_clip_are_swept():
    found = settings()
    swept = {v.family for v in found.values() if v.sweep is not None}
    expected = {"PruneVid", "LLaVAScissor", "STTM", "MustDrop", "PruneVid + PruneVidInner"}
    assert swept == expected
    sweep = found["STTM 0.25"].sweep
    assert isinstance(sweep, Sweep)
    # The ends of the authors' ranges, and dense.
    found_at = [sweep.make(-math.log10(1 - spatial))[0] for spatial in (0.75, 0.95)]
    assert [(r.spatial, r.temporal) for r in found_at] == [(0.75, 0.5), (0.95, 0.65)]
    (high,) = sweep.make(6.0)
    assert (high.spatial, high.temporal) == (1.0, 1.0)
    # More tokens are left the larger the number is.
    low, high = (found["MustDrop 0.25"].sweep.make(x)[0] for x in (1.0, 3.0))
    assert low.share > high.share


def test_sizes_in_tokens_shrink_with_the_prompt():
    found = settings()
    sink = found["AShape"].recipes[0]
    assert (sink.block, sink.window, sink.sink) == ((16, 16), 16, 4)
    assert found["TidalDecode"].recipes[0].layers == (0, 2)
    assert found["TidalDecode"].recipes[0].tokens == 128
    assert found["DyCokeDecoding"].recipes[0].layer == 1


def test_named_families_run_beside_the_controls():
    variants, _ = make_variants((0.5,), SMALL, ("EVS", "HoliTom + HoliTomInner"))
    assert list(dict.fromkeys(v.family for v in variants)) == [
        "dense", "RandomPrompt", "UniformFrames", "EVS", "HoliTom + HoliTomInner",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"called 'ToMe'; known: RandomPrompt, .*VidCom2"):
        check_families(["ToMe"])
    assert families()["FastV"] == "layers"
