"""Joining, summaries, page and tables of the fidelity bench, on made-up scores."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tubelet.bench.fidelity.advice import advice
from tubelet.bench.fidelity.cells import Cell, Entry
from tubelet.bench.fidelity.hosts import Host
from tubelet.bench.fidelity.page import render
from tubelet.bench.fidelity.result import Fidelity, Line, join, read_runs, write_runs
from tubelet.bench.fidelity.run import Request, checked_cells, measure, write
from tubelet.bench.fidelity.summary import average_standings, points, standings, summary
from tubelet.bench.fidelity.svg import spread, ticks
from tubelet.bench.fidelity.tables import docs_table
from tubelet.bench.fidelity.timing import Latency
from tubelet.core.errors import TubeletError
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.train.clips import make_clips

LOSS = {"RandomDrop": 0.8, "oracle": 0.1, "ToMe": 0.3, "RLT": 0.2, "fewer frames": 0.9}
KINDS = {"RandomDrop": "random", "oracle": "oracle", "fewer frames": "baseline"}
NUM = 800


def made_up(seed: str = "0", shift: float = 0.0, rlt_on_pan: float = 1.2) -> Fidelity:
    """Scores that fall with the square of the tokens taken away, at a rate of each family's own."""
    lines = {"dense": Line(family="dense", kind="dense", regime="training-free", keep=None)}
    lines["dense, small"] = replace(lines["dense"], family="smaller dense", kind="small")
    for family in LOSS:
        for keep in (0.5, 0.25):
            lines[f"{family} {keep}"] = Line(
                family=family, kind=KINDS.get(family, "method"), regime="training-free", keep=keep
            )
    lines["single frame"] = replace(lines["dense"], family="single frame", kind="control")
    cells = []
    for number, task in enumerate(("direction", "needle")):
        for background in ("static", "pan"):
            level = torch.rand(NUM, generator=torch.Generator().manual_seed(number))
            entries = {}
            for name, line in lines.items():
                loss = LOSS.get(line.family, 0.0)
                if (line.family, background) == ("RLT", "pan"):
                    loss = rlt_on_pan
                right = 0.9 + shift - loss * (1 - (line.keep or 1)) ** 2
                right = {"single frame": 0.12, "dense, small": 0.86}.get(name, right)
                entries[name] = Entry(
                    setting=name,
                    share=line.keep or 1.0,
                    macs=int(1e9 * (0.2 if line.kind == "small" else line.keep or 1)),
                    scores=(level < right).float(),
                )
            floors = {"single frame": 0.125}
            cells.append(
                Cell(task=task, background=background, chance=0.125, floors=floors, entries=entries)
            )
    latencies = [
        Latency(
            variant=name, background=background, batch=batch, dense=0.01, repeats=3,
            seconds=0.012 if (line.kind, batch) == ("method", 1) else 0.01 * (line.keep or 1),
        )
        for name, line in lines.items()
        for background in ("static", "pan")
        for batch in (64, 1)
    ]  # fmt: skip
    return Fidelity(
        seed_name=seed, quick=False, precision="float32", clips=NUM, first_seed=2**40,
        core_tasks=("direction", "needle", "collisions"),
        models=[{"name": "m", "role": "dense", "sha256": seed * 64, "parameters": 10**6}],
        environment={"command": "x", "commit": "c", "hardware": "h", "python": "3", "versions": {}},
        variants=lines, cells=cells, latencies=latencies, notes=["a <b>note</b>"],
    )  # fmt: skip


def test_rankings_follow_the_scores() -> None:
    rows = [row for row in standings(made_up(), 0.25) if row.background == "static"]
    assert [row.family for row in rows] == ["oracle", "RLT", "ToMe", "RandomDrop", "fewer frames"]
    tome = rows[2]
    assert tome.difference.value == pytest.approx(-0.3 * 0.75**2, abs=0.03)
    assert tome.gap.value == pytest.approx((0.8 - 0.3) / (0.8 - 0.1), abs=0.05)
    assert rows[0].gap.value == pytest.approx(1)


def test_a_share_between_two_points_is_interpolated_and_beyond_is_left_out() -> None:
    between = {(r.family, r.background): r for r in standings(made_up(), 0.375)}
    ends = [made_up_value("ToMe", keep) for keep in (0.25, 0.5)]
    assert between["ToMe", "static"].score.value == pytest.approx(sum(ends) / 2, abs=0.02)
    assert standings(made_up(), 0.1) == []


def made_up_value(family: str, keep: float) -> float:
    return 0.9 - LOSS[family] * (1 - keep) ** 2


def test_points_carry_cost_and_paired_differences() -> None:
    found = {(p.variant, p.background): p for p in points(made_up())}
    assert ("single frame", "static") not in found
    point = found["ToMe 0.5", "static"]
    assert point.macs == 5e8
    assert point.seconds == {64: pytest.approx(0.005), 1: pytest.approx(0.012)}
    assert point.difference.high < 0
    assert found["dense", "static"].gap is None


def test_shards_join_into_the_whole_run(tmp_path) -> None:
    whole = made_up()
    parts = [replace(whole, cells=whole.cells[i::2]) for i in range(2)]
    paths = [
        write_runs(tmp_path / f"{i}.json", [part], summary([part])) for i, part in enumerate(parts)
    ]
    joined = join([run for path in paths for run in read_runs(path)])
    assert len(joined) == 1
    for background in ("static", "pan"):
        for task in ("direction", "needle"):
            ours, theirs = (run.cell(task, background).entries for run in (joined[0], whole))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n].scores, theirs[n].scores) for n in ours)
    assert docs_table(joined) == docs_table(whole) or sorted(
        docs_table(joined).splitlines()
    ) == sorted(docs_table(whole).splitlines())


def test_what_does_not_belong_together_is_not_joined(tmp_path) -> None:
    run = made_up()
    with pytest.raises(TubeletError, match="two files of seed '0'"):
        join([run, run])
    other = replace(run, cells=run.cells[:1], models=[{"name": "other"}])
    with pytest.raises(TubeletError, match="different models"):
        join([replace(run, cells=run.cells[1:]), other])
    with pytest.raises(TubeletError, match="other clips"):
        join([run, replace(run, seed_name="1", clips=3)])
    (tmp_path / "x.json").write_text('{"kind": "else", "schema": 1}')
    with pytest.raises(TubeletError, match="is 'else'"):
        read_runs(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(TubeletError, match="not a result"):
        read_runs(tmp_path / "y.json")
    with pytest.raises(TubeletError, match="cannot read"):
        read_runs(tmp_path / "none.json")


def test_runs_over_seeds_have_intervals_over_seeds() -> None:
    runs = join([made_up(str(i), shift) for i, shift in enumerate((-0.03, 0.0, 0.03))])
    assert len(runs) == 3
    rows = {(r.family, r.background): r for r in average_standings(runs, 0.5)}
    row = rows["ToMe", "static"]
    assert row.score.value == pytest.approx(made_up_value("ToMe", 0.5), abs=0.03)
    # Student's t for three seeds a step of 0.03 apart.
    assert row.score.high - row.score.value == pytest.approx(4.303 * 0.03 / 3**0.5, rel=0.25)
    assert "3 training seeds" in docs_table(runs)
    assert len(summary(runs)["seeds"]) == 3


def test_sharding_the_measurement_changes_nothing() -> None:
    torch.manual_seed(0)
    model = VideoViT(VideoViTConfig(width=16, depth=2, heads=2)).eval()
    host = Host(name="t", role="dense", model=model, checksum="0")
    request = Request(
        out=Path(), tasks=("direction", "collisions"), backgrounds=("static",), keeps=(1.0, 0.5),
        recipes=("RLT",), clips=3, latency=False,
    )  # fmt: skip

    def go(shard: tuple[int, int]) -> Fidelity:
        own = replace(request, shard=shard)
        return measure(own, [host], checked_cells(own), lambda *a: None, make_clips)

    whole, joined = go((1, 1)), join([go((1, 2)), go((2, 2))])[0]
    assert [(c.task, c.background) for c in whole.cells] == [
        (c.task, c.background) for c in joined.cells
    ]
    for ours, theirs in zip(joined.cells, whole.cells, strict=True):
        for name, entry in theirs.entries.items():
            assert torch.equal(ours.entries[name].scores, entry.scores), name
            assert ours.entries[name].share == entry.share
    with pytest.raises(TubeletError, match="has no cell"):
        go((3, 3))


def test_the_page_stands_alone(tmp_path) -> None:
    write(tmp_path, [made_up()])
    page = (tmp_path / "fidelity.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 2 * 3
    assert "a &lt;b&gt;note" in page
    for label in ("RandomDrop", "oracle", "ToMe", "RLT"):
        assert f">{label}</text>" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "fidelity.html", "fidelity.json", "fidelity.md",
    ]  # fmt: skip


def test_several_seeds_render() -> None:
    runs = [made_up("0"), made_up("1", 0.02)]
    assert "2 training seeds" in render(runs)


def test_advice_says_what_the_figures_say() -> None:
    text = "\n".join(advice([made_up()]))
    assert "On static at 50% of the tokens, training-free: use RLT" in text
    assert "On pan at 25% of the tokens, training-free: use ToMe" in text
    assert "RLT depends on the background" in text
    assert "Do not use RLT on pan at 50%, pan at 25%: it loses to random drop." in text
    assert "at 25% of the tokens ToMe has the best worst case" in text
    assert "With batches of 1, RLT, ToMe can be slower than dense" in text
    assert "With batches of 64, RLT, ToMe are never slower" in text
    calm = "\n".join(advice([made_up(rlt_on_pan=0.2)]))
    assert "depends on the background" not in calm
    assert "Do not use" not in calm


def test_advice_of_a_smoke_test_is_none() -> None:
    assert advice([replace(made_up(), quick=True)])[0].startswith("This was a smoke test")


def test_a_failing_control_is_marked() -> None:
    run = made_up()
    leaky = run.cells[0].entries["single frame"]
    run.cells[0].entries["single frame"] = replace(leaky, scores=torch.ones(NUM))
    text = docs_table(run)
    assert text.count("**leak**") == 1
    assert "A control is above its floor" in text


def test_a_control_that_is_high_by_chance_is_no_leak() -> None:
    run = made_up()
    entry = run.cells[0].entries["single frame"]
    # 2.1 standard errors above the floor: one of many controls gets there by luck.
    high = (torch.arange(NUM) < NUM * 0.125 + 2.1 * (NUM * 0.125 * 0.875) ** 0.5).float()
    run.cells[0].entries["single frame"] = replace(entry, scores=high)
    text = docs_table(run)
    assert "above 2 s.e." in text
    assert "**leak**" not in text
    assert "A control is above its floor" not in text


def test_the_smaller_model_is_told_where_it_wins() -> None:
    run = made_up()
    for cell in run.cells:
        cheap = cell.entries["ToMe 0.25"]
        cell.entries["ToMe 0.25"] = replace(cheap, macs=10**8)
    assert "the smaller model small beats every training-free recipe" in "\n".join(advice([run]))


def test_labels_never_overlap() -> None:
    places = spread([10, 11, 12, 300], 16, 0, 310)
    assert all(b - a >= 16 for a, b in itertools.pairwise(places))
    assert places[-1] <= 310
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
