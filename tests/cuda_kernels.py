"""What the tests of CUDA kernels share: the kernels that they compile, machines to run them on, weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from edgesdk.errors import EdgeError, MissingTool
from edgesdk.kernels.cuda.attention import attend_kernel, keep_kernel
from edgesdk.kernels.cuda.compile import Kernel, version
from edgesdk.kernels.cuda.emulated import Emulated, compiler
from edgesdk.kernels.cuda.launch import Gpu
from edgesdk.kernels.cuda.linear import prefill_kernel, product_kernel
from edgesdk.kernels.cuda.look import HEADS, look_kernel
from edgesdk.kernels.cuda.machine import Machine, Memory
from edgesdk.kernels.cuda.rows import embed_kernel, norm_kernel, row_kernel
from edgesdk.packed import Code

TOLERANCE = 1e-3
"""Of the largest output: scales in float16 (2^-11)."""

PRODUCTS = [
    product_kernel(4, False, 32, False, 1, 1, True),
    product_kernel(4, False, 32, False, 1, 1, False),
    product_kernel(4, False, 32, True, 1, 1, False),
    product_kernel(4, False, 32, True, 2, 2, False),
    product_kernel(4, False, 128, False, 1, 2, False),
    product_kernel(8, False, 0, False, 1, 1, False),
    product_kernel(8, False, 0, True, 1, 2, False),
    product_kernel(3, False, 64, True, 1, 2, False),
    product_kernel(2, False, 32, True, 2, 2, False),
    product_kernel(4, True, 32, False, 1, 1, False),
    product_kernel(4, True, 32, False, 1, 2, False),
]
PREFILLS = [
    prefill_kernel(4, False, 32, True, 4, False),
    prefill_kernel(4, False, 128, False, 8, True),
    prefill_kernel(8, False, 0, False, 4, False),
    prefill_kernel(8, False, 0, True, 8, False),
    prefill_kernel(3, False, 64, False, 4, False),
    prefill_kernel(2, False, 32, True, 4, False),
    prefill_kernel(4, True, 32, False, 4, False),
]
ROWS = [
    norm_kernel("float", False, "u16"),
    norm_kernel("u16", True, "u16"),
    norm_kernel("float", True, "float"),
    row_kernel("halve", "Halve"),
    row_kernel("pick", "Pick"),
    row_kernel("sparse", "Sparse"),
    row_kernel("lookup", "Embed", "float"),
    row_kernel("argmax", "Argmax", "float"),
    row_kernel("argmax", "Argmax", "u16"),
    embed_kernel(4, False, 32, False, False),
    embed_kernel(4, False, 32, True, True),
    embed_kernel(8, False, 0, False, False),
    embed_kernel(3, False, 64, True, False),
    embed_kernel(4, True, 32, False, False),
]
ATTENTION = [
    attend_kernel(16, 64, 1),
    attend_kernel(16, 128, 4),
    attend_kernel(8, 64, 2),
    attend_kernel(4, 64, 8),
    attend_kernel(16, 40, 3),
    keep_kernel(16, 40),
    keep_kernel(8, 64),
    keep_kernel(4, 64),
    keep_kernel(16, 128),
]
LOOKS = [
    look_kernel(32, 64, 1),
    look_kernel(8, 64, 2),
    look_kernel(32, 24, 4),
    look_kernel(32, 24, 8),
    look_kernel(8, 24, 8),
    look_kernel(32, 128, 8),
    look_kernel(8, 128, 8),
    look_kernel(4, 128, 8),
    look_kernel(16, 64, 1),
    look_kernel(4, 48, 4),
    look_kernel(4, 24, 2),
]
ALL: list[Kernel] = [*PRODUCTS, *PREFILLS, *ROWS, *ATTENTION, HEADS, *LOOKS]


def have_compiler() -> bool:
    try:
        compiler()
    except MissingTool:
        return False
    return True


def have_nvrtc() -> bool:
    try:
        version()
    except MissingTool:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not have_nvrtc(), reason="no NVRTC: pip install 'edgesdk[cuda]'")


@lru_cache(maxsize=1)
def gpu() -> Machine:
    try:
        return Gpu()
    except EdgeError as error:
        pytest.skip(error.what)


def machine_of(which: int | str) -> Machine:
    """An emulated machine with a seed, or the "gpu"; the test is skipped where there is none."""
    if which == "gpu":
        return gpu()
    if not have_compiler():
        pytest.skip("no C++ compiler to emulate with: install g++ or ziglang")
    return Emulated(ALL, int(which))


def poisoned(machine: Machine, shape: Sequence[int], dtype: Any) -> Memory:
    """Memory of NaNs, or of -1: what a kernel does not write is seen."""
    return machine.put(np.full(shape, -1 if np.issubdtype(dtype, np.integer) else np.nan, dtype))


def weights(seed: int, rows: int, cols: int, bits: int, group: int, zeros: bool) -> Code:
    rng = np.random.default_rng(seed)
    groups = 1 if group == 0 else -(-cols // group)
    q = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    scale = (rng.random((rows, groups)) + 0.1).astype(np.float32) * np.float32(0.01)
    zero = rng.integers(0, 1 << bits, (rows, groups)).astype(np.uint8) if zeros else np.zeros(0, np.uint8)
    return Code("grid", (rows, cols), (bits, group), (q, scale, zero))


def codebook(seed: int, rows: int, cols: int, group: int, row_tables: bool) -> Code:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((rows if row_tables else 1, 16)).astype(np.float32) * 7
    scale = (rng.random((rows, 1 if group == 0 else -(-cols // group))) + 0.1).astype(np.float32)
    return Code("table", (rows, cols), (4, group), (rng.integers(0, 16, (rows, cols)).astype(np.uint8), table, scale))


def rows_of_eight(x: Any) -> Any:
    """float16 with rows filled up to a multiple of 8 with NaNs: what lies beyond the last column must not matter."""
    out = np.full((len(x), -(-x.shape[1] // 8) * 8), np.nan, np.float16)
    out[:, : x.shape[1]] = x
    return out


def far(y: Any, wanted: Any) -> float:
    return float(np.abs(y - wanted).max() / max(np.abs(wanted).max(), 1e-30))
