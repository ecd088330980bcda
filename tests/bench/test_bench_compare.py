"""`tubelet.compare` on tiny hosts."""

import json
import re

import pytest
import torch

import tubelet
from tubelet.bench.ceiling import CountLog, Sliced
from tubelet.bench.html import render_page
from tubelet.bench.pictures import paint, strips
from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import RecipeError, ShapeError, TubeletError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.models.accelerate import accelerate
from tubelet.recipes import ATS, RLT, TESTA, RandomDrop, TempScale, ToMe, UniformPool
from tubelet.testing import tiny

GRID = TokenGrid(frames=4, height=4, width=4)


@pytest.fixture(scope="module")
def host():
    return tiny.build("videomae")


@pytest.fixture(scope="module")
def comparison(host):
    assignments: dict = {}
    result = tubelet.compare(
        host,
        tiny.clip(1),
        [ToMe(r=8), RandomDrop(), TempScale(), (RLT(), ToMe(r=4))],
        repeats=2,
        random_weights=True,
        assignments=assignments,
    )
    return result, assignments


def test_dense_comes_first_and_is_its_own_baseline(comparison) -> None:
    dense = comparison[0].rows[0]
    assert dense.name == "dense"
    assert (dense.speedup, dense.error, dense.top1) == (1.0, 0.0, 1.0)
    assert dense.cosine == pytest.approx(1.0)
    assert dense.tokens_per_layer == [64.0] * 4


def test_rows_tell_tokens_macs_and_agreement(comparison, host) -> None:
    rows = {row.name: row for row in comparison[0].rows}
    assert rows["ToMe(r=8)"].tokens_per_layer == [64, 56, 48, 40]
    assert rows["RandomDrop"].tokens_per_layer == [32] * 4
    assert rows["RandomDrop"].macs < 0.6 * rows["dense"].macs
    assert rows["TempScale"].ceiling is None
    assert 0 < rows["TempScale"].error < rows["RandomDrop"].error
    with torch.no_grad():
        dense = host(tiny.clip(1)).logits
        with accelerate(host, RandomDrop()):
            dropped = host(tiny.clip(1)).logits
    expected = float((dropped - dense).norm() / dense.norm())
    assert rows["RandomDrop"].error == pytest.approx(expected, rel=1e-5)


def test_combined_recipes_are_one_row(comparison) -> None:
    assert "RLT + ToMe(r=4)" in [row.name for row in comparison[0].rows]


def test_the_ceiling_has_the_same_token_counts(host) -> None:
    log = CountLog()
    pixels = tiny.clip(1)
    with torch.no_grad(), accelerate(host, log.watch(ToMe(r=(9, 0, 5)))) as handle:
        host(pixels)
        wanted = handle.report().tokens_per_layer
    sliced = log.sliced()
    assert isinstance(sliced, Sliced)
    with torch.no_grad(), accelerate(host, sliced) as handle:
        host(pixels)
        assert handle.report().tokens_per_layer == wanted == [64, 55, 55, 50]


def test_the_ceiling_follows_divided_attention() -> None:
    host, log = tiny.build("timesformer"), CountLog()
    with torch.no_grad(), accelerate(host, log.watch(TESTA(frames=1, patches=3))) as handle:
        host(tiny.clip(1))
        wanted = handle.report().tokens_per_layer
    sliced = log.sliced()
    assert sliced is not None
    with torch.no_grad(), accelerate(host, sliced) as handle:
        host(tiny.clip(1))
        assert handle.report().tokens_per_layer == wanted
    assert wanted[1] == 1 + 7 * 13


def test_the_model_is_left_as_it_was(host) -> None:
    pixels = tiny.clip(1)
    with torch.no_grad():
        before = host(pixels).logits
        tubelet.compare(host, pixels, [ToMe(r=8)], repeats=1)
        assert torch.equal(host(pixels).logits, before)


def test_hosts_without_fused_attention_get_it_in_the_baseline() -> None:
    result = tubelet.compare(
        tiny.build("timesformer_joint"), tiny.clip(1), [UniformPool()], repeats=1
    )
    assert any("no fused attention" in note for note in result.notes)
    assert result.rows[0].report["attention"] == {"fused by tubelet": 4}


def test_refusals_come_before_any_run(host, monkeypatch) -> None:
    monkeypatch.setattr(type(host), "forward", None)
    with pytest.raises(UnsupportedError, match="class token"):
        tubelet.compare(host, tiny.clip(1), [ToMe(r=8), ATS()])


def test_bad_input_is_named(host) -> None:
    pixels = tiny.clip(1)
    pixels[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ShapeError, match="NaN"):
        tubelet.compare(host, pixels, [ToMe(r=8)])
    with pytest.raises(RecipeError, match="needs recipes"):
        tubelet.compare(host, tiny.clip(1), [])
    with pytest.raises(RecipeError, match="repeats"):
        tubelet.compare(host, tiny.clip(1), [ToMe(r=8)], repeats=0)


def test_a_recipe_without_effect_is_noted_once(host, recwarn) -> None:
    result = tubelet.compare(host, tiny.clip(1), [ToMe(r=0)], repeats=2)
    assert result.notes == ["ToMe(r=0) never changed anything on this clip"]
    assert len(recwarn) == 0


def test_json_holds_every_figure(comparison, tmp_path) -> None:
    data = json.loads(comparison[0].to_json(tmp_path / "report.json").read_text())
    assert data["random_weights"] is True
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert len(data["environment"]["hardware"]) > 0
    row = data["rows"][1]
    assert row["overhead"] == pytest.approx(1 / row["speedup"] - 1 / row["ceiling"])
    assert row["of_ceiling"] == pytest.approx(row["speedup"] / row["ceiling"])
    assert len(row["samples"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_unwritable_folder_is_one_clear_error(comparison, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TubeletError, match="cannot write"):
        comparison[0].to_json(blocked / "report.json")


def test_the_table_marks_random_weights(comparison) -> None:
    text = comparison[0].table()
    assert "[random weights]" in text
    assert all(row.name in text for row in comparison[0].rows)


def test_the_page_is_self_contained_and_escaped(comparison) -> None:
    result, assignments = comparison
    frames = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)
    page = render_page(result, strips(frames, GRID, assignments))
    assert "random weights" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    # Addresses appear in SVG namespaces only; nothing is fetched.
    fetched = re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page.replace("xlink:href", "href"))
    assert fetched == []
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert "data:image/jpeg;base64," in page


def test_pictures_dim_dropped_and_colour_merged_tokens() -> None:
    frames = torch.full((4, 3, 32, 32), 0.5)
    index = torch.arange(64)[None].clone()
    kept = torch.tensor([[i for i in range(64) if i not in (3, 7)]])
    index[0, 3] = -1
    index[0, 7] = 6
    assignment = TokenAssignment.merge(index, kept, torch.ones(1, 64))
    painted = paint(frames, GRID, assignment)

    def cell(token: int) -> torch.Tensor:
        row, column = divmod(token, 4)
        return painted[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]

    assert cell(3).max() < 0.2
    assert torch.equal(cell(0), torch.full((3, 8, 8), 0.5))
    assert torch.equal(cell(6), cell(7))
    assert not torch.equal(cell(6), cell(0))


def test_pictures_refuse_another_grid() -> None:
    with pytest.raises(ShapeError, match="grid"):
        paint(torch.zeros(4, 3, 32, 32), GRID, TokenAssignment.identity(1, 10))


@pytest.mark.parametrize(
    ("recipes", "words"),
    [
        ([ToMe], "instances"),
        ([[]], "instances"),
        ("ToMe", "instances"),
        ([ToMe(), ToMe()], "twice"),
    ],
)
def test_what_is_no_list_of_recipes_is_named(host, recipes, words) -> None:
    with pytest.raises(RecipeError, match=words):
        tubelet.compare(host, tiny.clip(1), recipes)


def test_a_single_recipe_and_further_arguments_are_taken() -> None:
    vivit = tiny.build("vivit")
    inputs = {"pixel_values": tiny.clip(1), "interpolate_pos_encoding": False}
    assert len(tubelet.compare(vivit, inputs, ToMe(r=4), repeats=1, ceiling=False).rows) == 2


def test_the_clip_goes_in_under_the_name_that_the_model_wants() -> None:
    result = tubelet.compare(tiny.build("vjepa2"), tiny.clip(1), ToMe(r=4), repeats=1)
    assert result.rows[0].tokens_per_layer == [64.0] * 4


def test_a_clip_of_another_dtype_or_no_clip_is_named(host) -> None:
    with pytest.raises(ShapeError, match="float16"):
        tubelet.compare(host, tiny.clip(1).half(), ToMe(r=4))
    with pytest.raises(ShapeError, match="needs a clip"):
        tubelet.compare(host, {}, ToMe(r=4))
