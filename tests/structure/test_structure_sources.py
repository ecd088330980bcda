"""Rules for every source file: length, docstrings, no stray prints, no undated promises."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tubelet"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 500
DOCUMENTED = [p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in ("core", "ops", "kernels")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


def test_test_files_have_distinct_names():
    # Without packages pytest cannot tell two files of one name apart.
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert not [name(p) for p in TESTS if p.name == "__init__.py"]


def test_an_installed_package_has_every_file():
    # From a checkout nobody would miss them.
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["tubelet"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    other = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert len(other) > 10
    assert not [name(path) for path in other if path not in packed]


def public_definitions(body: list[ast.stmt], prefix: str = ""):
    """Public functions and classes of a module, and public methods of those classes."""
    for node in body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", DOCUMENTED, ids=name)
def test_public_names_of_the_lower_floors_have_docstrings(path):
    found = public_definitions(ast.parse(path.read_text()).body)
    bare = [label for label, node in found if ast.get_docstring(node) is None]
    assert not bare, f"without docstring: {bare}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_command_line_prints(path):
    if "cli" in path.parts or path.name == "__main__.py":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    lines = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert not lines, f"print at line {lines}"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_every_todo_names_its_trigger(path):
    # Split so that this file does not match itself.
    word = "TO" + "DO"
    loose = [
        line.strip()
        for line in path.read_text().splitlines()
        if re.search(rf"\b{word}\b", line) and not re.search(rf"{word} (when|once|until) ", line)
    ]
    assert not loose, f"say when: {loose}"
