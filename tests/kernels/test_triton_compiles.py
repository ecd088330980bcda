"""Kernels compiled for GPUs that are not here: the interpreter takes what compilers refuse."""

import os
from importlib.util import find_spec
from typing import Any

import pytest

from tubelet.kernels.rotary import api as rotary
from tubelet.kernels.selection.triton_selection import CHANNELS, tile_sides

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="TRITON TESTS NOT RUN: not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON TESTS NOT RUN: interpreted"
    ),
]

SMALL = 86
"""A GPU with little memory on the chip."""

ON_CHIP = 99 * 1024
"""Bytes of it that one program may take."""

OTHERS = [80, 90, 100]
SIZES = {"bf16": 2, "fp32": 4}
WIDE, INT = "*fp32", "*i32"


def compiled(kernel: Any, target: int, types: dict[str, str], values: dict[str, Any]) -> Any:
    """The kernel for an NVIDIA GPU; arguments without a type are 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in values else types.get(n, "i32") for n in names}
    constants = {(names.index(name),): value for name, value in values.items()}
    # Rows of tensors are aligned, which is what lets loads run ahead in memory on the chip.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
    strides = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_row")}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={**aligned, **strides}
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32))


def causal_rows(dtype: str, width: int, target: int) -> list[Any]:
    """Both kernels as they are launched."""
    from tubelet.kernels.selection import triton_kernels as kernels

    kept, walked = tile_sides(width, SIZES[dtype])
    types = {"Q": f"*{dtype}", "K": f"*{dtype}", "PLACES": INT, "TOTALS": WIDE}
    shape = {"D": width, "PD": 1 << (width - 1).bit_length()}
    scale = {"scale": "fp32"}
    found = [
        compiled(kernels.row_totals, target, types | scale, shape | {"TQ": walked, "TK": walked})
    ]
    types |= {"FIRST": INT, "WEIGHT": WIDE, "OUT": WIDE}
    for weighted in (False, True):
        values = shape | {"TQ": walked, "TK": kept, "WEIGHTED": weighted}
        found.append(compiled(kernels.received, target, types | scale, values))
    return found


@pytest.mark.parametrize("width", [128, CHANNELS])
@pytest.mark.parametrize("dtype", SIZES)
def test_statistics_of_causal_rows_fit_small_gpus(dtype, width):
    for kernel in causal_rows(dtype, width, SMALL):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= ON_CHIP


@pytest.mark.parametrize("target", OTHERS)
def test_statistics_of_causal_rows(target):
    assert all(kernel.asm["cubin"] for kernel in causal_rows("bf16", 80, target))


@pytest.mark.parametrize(("bits", "target"), [(2, SMALL), (8, SMALL), *((4, x) for x in OTHERS)])
def test_restoring_a_cache(bits, target):
    from tubelet.kernels.cache import triton_kernels as kernels
    from tubelet.kernels.cache.storage import TILE

    codes = dict.fromkeys(("KEYS", "VALUES"), "*u8")
    levels = ("KEY_SCALE", "KEY_LOW", "VALUE_SCALE", "VALUE_LOW", "NORM", "TO_KEYS", "TO_VALUES")
    types = codes | dict.fromkeys(levels, "*bf16") | {"COLUMNS": INT}
    values = {"BITS": bits, "TILE": TILE, "D": 80, "PD": 128}
    assert compiled(kernels.restore, target, types, values).asm["cubin"]


@pytest.mark.parametrize(("width", "target"), [(72, SMALL), *((80, x) for x in OTHERS)])
def test_rotary_embedding(width, target):
    from tubelet.kernels.rotary import triton_kernels as kernels

    types = dict.fromkeys(("Q", "K", "Q_OUT", "K_OUT"), "*bf16") | {"COS": WIDE, "SIN": WIDE}
    half = width // 2
    values = {"HALF": half, "LANES": 1 << (half - 1).bit_length(), "ROWS": rotary.ROWS}
    values |= {"Q_HEAD": width, "K_HEAD": width}
    assert compiled(kernels.rotary, target, types, values).asm["cubin"]
