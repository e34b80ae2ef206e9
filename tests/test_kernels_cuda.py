"""CUDA kernels: the same sources on a CPU, thread by thread, against float64; compiled for every architecture; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.errors import MissingTool
from edgesdk.kernels.cuda.compile import ARCHITECTURES, PTX, Kernel, compiled, fields, packed_args, version
from edgesdk.kernels.cuda.emulated import Emulated, compiler
from edgesdk.kernels.cuda.linear import Linear, prefill_kernel, product_kernel
from edgesdk.kernels.cuda.machine import Machine, Memory
from edgesdk.kernels.cuda.weights import STEP, Tiles, pack
from edgesdk.kernels.panels import UnfitWeights
from edgesdk.packed import Code, decode

TOLERANCE = 1e-3
"""Of the largest output: scales in float16 (2^-11)."""

PRODUCTS = [
    product_kernel(4, False, 32, False, 1, 1, True),
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
ALL: list[Kernel] = [*PRODUCTS, *PREFILLS]


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


@pytest.fixture(params=[0, 1, 2])
def machine(request: pytest.FixtureRequest) -> Machine:
    if not have_compiler():
        pytest.skip("no C++ compiler to emulate with: install g++ or ziglang")
    return Emulated(ALL, request.param)


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


def weight_at(tiles: Tiles, row: int, col: int) -> int:
    """The code at a place, read by the formula of `Place` and `pair_bits` in weights.cuh, a weight at a time."""
    step, plane = STEP[tiles.bits], 2 if tiles.bits == 3 else tiles.bits
    c, i = col % step, row % 16
    lane, pair, second = i % 8 * 4 + c % 32 // 8, c // 32 * 8 + c % 8 // 2 * 2 + i // 8, c & 1
    words = tiles.codes[row // 16, col // step, lane]
    code = int(words[pair // (16 // plane)]) >> (plane * (pair % (16 // plane)) + 16 * second) & ((1 << plane) - 1)
    if tiles.bits == 3:
        code |= (int(tiles.high[row // 16, col // step, lane, pair // 16]) >> (pair % 16 + 16 * second) & 1) << 2
    return code


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 200), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 99))
def test_what_is_packed_is_found_where_the_kernels_look(rows: int, cols: int, bits: int, seed: int) -> None:
    code = weights(seed, rows, cols, bits, 32, True)
    tiles = pack(code)
    rng = np.random.default_rng(seed)
    for row, col in zip(rng.integers(0, rows, 40), rng.integers(0, cols, 40), strict=True):
        assert weight_at(tiles, row, col) == code.arrays[0][row, col]
        if tiles.group:
            assert tiles.zeros[row // 16, col // 32, row % 8, row % 16 // 8] == code.arrays[2][row, col // 32]
            scale = float(tiles.scales[row // 16, col // 32, row % 8, row % 16 // 8]) * tiles.row_scale[row]
            assert scale == pytest.approx(code.arrays[1][row, col // 32], rel=1e-3)


def test_packed_weights_take_the_bytes_that_their_bits_say() -> None:
    for bits, group, each in ((4, 32, 4.5), (8, 0, 8.0), (2, 64, 2.25), (3, 32, 3.5), (4, 0, 4.0)):
        assert pack(weights(0, 1024, 2048, bits, group, False)).nbytes * 8 / (1024 * 2048) == pytest.approx(each, abs=0.05)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (Code("dense", (4, 4), (), (np.zeros((4, 4), np.float32),)), "no grid"),
        (weights(0, 4, 64, 5, 0, False), "5 bits"),
        (weights(0, 4, 256, 4, 96, False), "groups of 96"),
    ],
)
def test_weights_that_the_kernels_do_not_read_are_refused(code: Code, words: str) -> None:
    with pytest.raises(UnfitWeights, match=words):
        pack(code)


def run_linear(
    machine: Machine, code: Code, m: int, half_out: bool = False, extras: bool = False, activation: str = "none"
) -> tuple[Any, Any]:
    """What a layer gives on poisoned memory, and what float64 gives."""
    rows, cols = code.shape
    rng = np.random.default_rng(rows + cols + m)
    dtype: Any = np.float16 if half_out else np.float32
    x = rng.standard_normal((m, cols)).astype(np.float16)
    bias = rng.standard_normal(rows).astype(np.float32) if extras else None
    layer = Linear(machine, code, bias, activation)
    out = machine.empty((m, rows), dtype)
    residual, factor = (rng.standard_normal((m, rows)).astype(dtype) for _ in range(2))
    x_scale = (rng.random(m) + 0.5).astype(np.float32)
    given = {"residual": residual, "factor": factor, "x_scale": x_scale} if extras else {}
    memories: dict[str, Memory] = {n: machine.put(a) for n, a in given.items()}
    x_memory = machine.put(rows_of_eight(x))
    launches = layer.launches(x_memory, out, **memories)
    machine.run(launches)
    wanted = x.astype(np.float64) @ decode(code).astype(np.float64).T
    if extras:
        wanted = wanted * x_scale[:, None] + bias
    if activation == "silu":
        wanted = wanted / (1 + np.exp(-wanted))
    if extras:
        wanted = wanted * factor + residual
    first = machine.get(out)
    machine.run(launches)  # the counters of shared sums are back at 0, and sums come in one order
    assert np.array_equal(first, machine.get(out))
    return first, wanted


FORMS: Sequence[tuple[int, int, bool, int]] = [
    (4, 32, True, 1), (4, 32, True, 16), (4, 128, False, 5), (8, 0, False, 1), (8, 0, True, 7), (3, 64, True, 8), (2, 32, True, 11),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "zeros", "m"), FORMS)
def test_products_are_those_of_float64(machine: Machine, bits: int, group: int, zeros: bool, m: int) -> None:
    for rows, cols in ((17, 200), (50, 333)):
        assert far(*run_linear(machine, weights(rows, rows, cols, bits, group, zeros), m)) < TOLERANCE


@pytest.mark.parametrize("row_tables", [False, True])
def test_codebooks_are_looked_up(machine: Machine, row_tables: bool) -> None:
    for m in (1, 3):
        assert far(*run_linear(machine, codebook(m, 37, 160, 32, row_tables), m)) < TOLERANCE


def test_sums_shared_by_blocks_come_together(machine: Machine) -> None:
    layer = Linear(machine, weights(0, 16, 4096, 8, 0, False))
    assert layer.launches(machine.empty((1, 4096), np.float16), machine.empty((1, 16), np.float32))[0].grid[1] > 1
    assert far(*run_linear(machine, weights(0, 16, 4096, 8, 0, False), 1)) < TOLERANCE


def test_bias_activation_factor_and_residual_come_behind_the_product(machine: Machine) -> None:
    assert far(*run_linear(machine, weights(3, 40, 128, 4, 32, True), 1, extras=True, activation="silu")) < TOLERANCE


def test_outputs_in_half_precision(machine: Machine) -> None:
    assert far(*run_linear(machine, weights(3, 33, 64, 4, 32, False), 1, half_out=True)) < 2 * TOLERANCE


MANY: Sequence[tuple[Code, int, bool]] = [
    (weights(3, 140, 200, 4, 32, True), 29, False),
    (weights(4, 20, 256, 4, 128, False), 130, True),
    (weights(5, 17, 77, 8, 0, False), 17, False),
    (weights(6, 33, 160, 8, 0, True), 70, False),
    (weights(7, 18, 200, 3, 64, False), 20, False),
    (weights(8, 18, 300, 2, 32, True), 65, False),
    (codebook(9, 40, 200, 32, True), 33, False),
]


@pytest.mark.parametrize(("code", "m", "half_out"), MANY)
def test_many_tokens_go_to_the_prefill_kernel(machine: Machine, code: Code, m: int, half_out: bool) -> None:
    assert far(*run_linear(machine, code, m, half_out)) < 2 * TOLERANCE


def test_the_struct_of_a_kernel_is_read_from_its_source() -> None:
    kernel = PRODUCTS[0]
    names = dict(fields(kernel.args))
    assert names["codes"] == "P" and names["rows"] == "i"
    assert len(packed_args(kernel, {"rows": 3})) % 8 == 0
    with pytest.raises(Exception, match="no field"):
        packed_args(kernel, {"lines": 3})


@needs_nvrtc
@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.name)
def test_kernels_compile_for_every_architecture_and_keep_to_their_registers(kernel: Kernel) -> None:
    for arch in ARCHITECTURES:
        built = compiled(kernel, arch)
        assert built.code[:4] == b"\x7fELF"
        assert built.spilled_bytes == 0 and built.stack_bytes == 0, (arch, built.registers, built.spilled_bytes, built.stack_bytes)
    assert b".target sm_80" in compiled(kernel, PTX).code
