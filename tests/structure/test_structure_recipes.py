"""Rules for every recipe of the catalogue: citation, identity point, documented fields, a test."""

import ast
import dataclasses
from pathlib import Path

import pytest

from tubelet import recipes
from tubelet.core.handle import CAPABILITIES
from tubelet.core.recipe import Paper, Recipe, TokenReduction

CATALOGUE = recipes.catalogue()
VERIFIED = {"behaviour", "authors' code", "paper number"}
STATISTICS = {"keys", "rows", "value_norm", "received", "entropy"}

each = pytest.mark.parametrize("cls", CATALOGUE.values(), ids=CATALOGUE)


def names_in_tests() -> set[str]:
    """Functions and classes in tests/recipes."""
    found = set()
    for path in (Path(__file__).parents[1] / "recipes").glob("test_*.py"):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found |= {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)}
    return found


def test_the_catalogue_is_not_empty():
    assert {"ToMe", "RLT", "TESTA"} <= CATALOGUE.keys()


@each
def test_recipe_has_a_behavioural_test_named_after_it(cls):
    assert any(f"test_{cls.__name__}_" in n or f"Test{cls.__name__}" == n for n in names_in_tests())


@each
def test_recipe_cites_its_paper(cls):
    assert isinstance(cls.paper, Paper)
    assert cls.paper.title
    assert cls.paper.year is not None
    assert cls.paper.arxiv is None or cls.paper.arxiv.replace(".", "").isdigit()


@each
def test_recipe_has_an_identity_point_of_valid_fields(cls):
    assert cls.identity, "without an identity point nothing ties it to the dense model"
    names = {field.name for field in dataclasses.fields(cls)}
    assert cls.identity.keys() <= names
    at_identity = cls(**cls.identity)
    assert at_identity != cls(), "the default does nothing"


@each
def test_recipe_says_what_it_was_verified_against(cls):
    assert cls.verified in VERIFIED


@each
def test_recipe_states_known_requirements_and_statistics(cls):
    assert cls.requires <= CAPABILITIES.keys()
    assert cls.stage
    if issubclass(cls, TokenReduction):
        assert cls.statistics <= STATISTICS


@each
def test_recipe_is_documented(cls):
    text = cls.__doc__ or ""
    assert len(text.split()) >= 8
    assert not text.startswith(f"{cls.__name__}("), "this is the text that dataclass writes"


@each
def test_recipe_documents_every_field(cls):
    for field in dataclasses.fields(cls):
        assert field.metadata.get("doc"), f"{cls.__name__}.{field.name} has no meaning stated"
        assert field.default is not dataclasses.MISSING, f"{field.name} has no default"


@each
def test_recipe_is_frozen_and_takes_names_only(cls):
    assert cls.__dataclass_params__.frozen
    with pytest.raises(TypeError):
        cls(1)


@each
def test_recipe_is_importable_by_name(cls):
    assert getattr(recipes, cls.__name__) is cls
    assert cls.__name__ in dir(recipes)
    assert issubclass(cls, Recipe)
