"""The floor plan: who may import whom, and what a bare import may load."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tubelet"

ALLOWED = {
    "": {"core", "models", "recipes", "bench", "video"},
    "core": {"core"},
    "ops": {"core", "ops"},
    "kernels": {"core", "ops", "kernels"},
    "recipes": {"core", "ops", "recipes", "nn"},
    "models": {"core", "kernels", "models", "nn"},
    "video": {"core", "video"},
    "nn": {"core", "kernels", "ops", "nn"},
    "train": {"core", "kernels", "ops", "nn", "models", "recipes", "train", "video"},
    "bench": {"core", "ops", "kernels", "recipes", "models", "nn", "train", "video", "bench"},
}
"""Sub-packages that each sub-package may import; "" is tubelet/__init__.py. `testing` and `cli`
stand on top and may import anything."""

HEAVY = ["transformers", "diffusers", "triton", "matplotlib", "av", "flash_attn"]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """Sub-package of a source file; "" for tubelet/__init__.py, the stem for other top files."""
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else inside[0].removesuffix(".py").replace("__init__", "")


def imported_parts(path: Path) -> set[str]:
    """Sub-packages of tubelet that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            whole = node.module == "tubelet"
            names = [f"tubelet.{a.name}" for a in node.names] if whole else [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("tubelet.")}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    if part(path) in ("testing", "cli", "__main__"):
        return
    assert part(path) in ALLOWED, f"{path} is in a part without a place in the floor plan"
    wrong = imported_parts(path) - ALLOWED[part(path)]
    # Names of tubelet/__init__.py itself, such as `from tubelet import compare`.
    wrong = {name for name in wrong if (PACKAGE / name).exists()}
    assert not wrong, f"{path.relative_to(PACKAGE.parent)} imports {sorted(wrong)}"


def test_recipes_and_models_never_import_each_other():
    assert "models" not in ALLOWED["recipes"]
    assert "recipes" not in ALLOWED["models"]


def loaded_by(statement: str) -> set[str]:
    """Modules of HEAVY that a fresh process has loaded after a statement."""
    script = f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    return set(done.stdout.split())


def test_import_tubelet_is_light():
    assert loaded_by("import tubelet") == set()


def test_recipes_and_the_model_catalogue_load_no_host_library():
    statement = (
        "import tubelet.recipes, tubelet.models.catalogue\n"
        "tubelet.recipes.catalogue(), tubelet.models.catalogue.adapters()"
    )
    assert loaded_by(statement) & {"transformers", "diffusers"} == set()


def test_the_laziness_check_sees_a_heavy_import():
    assert loaded_by("import av") == {"av"}
