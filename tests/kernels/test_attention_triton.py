"""The Triton kernels in Triton's interpreter, which runs them on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="TRITON TESTS NOT RUN: not installed")
def test_kernels_agree_with_their_references_in_the_interpreter():
    # Triton reads the variable when it is imported, so the cases get a process of their own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("triton_cases.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
