"""Kernels compiled for GPUs that are not here: the interpreter takes what compilers refuse."""

from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="TRITON TESTS NOT RUN: not installed"
)

TARGETS = [80, 90, 100]
HALF, WIDE, INT = "*bf16", "*fp32", "*i32"
TILE = {"TQ": 128, "TK": 64, "D": 80, "PD": 128}


def compiled(kernel: Any, target: int, types: dict[str, str], values: dict[str, Any]) -> Any:
    """The kernel for an NVIDIA GPU; arguments without a type are 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in values else types.get(n, "i32") for n in names}
    constants = {(names.index(name),): value for name, value in values.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 8})


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_of_causal_rows(target):
    from tubelet.kernels.selection import triton_kernels as kernels

    types = {"Q": HALF, "K": HALF, "PLACES": INT, "TOTALS": WIDE, "scale": "fp32"}
    assert compiled(kernels.row_totals, target, types, TILE).asm["cubin"]
    types |= {"FIRST": INT, "WEIGHT": WIDE, "OUT": WIDE}
    for weighted in (False, True):
        values = TILE | {"WEIGHTED": weighted}
        assert compiled(kernels.received, target, types, values).asm["cubin"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_restoring_a_cache(bits, target):
    from tubelet.kernels.cache import triton_kernels as kernels

    codes = dict.fromkeys(("KEYS", "VALUES"), "*u8")
    levels = ("KEY_SCALE", "KEY_LOW", "VALUE_SCALE", "VALUE_LOW", "NORM", "TO_KEYS", "TO_VALUES")
    types = codes | dict.fromkeys(levels, HALF) | {"COLUMNS": INT}
    values = {"BITS": bits, "TILE": 64, "D": 80, "PD": 128}
    assert compiled(kernels.restore, target, types, values).asm["cubin"]
