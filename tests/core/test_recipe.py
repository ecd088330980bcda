"""Recipe fields: ranges, types and texts, on small recipes defined here."""

import dataclasses
import json
import pickle
from dataclasses import dataclass

import pytest

from tubelet.core.errors import RecipeError
from tubelet.core.fields import describe_type
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import (
    Action,
    Paper,
    Recipe,
    SparseAttention,
    StepCache,
    TokenReduction,
    param,
)
from tubelet.core.text import recipe_from_dict


@dataclass(frozen=True, kw_only=True)
class Everything(SparseAttention):
    """One field of every kind."""

    share: float = param(0.5, "share", above=0, most=1)
    count: int = param(4, "count", least=0, below=10)
    block: tuple[int, int] = param((2, 3), "block", least=1)
    layers: tuple[int, ...] = param((), "layers", least=0)
    either: int | tuple[int, ...] = param(8, "one or many", least=0)
    limit: float | None = param(None, "limit", above=0)
    exact: bool = param(False, "flag")
    mode: str = param("mean", "mode")

    def acts_on(self, site):
        return True

    def plan(self, ctx):
        return AttentionPlan()


KNOWN = {"Everything": Everything}


def test_defaults_are_taken_as_written():
    recipe = Everything()
    assert (recipe.share, recipe.count, recipe.block) == (0.5, 4, (2, 3))
    assert (recipe.layers, recipe.either, recipe.limit) == ((), 8, None)
    assert recipe.exact is False


@pytest.mark.parametrize(
    ("field", "given", "stored"),
    [
        ("share", 1, 1.0),
        ("block", [4, 5], (4, 5)),
        ("layers", [0, 2, 5], (0, 2, 5)),
        ("layers", (), ()),
        ("either", 3, 3),
        ("either", [1, 2], (1, 2)),
        ("limit", 2, 2.0),
        ("limit", None, None),
        ("exact", True, True),
        ("mode", "max", "max"),
    ],
)
def test_values_take_the_annotated_type(field, given, stored):
    value = getattr(Everything(**{field: given}), field)
    assert value == stored
    assert type(value) is type(stored)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", "0.5"),
        ("share", True),
        ("share", None),
        ("share", (0.5,)),
        ("count", 1.0),
        ("count", True),
        ("count", "3"),
        ("block", (1,)),
        ("block", (1, 2, 3)),
        ("block", (1, 2.0)),
        ("block", (1, True)),
        ("block", "12"),
        ("block", 3),
        ("layers", 1),
        ("layers", ("a",)),
        ("either", 1.5),
        ("either", (1, None)),
        ("limit", "none"),
        ("limit", False),
        ("exact", 1),
        ("exact", None),
        ("mode", 3),
        ("mode", b"max"),
    ],
)
def test_values_of_another_type_are_refused_by_name(field, value):
    with pytest.raises(RecipeError) as caught:
        Everything(**{field: value})
    wanted = describe_type(Everything, field)
    assert str(caught.value) == f"Everything.{field} must be {wanted}, got {value!r}"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("share", 0.0, "> 0 and <= 1"),
        ("share", 1.01, "> 0 and <= 1"),
        ("share", float("nan"), "> 0 and <= 1"),
        ("share", -float("inf"), "> 0 and <= 1"),
        ("count", -1, ">= 0 and < 10"),
        ("count", 10, ">= 0 and < 10"),
        ("block", (1, 0), ">= 1"),
        ("layers", (3, 2, -1), ">= 0"),
        ("either", -1, ">= 0"),
        ("either", (0, -1), ">= 0"),
        ("limit", 0.0, "> 0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(field, value, wanted):
    with pytest.raises(RecipeError) as caught:
        Everything(**{field: value})
    assert str(caught.value) == f"Everything.{field} must be {wanted}, got {value!r}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("share", 1.0), ("share", 1e-9), ("count", 0), ("count", 9), ("block", (1, 1))],
)
def test_the_ends_of_a_range_belong_to_it_as_stated(field, value):
    assert getattr(Everything(**{field: value}), field) == value


@dataclass(frozen=True, kw_only=True)
class Free(Everything):
    scale: float = param(1.0, "no bounds")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_without_bounds_must_still_be_finite(value):
    with pytest.raises(RecipeError, match=r"Free\.scale must be finite"):
        Free(scale=value)


@dataclass(frozen=True, kw_only=True)
class WrongDefault(Everything):
    share: float = param(2.0, "share", most=1)


def test_defaults_are_checked_too():
    with pytest.raises(RecipeError, match=r"WrongDefault\.share must be <= 1, got 2\.0"):
        WrongDefault()


def test_types_are_described_in_words():
    names = {f.name: describe_type(Everything, f.name) for f in dataclasses.fields(Everything)}
    assert names["share"] == "float"
    assert names["exact"] == "bool"
    assert names["block"] == "tuple[int, int]"
    assert names["limit"] == "float | None"


def test_params_carry_their_meaning_and_range():
    fields = {f.name: f.metadata for f in dataclasses.fields(Everything)}
    assert fields["share"] == {"doc": "share", "bounds": {">": 0, "<=": 1}}
    assert fields["mode"] == {"doc": "mode", "bounds": {}}


def test_text_shows_only_what_differs_from_the_defaults():
    assert str(Everything()) == "Everything"
    assert str(Everything(share=0.5, count=4)) == "Everything"
    changed = Everything(share=1, block=[1, 2], mode="max", limit=None)
    assert str(changed) == "Everything(share=1.0, block=(1, 2), mode='max')"


def test_recipes_are_frozen_keyword_only_values():
    recipe = Everything(count=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.count = 4
    with pytest.raises(TypeError):
        Everything(0.5)
    assert recipe == Everything(count=3)
    assert hash(recipe) == hash(Everything(count=3))
    assert recipe != Everything()


@pytest.mark.parametrize(
    "recipe",
    [Everything(), Everything(share=1, block=(7, 8), either=(1, 2), limit=3, exact=True)],
    ids=str,
)
def test_json_and_pickle_give_the_same_recipe(recipe):
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), KNOWN) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_the_dict_names_recipe_and_every_field():
    data = Everything().to_dict()
    assert data.pop("recipe") == "Everything"
    assert list(data) == [f.name for f in dataclasses.fields(Everything)]


@pytest.mark.parametrize("base", [Recipe, TokenReduction, SparseAttention, StepCache])
def test_stages_cannot_be_used_without_their_method(base):
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_token_reductions_do_not_bias_attention_unless_they_say_so():
    @dataclass(frozen=True, kw_only=True)
    class Plain(TokenReduction):
        def acts_on(self, site):
            return True

        def plan(self, ctx):
            return None

    assert Plain().size_bias is False
    assert Plain().stage == "tokens"


def test_papers_are_cited_by_title_venue_and_address():
    paper = Paper("Token merging", arxiv="2210.09461", venue="ICLR", year=2023)
    assert str(paper) == "Token merging (ICLR 2023)"
    assert paper.url == "https://arxiv.org/abs/2210.09461"
    assert str(Paper("Notes")) == "Notes"
    assert Paper("Notes").url is None
    assert str(Paper("Notes", year=2020)) == "Notes (2020)"


def test_steps_have_four_actions():
    assert [action.name for action in Action] == ["COMPUTE", "REUSE", "FORECAST", "SKIP"]
