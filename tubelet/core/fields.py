"""Fields of recipes: their types and ranges."""

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any

from tubelet.core.errors import RecipeError

_BAD = object()

_LARGEST = 2**63
"""Beyond it an integer is a slip, and many operations on it overflow."""


def checked(owner: Any, field: dataclasses.Field[Any]) -> Any:
    """The value of a field as its annotated type: lists become tuples, ints become floats.

    Args:
        owner: An instance of a dataclass.
        field: One of its fields; `bounds` in its metadata maps signs to numbers.

    Raises:
        RecipeError: Another type, or out of range.
    """
    cls, given = type(owner), getattr(owner, field.name)
    value = _coerce(given, _hints(cls)[field.name])
    if value is _BAD:
        raise RecipeError(
            f"{cls.__name__}.{field.name} must be {describe_type(cls, field.name)}, got "
            f"{_shown(given)}"
        )
    _check_bounds(cls.__name__, field, value)
    return value


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def describe_type(cls: type, name: str) -> str:
    """A field's type in words, for messages and tables."""
    hint = _hints(cls)[name]
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or _BAD. Lists become tuples, ints become floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tried = (_coerce(value, option) for option in args)
        return next((result for result in tried if result is not _BAD), _BAD)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _BAD
        kinds = [args[0]] * len(value) if args[-1] is ... else list(args)
        items = [_coerce(v, kind) for v, kind in zip(value, kinds, strict=False)]
        return _BAD if len(kinds) != len(value) or _BAD in items else tuple(items)
    if hint in (None, type(None)):
        return None if value is None else _BAD
    if isinstance(value, bool) or hint is bool:
        return value if isinstance(value, bool) and hint is bool else _BAD
    if isinstance(value, int) and abs(value) > _LARGEST:
        return _BAD
    if hint is float and isinstance(value, int):
        return float(value)
    return value if isinstance(value, hint) else _BAD


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:
        # Python refuses to print integers of thousands of digits.
        return "a huge number"


def _check_bounds(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    tests = {
        ">": lambda v, b: v > b,
        ">=": lambda v, b: v >= b,
        "<": lambda v, b: v < b,
        "<=": lambda v, b: v <= b,
    }
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if not isinstance(number, int | float):
            continue
        bounds = field.metadata.get("bounds", {})
        fits = math.isfinite(number) and all(tests[s](number, b) for s, b in bounds.items())
        if not fits:
            wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items()) or "finite"
            raise RecipeError(f"{owner}.{field.name} must be {wanted}, got {value!r}")
