"""Figures, advice and files of `tubelet bench answers`, from answers made by hand."""

import dataclasses

import pytest
import torch

from tubelet.bench.answers.advice import advice
from tubelet.bench.answers.ask import Outcome, Used
from tubelet.bench.answers.page import render
from tubelet.bench.answers.result import (
    Answers,
    Cell,
    Entry,
    Line,
    entry_of,
    join,
    read_answers,
    write_answers,
)
from tubelet.bench.answers.summary import by_kind, points, shown_keep, surely, unknown_kinds
from tubelet.bench.answers.tables import (
    budget_table,
    cells_of,
    dense_table,
    kind_table,
    markdown,
    whole_table,
)
from tubelet.bench.fidelity.stats import Estimate, difference
from tubelet.core.errors import TubeletError

CLIPS = 200
KINDS = ["colour", "exists"]


def right(*shares: float) -> torch.Tensor:
    """[kinds, CLIPS] of which the first are right."""
    return torch.stack([(torch.arange(CLIPS) < share * CLIPS).float() for share in shares])


LINES = {
    "dense": ("dense", "dense", None, 1.0, right(0.9, 0.5)),
    "RandomPrompt 0.5": ("RandomPrompt", "control", 0.5, 0.5, right(0.7, 0.5)),
    "RandomPrompt 0.25": ("RandomPrompt", "control", 0.25, 0.25, right(0.3, 0.5)),
    "UniformFrames 0.25": ("UniformFrames", "control", 0.25, 0.25, right(0.6, 0.5)),
    "Good 0.25": ("Good", "prompt", 0.25, 0.25, right(0.6, 0.5)),
    "Bad 0.25": ("Bad", "prompt", 0.25, 0.25, right(0.1, 0.5)),
    "Inner 0.25": ("Inner", "layers", 0.25, 0.375, right(0.62, 0.5)),
}


def entry(share: float, answers: torch.Tensor, **used: float) -> Entry:
    inside = Used(entering=share, layers=share, last=share, **used)
    return Entry(right=answers, used=inside, seconds=0.001)


def made(backgrounds=("static", "pan"), parts=(0,), of=1, **changes) -> Answers:
    variants = {
        name: Line(family=family, kind=kind, keep=keep, setting=f"{family}()")
        for name, (family, kind, keep, *_) in LINES.items()
    }
    variants["Sparse"] = Line(family="Sparse", kind="prefill", keep=None, setting="Sparse()")
    for keep in (0.5, 0.25):
        variants[f"Broken {keep}"] = Line(family="Broken", kind="prompt", keep=keep, setting="-")
    entries = {name: entry(share, answers) for name, (*_, share, answers) in LINES.items()}
    entries["Sparse"] = entry(1.0, right(0.85, 0.5), density=0.3)
    run = Answers(
        environment={
            "commit": "abc", "command": "tubelet", "hardware": "none", "python": "3",
            "versions": {"torch": "2", "transformers": "5"},
        },
        commands=["tubelet"],
        model={
            "name": "m", "sha256": "0" * 64, "parameters": 5, "encoder": "e", "encoder_sha256": "1",
        },
        precision="float32",
        clips=CLIPS,
        parts=of,
        wanted=list(backgrounds),
        kinds=KINDS,
        chances={"colour": 1 / 6, "exists": 0.5},
        first_seed=7,
        num_video=512,
        depth=6,
        quick=False,
        variants=variants,
        cells=[Cell(background=b, parts=list(parts), entries=dict(entries)) for b in backgrounds],
        failures={"Broken 0.5": "ShapeError: no", "Broken 0.25": "ShapeError: no"},
        notes=["a note"],
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


# Figures


def test_differences_are_paired_with_dense():
    found = {point.name: point for point in points(made(), "static")}
    good = found["Good 0.25"]
    assert good.difference.value == pytest.approx((0.6 - 0.9) / 2)
    wanted = difference(list(right(0.6, 0.5)), list(right(0.9, 0.5)))
    assert good.difference == wanted
    # Unpaired, the kind that does not change would add noise of its own.
    assert good.difference.error < 0.02
    assert found["dense"].difference.value == 0


def test_controls_are_read_off_at_the_same_tokens_per_layer():
    found = {point.name: point for point in points(made(), "static")}
    assert found["Good 0.25"].over_random.value == pytest.approx((0.6 - 0.3) / 2)
    assert found["Good 0.25"].over_frames.value == 0
    # Half way between random drop at 0.25 and at 0.5.
    assert found["Inner 0.25"].over_random.value == pytest.approx((0.62 - 0.5) / 2)
    assert found["RandomPrompt 0.25"].over_random is None
    assert found["Sparse"].over_random is None
    few = dataclasses.replace(made(), cells=made().cells[:1])
    late = Used(entering=1.0, layers=0.75, last=0.5)
    few.cells[0].entries["Inner 0.25"] = Entry(right=right(0.9, 0.5), used=late, seconds=0.0)
    inside = {point.name: point for point in points(few, "static")}["Inner 0.25"]
    # Half way between random drop at 0.5 and dense.
    assert inside.over_random.value == pytest.approx((0.9 - 0.8) / 2)
    few.cells[0].entries["Bad 0.25"] = entry(0.1, right(0.1, 0.5))
    below = {point.name: point for point in points(few, "static")}["Bad 0.25"]
    assert below.over_random is None


def test_kinds_are_counted_over_all_backgrounds():
    table = by_kind(made(), "Good 0.25")
    assert (table["colour"].right, table["colour"].total) == (240, 400)
    assert table["colour"].known == pytest.approx((0.6 - 1 / 6) / (0.9 - 1 / 6))
    # Dense is at chance there.
    assert table["exists"].known is None
    assert unknown_kinds(made()) == ["exists"]
    run = made()
    del run.cells[1].entries["Good 0.25"]
    assert by_kind(run, "Good 0.25") is None


def test_many_looks_need_more_evidence():
    just = Estimate(0.1, 0.005, 0.195, 0.0485)
    assert (surely(just, 1), surely(just, 30)) == (1, 0)
    assert surely(Estimate(-1, -1.1, -0.9, 0.05), 30) == -1
    assert surely(None, 1) == 0
    assert shown_keep(made()) == 0.25


# Words


def test_advice_names_the_best_the_lost_and_the_idle():
    told = "\n".join(advice(made()))
    assert "Dense itself answers exists no better than a guess" in told
    assert (
        "On static, set to 0.25 of the tokens: best is Inner (-14.0 points to dense at 38%" in told
    )
    assert "Good (-15.0 points to dense at 25% of the tokens per layer) in front" in told
    assert "best worst case in front of the language model: -15.0 points" in told
    assert "Surely worse than random drop at as many tokens per layer: Bad (static at 0.25" in told
    assert "Nowhere surely better than random drop at as many tokens per layer: Bad." in told
    assert "No recipe is surely better than fewer frames at as many tokens per layer." in told
    assert "Sparse -2.5 points (density 0.30, on static)" in told
    assert "Inner is surely better than random drop" in told
    assert "RandomPrompt -30.0 points, UniformFrames -15.0 points." in told
    assert "Collapsing" not in told


def test_backgrounds_that_dense_cannot_answer_are_left_out():
    run = made()
    for name in run.cells[1].entries:
        run.cells[1].entries[name] = entry(1.0, right(0.1, 0.5))
    told = advice(run)
    assert told[0].startswith("On pan dense answers no better than a guess")
    assert any(line.startswith("On static, set to") for line in told)
    assert not any(line.startswith("On pan, set to") for line in told)
    run.cells[0] = run.cells[1]
    assert len(advice(run)) == 2


def test_recipes_that_are_all_idle_are_not_listed():
    run = made()
    for cell in run.cells:
        for name in ("Good 0.25", "Inner 0.25"):
            cell.entries[name] = entry(0.25, right(0.3, 0.5))
    told = advice(run)
    assert "No recipe is surely better than random drop at as many tokens per layer." in told
    assert any(" is not surely better" in line for line in told)


def test_a_kind_collapses_where_the_median_recipe_loses_it():
    run = made()
    for cell in run.cells:
        cell.entries["Good 0.25"] = entry(0.25, right(0.3, 0.5))
    told = "\n".join(advice(run))
    assert "Collapsing at 0.25 of the tokens: colour (18%; the best recipe 62%)" in told
    for cell in run.cells:
        for name in ("Good 0.25", "Inner 0.25"):
            cell.entries[name] = entry(0.25, right(0.89, 0.5))
    assert "Hardly touched at 0.25 of the tokens, by the median recipe: colour" in "\n".join(
        advice(run)
    )


def test_smoke_tests_advise_nothing():
    (line,) = advice(made(quick=True))
    assert "smoke test" in line
    bare = made()
    for name in ("Good 0.25", "Bad 0.25", "Inner 0.25"):
        bare.variants.pop(name)
        for cell in bare.cells:
            cell.entries.pop(name)
    assert advice(bare) == ["No recipe that drops tokens was measured."]


def test_tables_show_differences_with_tokens():
    shown = budget_table(made(), "static")
    good = next(line for line in shown.splitlines() if line.startswith("| Good"))
    assert good.startswith("| Good | - | **-15.0 ±")
    assert good.endswith("(25 / 25) |")
    assert "| Bad | - | -40.0 ±" in shown
    assert "Sparse" not in shown
    assert "density 0.30" in whole_table(made())
    assert "| static | 90.0 | 50.0 | 70.0 |" in dense_table(made())
    assert "| a guess | 16.7 | 50.0 | 33.3 |" in dense_table(made())
    kinds = kind_table(made(), 0.25)
    assert "| Good | 25 | 60.0 ↓ | 50.0 |" in kinds
    assert "| dense | 100 | 90.0 | 50.0 |" in kinds
    header, rows = cells_of(kinds)
    assert header == ["recipe", "tokens", "colour", "exists"]
    assert {len(row) for row in rows} == {4}


def test_document_and_page_hold_everything():
    run = made()
    shown, page = markdown(run), render(run)
    for text in (shown, page):
        for words in (
            "Good",
            "Sparse",
            "not measured: Broken at 0.5, 0.25: ShapeError",
            "a note",
            "0" * 12,
        ):
            assert words in text
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<svg") == 4
    assert page.lstrip().startswith("<!doctype html>")
    assert "A part of the run only: static 1 of 2" in markdown(made(of=2))
    assert "A part of" not in shown
    assert "pan 0 of 1" in markdown(dataclasses.replace(run, cells=run.cells[:1]))


# Files


def test_a_result_comes_back_from_its_file(tmp_path):
    run = made()
    path = write_answers(tmp_path / "answers.json", run)
    again = read_answers(path)
    assert again.to_dict() == run.to_dict()
    for cell, other in zip(run.cells, again.cells, strict=True):
        for name, found in cell.entries.items():
            assert torch.equal(other.entries[name].right, found.right)
            assert other.entries[name].used == found.used
    data = run.to_dict()["cells"][0]["entries"]["Good 0.25"]
    assert (data["right"], data["total"]) == ({"colour": 120, "exists": 100}, CLIPS)


def test_shards_become_one_run():
    first = made(parts=(0, 2), of=3)
    second = made(parts=(1,), of=3, commands=["other"])
    for cell in second.cells:
        cell.entries["Good 0.25"] = entry(0.5, right(0.2, 0.5))
        del cell.entries["Bad 0.25"]
    whole = join([first, second])
    assert whole.complete
    assert not first.complete
    assert whole.commands == ["tubelet", "other"]
    cell = whole.cell("pan")
    assert cell.parts == [0, 2, 1]
    assert cell.entries["Good 0.25"].right.shape == (2, 2 * CLIPS)
    assert cell.entries["Good 0.25"].used.layers == pytest.approx(0.375)
    assert by_kind(whole, "Good 0.25")["colour"].right == 2 * (120 + 40)
    # What is not in all parts cannot be compared.
    assert "Bad 0.25" not in cell.entries


def test_shards_that_do_not_belong_together_are_refused():
    with pytest.raises(TubeletError, match="in two files"):
        join([made(), made()])
    with pytest.raises(TubeletError, match="differ in their clips"):
        join([made(), made(clips=3)])
    with pytest.raises(TubeletError, match="differ in their model"):
        join([made(), made(model={"name": "other"})])
    other = made(parts=(1,), of=2)
    other.variants["New"] = other.variants["Sparse"]
    with pytest.raises(TubeletError, match="other recipes"):
        join([made(of=2), other])
    moved = made(parts=(1,), of=2)
    moved.variants["Sparse"] = dataclasses.replace(moved.variants["Sparse"], setting="Sparse(2)")
    assert "Sparse ran as Sparse(); as Sparse(2), by shard" in join([made(of=2), moved]).notes


def test_batches_become_an_entry_by_their_sizes():
    outcomes = [
        Outcome(right=torch.tensor([True, False, True]), used=Used(layers=0.1), seconds=1.0),
        Outcome(right=torch.tensor([True]), used=Used(layers=0.5, density=0.5), seconds=3.0),
    ]
    found = entry_of(
        [outcomes[0], dataclasses.replace(outcomes[1], used=Used(layers=0.5))], [3, 1], 2
    )
    assert found.right.tolist() == [[1, 0], [1, 1]]
    assert found.used.layers == pytest.approx(0.2)
    assert found.seconds == pytest.approx(1.5)


def test_other_recipes_on_the_same_questions_stand_beside_each_other():
    other = made(commands=["other"], environment={**made().environment, "hardware": "a CPU"})
    other.variants["New"] = other.variants.pop("Sparse")
    for cell in other.cells:
        cell.entries["New"] = cell.entries.pop("Sparse")
    whole = join([made(), other])
    assert list(whole.variants)[-1] == "New"
    assert {"Sparse", "New"} <= whole.variants.keys()
    assert whole.complete
    assert whole.commands == ["tubelet", "other"]
    assert whole.environment["hardware"].endswith(" and a CPU")
    for cell in whole.cells:
        assert {"dense", "Sparse", "New"} <= cell.entries.keys()
        assert torch.equal(cell.entries["New"].right, made().cell("pan").entries["Sparse"].right)


def test_joined_variants_stand_in_the_order_of_one_run():
    later, earlier = made(), made()
    for run, family in ((later, "VidCom2"), (earlier, "EVS")):
        name = f"{family} 0.25"
        run.variants[name] = dataclasses.replace(run.variants["Good 0.25"], family=family)
        for cell in run.cells:
            cell.entries[name] = cell.entries["Good 0.25"]
    names = list(join([later, earlier]).variants)
    assert names[0] == "dense"
    assert names.index("RandomPrompt 0.5") < names.index("EVS 0.25") < names.index("VidCom2 0.25")


def test_runs_that_disagree_about_the_same_variant_are_not_compared():
    other = made()
    other.variants["New"] = other.variants["Sparse"]
    dense = other.cells[0].entries["dense"]
    flipped = dense.right.clone()
    flipped[0, 0] = 1 - flipped[0, 0]
    other.cells[0].entries["dense"] = dataclasses.replace(dense, right=flipped)
    with pytest.raises(TubeletError, match=r"disagree about 1 of \d+ answers of dense"):
        join([made(), other])
