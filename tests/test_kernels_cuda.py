"""Linear layers in CUDA: the same sources on a CPU, thread by thread, against float64; compiled for every architecture; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.errors import InputError
from edgesdk.kernels.cuda import registry
from edgesdk.kernels.cuda.compile import ARCHITECTURES, PTX, Kernel, codes, compiled, fields, headers, packed_args
from edgesdk.kernels.cuda.linear import Linear, prefill_kernel, product_kernel
from edgesdk.kernels.cuda.machine import Machine, Memory
from edgesdk.kernels.cuda.tiles import STEP, Tiles
from edgesdk.kernels.cuda.weights import pack
from edgesdk.kernels.panels import UnfitWeights
from edgesdk.packed import Code, decode
from tests.cuda_kernels import (
    ALL,
    PRODUCTS,
    ROWS,
    TOLERANCE,
    codebook,
    far,
    gpu,
    needs_nvrtc,
    poisoned,
    rows_of_eight,
    weights,
)

pytest_plugins = ["tests.cuda_fixture"]


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
    out = poisoned(machine, (m, rows), dtype)
    residual, factor = (rng.standard_normal((m, rows)).astype(dtype) for _ in range(2))
    x_scale = (rng.random(m) + 0.5).astype(np.float32)
    given = {"residual": residual, "factor": factor, "x_scale": x_scale} if extras else {}
    memories: dict[str, Memory] = {n: machine.put(a) for n, a in given.items()}
    x_memory = machine.put(rows_of_eight(x))
    launches = [layer.launch(x_memory, out, **memories)]
    machine.run(launches)
    wanted = x.astype(np.float64) @ decode(code).astype(np.float64).T
    if extras:
        wanted = wanted * x_scale[:, None] + bias
    if activation == "silu":
        wanted = wanted / (1 + np.exp(-wanted))
    if extras:
        wanted = wanted * factor + residual
    first = machine.get(out)
    machine.put(np.full(out.shape, np.nan, dtype), out)
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
    assert layer.launch(machine.empty((1, 4096), np.float16), machine.empty((1, 16), np.float32)).grid[1] > 1
    assert far(*run_linear(machine, weights(0, 16, 4096, 8, 0, False), 1)) < TOLERANCE


def test_memory_of_the_wrong_shape_or_type_is_refused(machine: Machine) -> None:
    layer = Linear(machine, weights(0, 20, 60, 4, 32, False))
    x, out = machine.empty((3, 64), np.float16), machine.empty((3, 20), np.float32)
    for wrong in (machine.empty((3, 64), np.float32), machine.empty((3, 60), np.float16), machine.empty((3, 56), np.float16), x.columns(1)):
        with pytest.raises(InputError, match="x is"):
            layer.launch(wrong, out)
    for wrong in (machine.empty((3, 20), np.int32), machine.empty((2, 20), np.float32), machine.empty((3, 19), np.float32)):
        with pytest.raises(InputError, match="out is"):
            layer.launch(x, wrong)
    with pytest.raises(InputError, match="residual"):
        layer.launch(x, out, residual=machine.empty((3, 20), np.float16))
    with pytest.raises(InputError, match="x_scale"):
        layer.launch(x, out, x_scale=machine.empty((2,), np.float32))


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


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bits", "group", "zeros"), [(4, 32, True), (4, 128, False), (8, 0, False), (3, 64, True), (2, 64, True)])
def test_large_layers_on_a_gpu(bits: int, group: int, zeros: bool, seed: int) -> None:
    for rows, cols in ((4096, 4096), (1000, 11008)):
        for m in (1, 8, 16, 64, 200):
            assert far(*run_linear(gpu(), weights(seed, rows, cols, bits, group, zeros), m, half_out=seed == 1)) < 2 * TOLERANCE


def test_the_struct_of_a_kernel_is_read_from_its_source() -> None:
    kernel = PRODUCTS[0]
    names = dict(fields(kernel.args))
    assert names["codes"] == "P" and names["rows"] == "i"
    assert len(packed_args(kernel.args, {"rows": 3})) % 8 == 0
    with pytest.raises(Exception, match="no field"):
        packed_args(kernel.args, {"lines": 3})


def fits_its_registers(kernel: Kernel) -> None:
    for arch in ARCHITECTURES:
        built = compiled(kernel, arch)
        assert built.code[:4] == b"\x7fELF"
        assert built.spilled_bytes == 0 and built.stack_bytes == 0, (arch, built.registers, built.spilled_bytes, built.stack_bytes)


@needs_nvrtc
@pytest.mark.parametrize("kernel", {k.body.split("<")[0]: k for k in ALL}.values(), ids=lambda k: k.name)
def test_kernels_compile_for_every_architecture_and_keep_to_their_registers(kernel: Kernel) -> None:
    fits_its_registers(kernel)
    assert b".target sm_80" in compiled(kernel, PTX).code


def test_every_kernel_is_listed_with_its_reference() -> None:
    text = "\n".join(headers().values())
    rows = registry.kernels()
    assert all(f" {row.name}(const " in text and callable(row.reference) and row.made == "nvrtc" for row in rows)
    bodies = {kernel.body.split("<")[0] for kernel in ALL}
    assert bodies <= {row.name for row in rows}
    assert len({(row.name, row.format, row.operation) for row in rows}) == len(rows)


@needs_nvrtc
def test_machine_code_for_a_device_without_a_compiler_goes_by_name() -> None:
    made = codes(ROWS[:2], "sm_87")
    assert list(made) == [k.name for k in ROWS[:2]]
    assert all(machine[:4] == b"\x7fELF" and b".target sm_80" in ptx for machine, ptx in made.values())


def every_form() -> list[Kernel]:
    """All forms of weights, for each way that tokens are taken."""
    forms = [
        (bits, False, group, zeros)
        for bits in STEP
        for group in (0, 32, 64, 128)
        for zeros in (False, True)
        if not (bits == 8 and group > 32)
    ]
    forms += [(4, True, group, False) for group in (0, 32, 64)]
    ways = ((1, 1), (1, 2), (2, 2))
    few = [product_kernel(*form, *way, False) for form in forms for way in ways]
    wide = [
        prefill_kernel(*form, eights, True) for form in forms for eights in (4, 8) if eights == 4 or (form[0] in (4, 8) and not form[1])
    ]
    return list(dict.fromkeys(few + wide))


@needs_nvrtc
@pytest.mark.wide
@pytest.mark.parametrize("kernel", dict.fromkeys([*ALL, *every_form()]), ids=lambda k: k.name)
def test_every_form_keeps_to_its_registers(kernel: Kernel) -> None:
    fits_its_registers(kernel)
