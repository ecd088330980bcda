"""Shape annotations are checked while tests run, and only then."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

import tubelet.testing.shape_checker  # noqa: F401  the hook looks it up by name

# Must run before any tubelet module is imported.
CHECKED = ["core.assignment", "core.block_mask", "core.context", "core.grid", "ops", "kernels"]
install_import_hook([f"tubelet.{name}" for name in CHECKED], "tubelet.testing.shape_checker.check")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests loudly where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="GPU TEST NOT RUN: no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `tubelet ARGS`; returns (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        from tubelet import cli

        monkeypatch.setattr("sys.argv", ["tubelet", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
