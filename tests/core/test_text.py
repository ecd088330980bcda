"""Recipes from text: parsed against the fields, never evaluated."""

import os
import warnings
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tubelet.core.errors import RecipeError
from tubelet.core.recipe import TokenReduction, param
from tubelet.core.text import build_recipe, parse_recipe, recipe_from_dict

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


@dataclass(frozen=True, kw_only=True)
class Merge(TokenReduction):
    r: int = param(8, "tokens", least=0)
    inflection: float = param(0.0, "slope", least=-1, most=1)
    factor: tuple[int, ...] = param((1, 2, 2), "box", least=1)
    mode: str = param("mean", "mode")
    cap: float | None = param(None, "cap")
    exact: bool = param(False, "flag")

    def acts_on(self, site):
        return True

    def plan(self, ctx):
        return None


@dataclass(frozen=True, kw_only=True)
class Prune(Merge):
    pass


KNOWN = {"Merge": Merge, "Prune": Prune}


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("Merge", Merge()),
        (" Merge ( ) ", Merge()),
        ("Merge(r=16)", Merge(r=16)),
        ("Merge(r=16,)", Merge(r=16)),
        ("Merge(factor=[2, 2], inflection=-1)", Merge(factor=(2, 2), inflection=-1.0)),
        ("Prune(mode='max', cap=0.5, exact=True)", Prune(mode="max", cap=0.5, exact=True)),
        ("Prune(\n  cap=None,\n  r=1,\n)", Prune(r=1)),
    ],
)
def test_names_and_fields_are_read(text, recipe):
    parsed = parse_recipe(text, KNOWN)
    assert parsed == recipe
    assert type(parsed) is type(recipe)


@st.composite
def recipes(draw):
    return draw(st.sampled_from([Merge, Prune]))(
        r=draw(st.integers(0, 10**6)),
        inflection=draw(st.floats(-1, 1)),
        factor=tuple(draw(st.lists(st.integers(1, 9), max_size=4))),
        mode=draw(st.text(max_size=8)),
        cap=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        exact=draw(st.booleans()),
    )


@SETTINGS
@given(recipes())
def test_the_text_of_a_recipe_is_read_back(recipe):
    assert parse_recipe(str(recipe), KNOWN) == recipe
    assert recipe_from_dict(recipe.to_dict(), KNOWN) == recipe


@pytest.mark.parametrize(
    "value",
    [
        '__import__("os").system("x")',
        "print('x')",
        "open",
        "os.environ",
        "[x for x in (1,)]",
        "lambda: 1",
        "f'{1}'",
        "(y := 3)",
        "8 if True else 9",
        "2 * 4",
        "-'a'",
    ],
)
def test_expressions_are_never_evaluated(monkeypatch, value):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(RecipeError, match="cannot read recipe"):
        parse_recipe(f"Merge(r={value})", KNOWN)
    assert ran == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "Merge(",
        "Merge(8)",
        "Merge(8, r=1)",
        "Merge(*(8,))",
        "Merge(**{'r': 8})",
        "Merge[8]",
        "Merge.plan()",
        "Merge()()",
        "Merge(r=8) + Merge()",
        "Merge; Merge",
        "'Merge'",
        "Merge(r=8) # why\nMerge",
        "import os",
        "Merge(r=\0)",
        "\ud800",
    ],
)
def test_other_forms_are_refused_with_an_example(text):
    with pytest.raises(RecipeError, match=r"cannot read recipe .*such as ToMe"):
        parse_recipe(text, KNOWN)


@pytest.mark.parametrize(
    "value",
    [
        "(" * 5000 + ")" * 5000,
        "[" * 150 + "]" * 150,
        "-" * 20000 + "1",
        "+".join(["1"] * 20000),
        "9" * 5000,
        "{" * 90 + "}" * 90,
    ],
    ids=lambda value: f"{value[:3]}x{len(value)}",
)
def test_deep_nesting_ends_in_a_recipe_error(value):
    with pytest.raises(RecipeError):
        parse_recipe(f"Merge(r={value})", KNOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Merg", r"unknown recipe 'Merg'; did you mean Merge\? known: Merge, Prune"),
        ("prune(r=1)", r"unknown recipe 'prune'; did you mean Prune\? known: Merge, Prune"),
        ("Zzzzzz", "unknown recipe 'Zzzzzz'; known: Merge, Prune"),
        ("Merge(R=1)", r"Merge has no field 'R'; did you mean r\? known: r, inflection"),
        ("Merge(inflexion=1)", r"no field 'inflexion'; did you mean inflection\?"),
        ("Merge(zzzzzz=1)", "Merge has no field 'zzzzzz'; known: r, inflection"),
        ("Merge(plan=1)", "Merge has no field 'plan'"),
        ("Merge(paper=None)", "Merge has no field 'paper'"),
        ("Merge(r=-1)", r"Merge\.r must be >= 0, got -1"),
        ("Merge(r=True)", r"Merge\.r must be int, got True"),
        ("Merge(r=1j)", r"Merge\.r must be int, got 1j"),
        ("Merge(r={1: 2})", r"Merge\.r must be int, got \{1: 2\}"),
        ("Merge(cap=1e999)", r"Merge\.cap must be finite, got inf"),
    ],
)
def test_unknown_names_and_bad_values_say_what_is_allowed(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, KNOWN)


def test_data_without_a_name_or_with_unknown_names_is_refused():
    with pytest.raises(RecipeError, match="needs a 'recipe' entry"):
        recipe_from_dict({"r": 8}, KNOWN)
    with pytest.raises(RecipeError, match="unknown recipe"):
        recipe_from_dict({"recipe": "Nobody"}, KNOWN)
    with pytest.raises(RecipeError, match="no field 'paper'"):
        recipe_from_dict({"recipe": "Merge", "paper": None}, KNOWN)
    with pytest.raises(RecipeError, match="unknown recipe"):
        build_recipe("Nobody", {}, KNOWN)


def parses_or_refuses(text: str) -> None:
    with warnings.catch_warnings():
        # Python's own parser comments on odd literals; that is not under test.
        warnings.simplefilter("ignore")
        try:
            recipe = parse_recipe(text, KNOWN)
        except RecipeError:
            return
    assert isinstance(recipe, (Merge, Prune))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.just(...),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.sets(st.integers()),
    max_leaves=6,
)


@SETTINGS
@given(st.text(max_size=60))
@example("Merge(r=\\")
@example("Merge(r='\\d')")
@example("Merge(r=1if 1else 2)")
def test_any_text_gives_a_recipe_or_a_recipe_error(text):
    parses_or_refuses(text)


@SETTINGS
@given(st.sampled_from(["r", "inflection", "factor", "mode", "cap", "exact", "x"]), VALUES)
def test_any_value_gives_a_recipe_or_a_recipe_error(field, value):
    parses_or_refuses(f"Merge({field}={value!r})")


@SETTINGS
@given(st.text(alphabet="Merg(r=18,)[]{}'\".*- \n\\:", max_size=30))
def test_nearly_right_text_gives_a_recipe_or_a_recipe_error(text):
    parses_or_refuses(text)
    parses_or_refuses(f"Merge({text})")


@pytest.mark.parametrize("text", ["Merge(r=" + "9" * 400 + ")", "Merge(cap=0x" + "f" * 5000 + ")"])
def test_absurd_numbers_are_refused_like_any_other(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text, {"Merge": Merge})


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        parse_recipe("Merge(r=1, r=2)", {"Merge": Merge})


@pytest.mark.parametrize("name", [["x"], 5, None])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(RecipeError, match="unknown recipe"):
        recipe_from_dict({"recipe": name}, {"Merge": Merge})
