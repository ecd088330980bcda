"""The error tree: one base, and the built-in kinds that callers may already catch."""

import inspect

import pytest

from tubelet.core import errors

BUILT_IN = {
    "ShapeError": ValueError,
    "UnsupportedError": RuntimeError,
    "NoMatchingSitesError": LookupError,
    "ConflictError": ValueError,
    "RecipeError": ValueError,
    "ModelError": ValueError,
    "ClipError": ValueError,
}


def defined() -> dict[str, type[Exception]]:
    classes = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in classes if cls.__module__ == errors.__name__}


@pytest.mark.parametrize("name", BUILT_IN)
def test_errors_are_tubelet_errors_and_built_in_ones(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.TubeletError)
    assert issubclass(error, BUILT_IN[name])


def test_the_drawn_tree_names_every_error():
    assert set(defined()) == {*BUILT_IN, "TubeletError", "NoEffectWarning"}
    for name in defined():
        assert name in errors.__doc__


def test_no_effect_is_a_warning_and_no_error():
    assert issubclass(errors.NoEffectWarning, UserWarning)
    assert not issubclass(errors.NoEffectWarning, errors.TubeletError)
