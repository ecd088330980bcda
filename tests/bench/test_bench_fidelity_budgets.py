"""Budgets become recipes that keep the wanted share, as measured on a model."""

import pytest
import torch

import tubelet
from tubelet.bench.fidelity.budgets import (
    KEEPS,
    SOLVERS,
    TOLERANCE,
    Geometry,
    OutOfReach,
    at_budget,
    thresholds,
)
from tubelet.bench.fidelity.hosts import Host
from tubelet.bench.fidelity.variants import drop_unsupported, known_recipes, make_variants
from tubelet.core.errors import RecipeError
from tubelet.nn.reducers import build_reducers
from tubelet.nn.vit import VideoViT, VideoViTConfig


@pytest.fixture(scope="module")
def host() -> Host:
    torch.manual_seed(0)
    model = VideoViT(VideoViTConfig(width=16, depth=12, heads=2))
    model.reducers = build_reducers(16, heads=2, max_slots=128)
    model.eval()
    return Host(name="tiny", role="dense", model=model, checksum="0")


@pytest.fixture(scope="module")
def geometry(host) -> Geometry:
    return host.geometry(16, (32, 32))


def measured(host: Host, recipe) -> list[float]:
    clip = torch.randn(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), tubelet.accelerate(host.model, recipe) as handle:
        host.model(clip, task="direction")
        return handle.report().tokens_per_layer


@pytest.mark.parametrize("keep", [k for k in KEEPS if k < 1])
@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("ATS", "UniformPool")])
def test_budgets_are_hit_or_refused(host, geometry, name, keep) -> None:
    recipe = at_budget(name, keep, geometry)
    if isinstance(recipe, OutOfReach):
        assert name != "RandomDrop"
        assert keep < 0.25
        return
    tokens = measured(host, recipe)
    assert sum(tokens) / 12 / 129 == pytest.approx(keep, abs=TOLERANCE)


def test_ats_keeps_at_most_its_budget(host, geometry) -> None:
    shares = []
    for keep in (0.75, 0.5, 0.35):
        recipe = at_budget("ATS", keep, geometry)
        shares.append(sum(measured(host, recipe)) / 12 / 129)
        assert shares[-1] <= keep + TOLERANCE
    assert shares == sorted(shares, reverse=True)


def test_pooling_takes_the_nearest_box_in_space(geometry) -> None:
    assert at_budget("UniformPool", 0.5, geometry).factor == (1, 1, 2)
    assert at_budget("UniformPool", 0.25, geometry).factor == (1, 2, 2)
    assert isinstance(at_budget("UniformPool", 0.9, geometry), OutOfReach)


def test_tome_spends_small_budgets_early(host, geometry) -> None:
    large, small = (at_budget("ToMe", keep, geometry) for keep in (0.75, 0.25))
    assert isinstance(large.r, int)
    tokens = measured(host, small)
    # A constant r of this budget would leave one token to the last layers.
    assert min(tokens) >= 0.25 * 129 / 4


def test_a_budget_below_half_of_a_token_is_refused(geometry) -> None:
    with pytest.raises(RecipeError, match=r"rounds to none; the least is 0\.0078"):
        at_budget("RandomDrop", 0.003, geometry)
    with pytest.raises(RecipeError, match="must lie in"):
        at_budget("RandomDrop", 1.5, geometry)
    with pytest.raises(RecipeError, match="no budget rule"):
        at_budget("TempScale", 0.5, geometry)


def test_thresholds_spread_over_the_sweep() -> None:
    assert thresholds(2) == (0.02, 0.2) or len(set(thresholds(2))) == 2
    assert len(thresholds(99)) == 6


def test_unknown_methods_are_listed(host) -> None:
    with pytest.raises(RecipeError, match="'Tome'; the bench has ToMe"):
        make_variants([host], KEEPS, ["Tome"])


def test_every_regime_has_its_own_controls(host) -> None:
    torch.manual_seed(0)
    model = VideoViT(VideoViTConfig(width=16, depth=4, heads=2)).eval()
    model.reducers = build_reducers(16, heads=2, max_slots=16)
    trained = Host(name="elastic", role="trained", model=model.eval(), checksum="1")
    variants, notes = drop_unsupported(
        make_variants([host, trained], (1.0, 0.5)), [host.geometry(16, (32, 32))]
    )
    kinds = {(v.regime, v.kind) for v in variants}
    for regime in ("training-free", "trained"):
        assert {(regime, k) for k in ("dense", "random", "oracle", "method")} <= kinds
    assert {v.family for v in variants if (v.regime, v.kind) == ("trained", "method")} == {
        "GumbelKeep", "TokenSlimming", "LookupViT", "VTM", "STViT", "HoT",
    }  # fmt: skip
    assert len({v.name for v in variants}) == len(variants)
    assert not notes


def test_recipes_that_a_model_cannot_run_become_notes() -> None:
    model = VideoViT(VideoViTConfig(width=16, depth=4, heads=2, pool="mean")).eval()
    host = Host(name="mean", role="dense", model=model, checksum="0")
    variants, notes = drop_unsupported(
        make_variants([host], (1.0, 0.5), ["ATS", "ToMe"]), [host.geometry(16, (32, 32))]
    )
    assert "ATS" not in {v.family for v in variants}
    assert any("ATS 0.5 was not run" in note and "class token" in note for note in notes)


def test_trained_recipes_reduce_earlier_for_small_budgets(geometry) -> None:
    at = {keep: at_budget("HoT", keep, geometry) for keep in (0.5, 0.35, 0.25)}
    assert [recipe.layer for recipe in at.values()] == [2, 1, 0]
    assert at[0.25].keep_ratio == pytest.approx(2 / 11)
    assert isinstance(at_budget("HoT", 0.1, geometry), OutOfReach)


def test_every_named_recipe_has_a_rule() -> None:
    assert {"ToMe", "RLT", "RandomDrop", "VTM"} <= set(known_recipes())
