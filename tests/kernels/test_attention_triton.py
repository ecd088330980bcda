"""The Triton kernels on a GPU, and in Triton's interpreter, which runs them on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_cases(name: str, extra: dict[str, str]) -> None:
    # Triton reads the variable when it is imported, so the cases get a process of their own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name(name)],
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.skipif(find_spec("triton") is None, reason="TRITON TESTS NOT RUN: not installed")
@pytest.mark.parametrize("name", ["triton_cases.py", "selection_cases.py", "cache_cases.py"])
def test_kernels_agree_with_their_references_in_the_interpreter(name):
    run_cases(name, INTERPRETER)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["selection_cases.py", "cache_cases.py"])
def test_kernels_agree_with_their_references_on_a_gpu(name):
    run_cases(name, {})
