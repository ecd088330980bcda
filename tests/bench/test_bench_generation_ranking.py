"""Ranking of curves and gains of compensation, on figures whose result is known."""

from dataclasses import replace

import pytest
import torch

from tubelet.bench.fidelity.generation_curve_tables import curves_markdown
from tubelet.bench.fidelity.generation_curves import curve_recipes
from tubelet.bench.fidelity.generation_ranking import (
    Curve,
    Point,
    at_density,
    compensations,
    curves,
    out_of_range,
    ranking,
    whole_run,
)
from tubelet.bench.fidelity.generation_result import (
    FIGURES,
    Generation,
    Kind,
    Outcome,
    join,
)
from tubelet.core.errors import TubeletError

CLIPS = torch.tensor([-8.0, -3.0, 0.0, 2.0, 9.0])
"""Clips differ far more than policies do."""

DENSE = 0.2
"""Share of the calls that stay dense."""


def outcome(
    name: str, kind: Kind, psnr: float, density: float | None = None, twice: float = 0.0
) -> Outcome:
    figures = {key: [0.5] * len(CLIPS) for key in FIGURES} | {"psnr": (CLIPS + psnr).tolist()}
    recipes = dict(curve_recipes("all", 0.2)).get(name, ())
    computed = None if density is None else DENSE + (1 - DENSE) * (density + twice)
    return Outcome(
        name=name,
        kind=kind,
        calls=24,
        seconds=1.0,
        exact=kind == "reference",
        figures=figures,
        density=density,
        computed=computed,
        recipes=[recipe.to_dict() for recipe in recipes],
        kernels=["triton"] if recipes else [],
    )


@pytest.fixture
def found() -> Generation:
    outcomes = [outcome("dense, 24 steps", "reference", 100)]
    for density, ours, control in ((0.5, 40, 30), (0.2, 34, 20), (0.1, 28, 12), (0.05, 22, 8)):
        outcomes.append(outcome(f"SubBlock(density={density})", "curve", ours, density))
        outcomes.append(outcome(f"RandomBlocks(density={density})", "curve", control, density))
    outcomes += [
        outcome("EfficientVDiT(references=2)", "curve", 25, 0.53),
        outcome("EfficientVDiT(references=1)", "curve", 24, 0.34),
        outcome("SubBlock(density=0.2) + ZerothOrder", "compensated", 35.5, 0.2),
        # Half of its sparse calls are done densely too.
        outcome("SubBlock(density=0.2) + Rettention", "compensated", 36, 0.2, twice=0.3),
        outcome("SubBlock(density=0.2) + DeltaRows", "compensated", 36, 0.2, twice=0.5),
    ]
    return Generation(
        model="m",
        sha256="0",
        pairs=len(CLIPS),
        clip=[16, 128, 128],
        guidance=2.0,
        precision="float32",
        quick=False,
        environment={"hardware": "here", "command": "c", "commit": None},
        outcomes=outcomes,
        dense_steps=0.2,
    )


def test_a_curve_is_read_between_its_points_and_never_outside() -> None:
    low, high = torch.tensor([10.0, 20.0]), torch.tensor([30.0, 60.0])
    curve = Curve("x", "f", (Point("a", 0.1, 0.3, low), Point("b", 0.4, 0.6, high)))
    assert at_density(curve, 0.1) is low
    assert at_density(curve, 0.4) is high
    # Half way in the logarithm.
    assert at_density(curve, 0.2).tolist() == pytest.approx([20.0, 40.0])
    assert at_density(curve, 0.3, lambda point: point.computed) is low
    assert at_density(curve, 0.099) is None
    assert at_density(curve, 0.41) is None


def test_policies_are_ranked_by_paired_differences_where_they_were_measured(found) -> None:
    first, second = ranking(found, 0.2)
    assert (first.policy, second.policy) == ("SubBlock", "RandomBlocks")
    assert first.psnr.value == pytest.approx(34)
    assert first.psnr.high - first.psnr.low > 5
    # Pairs cancel what clips differ by.
    assert first.to_control.value == pytest.approx(14)
    assert first.to_control.high - first.to_control.low < 1e-6
    assert (first.to_best, second.to_control) == (None, None)
    assert second.to_best.value == pytest.approx(-14)
    assert [curve.policy for curve in out_of_range(found, 0.2)] == ["EfficientVDiT"]
    assert curves(found)[0].policy == "RandomBlocks"
    assert ranking(found, 0.01) == []


def test_the_whole_run_of_a_density_is_that_of_the_control(found) -> None:
    assert whole_run(found, 0.1) == pytest.approx(DENSE + (1 - DENSE) * 0.1)
    assert whole_run(replace(found, outcomes=found.outcomes[:2]), 0.1) is None


def test_a_term_is_compared_at_equal_density_and_at_equal_work(found) -> None:
    rows = {row.term: row for row in compensations(found)}
    assert rows["ZerothOrder"].gain.value == pytest.approx(1.5)
    assert rows["ZerothOrder"].gain_at_cost.value == pytest.approx(1.5)
    # At its work the policy alone reaches a density of one half, and more PSNR.
    assert rows["Rettention"].gain.value == pytest.approx(2)
    assert rows["Rettention"].gain_at_cost.value == pytest.approx(36 - 40)
    # Beyond the densest setting nothing is known.
    assert rows["DeltaRows"].gain_at_cost is None


def test_a_term_without_its_policy_alone_is_left_out(found) -> None:
    kept = [o for o in found.outcomes if o.name != "SubBlock(density=0.2)"]
    assert compensations(replace(found, outcomes=kept)) == []


def test_the_tables_say_what_could_not_be_read(found) -> None:
    text = curves_markdown(found)
    assert "| 1 | SubBlock | finer estimates | 34.0" in text
    assert "Not measured here: EfficientVDiT (34% to 53%)." in text
    assert "**At 20% of the sparse calls (36% of the whole run)**" in text
    assert "+14.0 (+14.0 to +14.0)" in text
    assert "sparse calls by triton" in text


def test_files_that_do_not_belong_together_are_not_joined(found) -> None:
    with pytest.raises(TubeletError, match=r"SubBlock\(density=0.5\) is in two"):
        join([found, found])
    for what, change in (
        ("pairs", {"pairs": 9}),
        ("dense_steps", {"dense_steps": 0.4}),
        ("hardware", {"environment": {"hardware": "there"}}),
    ):
        with pytest.raises(TubeletError, match=f"different {what}"):
            join([found, replace(found, **change)])
    other = outcome("dense, 12 steps", "reference", 100)
    with pytest.raises(TubeletError, match="different reference"):
        join([found, replace(found, outcomes=[other])])


def test_runs_of_different_policies_join_and_share_their_controls(found) -> None:
    floor = outcome("float32", "floor", 55)
    floor.figures["latent_error"] = [0.9] * len(CLIPS)
    reference, *others = found.outcomes
    one = replace(found, outcomes=[reference, floor, *others[:3]])
    two = replace(found, outcomes=[reference, floor, *others[3:]])
    joined = join([one, two])
    assert [o.name for o in joined.outcomes].count("float32") == 1
    assert len(joined.outcomes) == len(found.outcomes) + 1
    # Labels follow the floor, wherever it was drawn.
    assert joined.outcomes[-1].label == "lossless to rounding"
