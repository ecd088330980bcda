"""Rotary embedding: the plain path against the host's, the kernel in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from tubelet.core.errors import ShapeError
from tubelet.kernels.rotary import rotary


def run_cases(extra: dict[str, str]) -> None:
    # Triton reads the variable when it is imported, so the cases get a process of their own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("rotary_cases.py")],
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.skipif(find_spec("triton") is None, reason="TRITON TESTS NOT RUN: not installed")
def test_the_kernel_agrees_with_torch_in_the_interpreter():
    run_cases({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
def test_the_kernel_agrees_with_torch_on_a_gpu():
    run_cases({})


def projected(num=37, heads=3, width=72, dtype=torch.float32):
    q, k, _ = torch.randn(num, 3, heads, width).to(dtype).unbind(1)
    return q, k, *torch.randn(2, num, width)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("width", [72, 80, 16])
def test_the_plain_path_is_the_hosts_bit_for_bit(width, dtype):
    q, k, cos, sin = projected(width=width, dtype=dtype)
    wanted = apply_rotary_pos_emb_vision(q, k, cos, sin)
    for found, host in zip(rotary(q, k, cos, sin), wanted, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, host.transpose(0, 1))


def test_gradients_are_those_of_the_host():
    q, k, cos, sin = projected(num=5)
    mine, theirs = ([x.clone().requires_grad_() for x in (q, k)] for _ in range(2))
    sum(x.square().sum() for x in rotary(*mine, cos, sin)).backward()
    sum(x.square().sum() for x in apply_rotary_pos_emb_vision(*theirs, cos, sin)).backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_odd_widths_are_refused():
    with pytest.raises(ShapeError, match="pairs"):
        rotary(*projected(width=9))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [72, 80])
def test_bfloat16_stays_within_its_rounding_of_float32(width):
    q, k, cos, sin = (x.cuda() for x in projected(num=3001, heads=16, width=width))
    found = rotary(q.bfloat16(), k.bfloat16(), cos, sin)
    wanted = rotary(q.bfloat16().float(), k.bfloat16().float(), cos, sin)
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have.float(), want, rtol=2**-8, atol=1e-6)
