"""Docs that are generated from the code are up to date, and what they show runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tubelet.recipes import catalogue, parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_sections_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_commands_parse(page: Path) -> None:
    for text in re.findall(r'--recipe "([^"]+)"', page.read_text()):
        for part in text.split(" + "):
            name = part.split("(")[0]
            if name in catalogue():
                parse(part)
            else:
                assert "class " + name in page.read_text(), f"{page.name} uses unknown {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_valid_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        # An adapter's presets are cut short with an ellipsis on purpose.
        ast.parse(block.replace(", ...}", "}"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(((?!https?:|#)[^)]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points to missing {target}"
