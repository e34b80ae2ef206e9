"""CUDA kernels: the same sources on a CPU, thread by thread, against float64; compiled for every architecture; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.errors import EdgeError, InputError, MissingTool
from edgesdk.kernels.cuda import rows as of_rows
from edgesdk.kernels.cuda.attention import Cache, attend, attend_kernel, keep, keep_kernel, new_cache
from edgesdk.kernels.cuda.compile import ARCHITECTURES, PTX, Kernel, compiled, cubins, fields, packed_args, version
from edgesdk.kernels.cuda.decode import Layer, decode_step
from edgesdk.kernels.cuda.emulated import Emulated, compiler
from edgesdk.kernels.cuda.launch import Gpu
from edgesdk.kernels.cuda.linear import Linear, prefill_kernel, product_kernel
from edgesdk.kernels.cuda.machine import Machine, Memory
from edgesdk.kernels.cuda.rows import embed_kernel, row_kernel
from edgesdk.kernels.cuda.weights import STEP, Tiles, pack
from edgesdk.kernels.panels import UnfitWeights
from edgesdk.packed import Code, decode

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
    row_kernel("norm", "Norm", "float", "false"),
    row_kernel("norm", "Norm", "u16", "true"),
    row_kernel("halve", "Halve"),
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
ALL: list[Kernel] = [*PRODUCTS, *PREFILLS, *ROWS, *ATTENTION]


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


@pytest.fixture(params=[0, 2, 3, pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "gpu":
        return gpu()
    if not have_compiler():
        pytest.skip("no C++ compiler to emulate with: install g++ or ziglang")
    return Emulated(ALL, request.param)


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
    assert len(packed_args(kernel, {"rows": 3})) % 8 == 0
    with pytest.raises(Exception, match="no field"):
        packed_args(kernel, {"lines": 3})


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


@needs_nvrtc
def test_machine_code_for_a_device_without_a_compiler_goes_by_name() -> None:
    made = cubins(ROWS[:2], "sm_87")
    assert list(made) == [k.name for k in ROWS[:2]] and all(c[:4] == b"\x7fELF" for c in made.values())


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


# ---- rows


@pytest.mark.parametrize(("dtype", "layer"), [(np.float32, False), (np.float16, True)])
def test_norms_are_those_of_float64(machine: Machine, dtype: Any, layer: bool) -> None:
    rng = np.random.default_rng(0)
    for m, cols in ((1, 7), (3, 600)):
        x, add = (rng.standard_normal((m, cols)).astype(dtype) + dtype(3) for _ in range(2))
        weight, bias = (rng.standard_normal(cols).astype(np.float32) for _ in range(2))
        total, given = machine.put(x), {"bias": machine.put(bias)} if layer else {}
        out = poisoned(machine, (m, cols), np.float16)
        machine.run([of_rows.norm(total, machine.put(weight), out, add=machine.put(add), total=total, **given)])
        v = x.astype(np.float64) + add
        centred = v - v.mean(1, keepdims=True) if layer else v
        wanted = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * weight + (bias if layer else 0)
        assert far(machine.get(out), wanted) < 2 * TOLERANCE
        assert far(machine.get(total), v) < TOLERANCE


def test_float32_is_halved_without_overflow(machine: Machine) -> None:
    x = np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32)
    x *= np.array([1e-37, 1e-9, 1, 1e5, 1e37, 0], np.float32)[:, None]
    out, scale = poisoned(machine, x.shape, np.float16), poisoned(machine, (6,), np.float32)
    machine.run([of_rows.halve(machine.put(x), out, scale)])
    back = machine.get(out).astype(np.float64) * machine.get(scale)[:, None].astype(np.float64)
    assert np.abs(back - x).max(1) == pytest.approx(np.zeros(6), abs=0) or (np.abs(back - x).max(1)[:5] < 5e-4 * np.abs(x).max(1)[:5]).all()
    assert not back[5].any()


def test_layers_take_float32_beyond_the_range_of_float16(machine: Machine) -> None:
    code = weights(4, 40, 128, 4, 32, True)
    x = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32) * np.float32(1e7)
    halved, scale, out = machine.empty(x.shape, np.float16), machine.empty((1,), np.float32), poisoned(machine, (1, 40), np.float32)
    machine.run([of_rows.halve(machine.put(x), halved, scale), Linear(machine, code).launch(halved, out, x_scale=scale)])
    assert far(machine.get(out), x.astype(np.float64) @ decode(code).astype(np.float64).T) < TOLERANCE


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_first_of_the_largest_is_found(machine: Machine, dtype: Any) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (5, 1000)).astype(dtype)
    x[1] = -np.inf
    x[2] = np.nan
    x[3, :999] = np.nan
    x[4, 700] = np.inf
    out, count = poisoned(machine, (5,), np.int32), machine.put(np.array([0, 1, 2, 3, 4], np.int32))
    history = machine.put(np.full((5, 4), -1, np.int32))
    machine.run([of_rows.argmax(machine.put(x), out, count, history)])
    assert machine.get(out).tolist() == [int(x[0].argmax()), 0, 0, 999, 700]
    assert machine.get(count).tolist() == [1, 2, 3, 4, 5]
    assert machine.get(history).max(1).tolist() == [int(x[0].argmax()), 0, 0, 999, -1]


@pytest.mark.parametrize(
    ("code", "half_out"),
    [(weights(1, 40, 200, 4, 32, True), True), (weights(1, 40, 77, 8, 0, False), False), (weights(1, 40, 200, 3, 64, True), False), (codebook(1, 40, 96, 32, True), False)],
)  # fmt: skip
def test_embeddings_are_rows_of_the_same_weights(machine: Machine, code: Code, half_out: bool) -> None:
    ids = np.array([0, 39, 8, 23, -1, 40, 7], np.int32)
    out = poisoned(machine, (7, code.shape[1]), np.float16 if half_out else np.float32)
    machine.run([of_rows.embed(Linear(machine, code), machine.put(ids), out)])
    wanted = decode(code).astype(np.float64)[np.clip(ids, 0, 39)] * ((ids >= 0) & (ids < 40))[:, None]
    assert far(machine.get(out), wanted) < TOLERANCE


# ---- attention


def kept(machine: Machine, cache: Cache) -> tuple[Any, Any]:
    """What a cache holds, float64 [batch, kv_heads, capacity, dim]."""
    out = []
    for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        raw = machine.get(codes)
        if scales is None:
            out.append(raw.view(np.float16).astype(np.float64))
            continue
        ints = (
            raw.astype(np.int64) - 128
            if cache.bits == 8
            else np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1).astype(np.int64) - 8
        )
        out.append(ints * np.repeat(machine.get(scales).astype(np.float64), 32, -1)[..., : cache.dim])
    return out[0], out[1]


def turned(x: Any, cosines: Any, sines: Any) -> Any:
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)


@pytest.mark.parametrize(("bits", "dim", "worst"), [(16, 40, 1e-3), (16, 128, 1e-3), (8, 64, 8e-3), (4, 64, 0.12)])
def test_keys_and_values_are_turned_and_kept(machine: Machine, bits: int, dim: int, worst: float) -> None:
    rng = np.random.default_rng(bits)
    heads, kv_heads, capacity, tokens = 4, 2, 8, 3
    cache = new_cache(machine, 2, kv_heads, capacity, dim, bits)
    q, k, v = (rng.standard_normal((2 * tokens, n * dim)).astype(np.float16) for n in (heads, kv_heads, kv_heads))
    angles = np.arange(20)[:, None] * 10.0 ** -np.linspace(0, 4, dim // 2)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions, q_out = np.array([6, 11], np.int32), poisoned(machine, q.shape, np.float16)
    turns = (machine.put(cosines), machine.put(sines))
    machine.run([keep(cache, machine.put(q), machine.put(k), machine.put(v), machine.put(positions), q_out, turns)])
    at = positions[:, None] + np.arange(tokens)
    split = [x.astype(np.float64).reshape(2, tokens, -1, dim) for x in (q, k, v)]
    c, s = cosines[at][:, :, None], sines[at][:, :, None]
    assert far(machine.get(q_out).reshape(split[0].shape), turned(split[0], c, s)) < 1e-3
    for found, wanted in zip(kept(machine, cache), (turned(split[1], c, s), split[2]), strict=True):
        for b in range(2):
            assert far(found[b][:, at[b] % capacity], wanted[b].swapaxes(0, 1)) < worst
        assert not found[0][:, [1, 2, 3, 4, 5]].any()


def filled(machine: Machine, batch: int, kv_heads: int, capacity: int, dim: int, bits: int, seed: int) -> Cache:
    """A cache of random keys and values in every slot."""
    cache = new_cache(machine, batch, kv_heads, capacity, dim, bits)
    rng = np.random.default_rng(seed)
    for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        if scales is None:
            machine.put(rng.standard_normal((*codes.shape[:3], dim)).astype(np.float16), codes)
        else:
            machine.put(rng.integers(0, 256, codes.shape).astype(np.uint8), codes)
            machine.put((rng.random(scales.shape) / (1 << (bits - 1))).astype(np.float16), scales)
    return cache


def attention(machine: Machine, cache: Cache, q: Any, seen: Any) -> Any:
    """float64 [rows, heads · dim]; `seen`: the positions that each row sees."""
    k, v = kept(machine, cache)
    rows, each = len(q), q.shape[1] // cache.dim // cache.kv_heads
    parts = q.astype(np.float64).reshape(rows, cache.kv_heads, each, cache.dim)
    out = np.zeros(parts.shape)
    for r, positions in enumerate(seen):
        slots = np.array(list(positions), np.int64) % cache.capacity
        if len(slots):
            b = r * cache.batch // rows
            scores = np.einsum("hed,hsd->hes", parts[r], k[b][:, slots]) * cache.dim**-0.5
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[r] = np.einsum("hes,hsd->hed", p / p.sum(-1, keepdims=True), v[b][:, slots])
    return out.reshape(rows, -1)


SHAPES = [(16, 64, 1, 2), (16, 128, 4, 1), (8, 64, 2, 2), (4, 64, 8, 1), (16, 40, 3, 1)]


@pytest.mark.parametrize(("bits", "dim", "each", "kv_heads"), SHAPES)
def test_attention_is_that_of_float64(machine: Machine, bits: int, dim: int, each: int, kv_heads: int) -> None:
    rng = np.random.default_rng(dim)
    for capacity, lengths, window, tokens in ((70, [0, 69], 0, 1), (200, [180, 3], 0, 1), (40, [100, 17], 24, 3)):
        cache = filled(machine, 2, kv_heads, capacity, dim, bits, capacity)
        q = rng.standard_normal((2 * tokens, each * kv_heads * dim)).astype(np.float16)
        out = poisoned(machine, q.shape, np.float16)
        item = attend(machine, cache, machine.put(q), machine.put(np.array(lengths, np.int32)), out, window)
        machine.run([item])
        machine.put(np.full(q.shape, np.nan, np.float16), out)
        machine.run([item])  # the counters are back at 0
        ends = [lengths[b] + 1 + i for b in range(2) for i in range(tokens)]
        seen = [range(max(0, end - capacity, end - window if window else 0), end) for end in ends]
        assert far(machine.get(out), attention(machine, cache, q, seen)) < 2 * TOLERANCE


def test_cross_attention_sees_what_was_encoded(machine: Machine) -> None:
    cache = filled(machine, 2, 2, 150, 64, 8, 0)
    q = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float16)
    out = poisoned(machine, q.shape, np.float16)
    machine.run([attend(machine, cache, machine.put(q), machine.put(np.array([150, 0], np.int32)), out, cross=True)])
    assert far(machine.get(out), attention(machine, cache, q, [range(150), range(150), range(0), range(0)])) < 2 * TOLERANCE


# ---- a whole step


DIM, HEADS, KV_HEADS, HEAD, FEED, WORDS, LAYERS = 64, 2, 1, 64, 96, 40, 2


def model() -> tuple[list[dict[str, Code]], Code]:
    shapes = {
        "qkv": ((HEADS + 2 * KV_HEADS) * HEAD, DIM),
        "out": (DIM, HEADS * HEAD),
        "gate": (FEED, DIM),
        "up": (FEED, DIM),
        "down": (DIM, FEED),
    }
    layers = [{n: weights(10 * i + j, *shape, 4, 32, False) for j, (n, shape) in enumerate(shapes.items())} for i in range(LAYERS)]
    return layers, weights(99, WORDS, DIM, 4, 32, False)


def tokens_of_float64(turns: tuple[Any, Any], first: int, steps: int) -> tuple[list[int], Any]:
    """Tokens, and the logits of the last step, without rounding but that of the weights."""
    codes, head_code = model()
    layers, head = [{n: decode(c).astype(np.float64) for n, c in w.items()} for w in codes], decode(head_code).astype(np.float64)
    keys: list[list[Any]] = [[] for _ in layers]
    values: list[list[Any]] = [[] for _ in layers]
    out, token, logits = [], first, np.zeros(0)
    for position in range(steps):
        x = head[token]
        for i, w in enumerate(layers):
            normed = x / np.sqrt((x * x).mean() + 1e-6)
            qkv = (w["qkv"] @ normed).reshape(-1, HEAD)
            qk = turned(qkv[: HEADS + KV_HEADS], turns[0][position], turns[1][position])
            keys[i].append(qk[HEADS])
            values[i].append(qkv[-1])
            scores = qk[:HEADS] @ np.array(keys[i]).T * HEAD**-0.5
            p = np.exp(scores - scores.max(1, keepdims=True))
            x = x + w["out"] @ (p / p.sum(1, keepdims=True) @ np.array(values[i])).ravel()
            normed = x / np.sqrt((x * x).mean() + 1e-6)
            gate = w["gate"] @ normed
            x = x + w["down"] @ (gate / (1 + np.exp(-gate)) * (w["up"] @ normed))
        logits = head @ (x / np.sqrt((x * x).mean() + 1e-6))
        token = int(logits.argmax())
        out.append(token)
    return out, logits


def test_a_decode_loop_gives_the_tokens_of_float64(machine: Machine) -> None:
    codes, head = model()
    ones = machine.put(np.ones(DIM, np.float32))
    layers = [
        Layer(
            **{n: Linear(machine, c, activation="silu" if n == "gate" else "none") for n, c in w.items()},
            attention_norm=ones, feed_norm=ones, cache=new_cache(machine, 1, KV_HEADS, 16, HEAD, 8),
        )
        for w in codes
    ]  # fmt: skip
    angles = np.arange(16)[:, None] * 10.0 ** -np.linspace(0, 4, HEAD // 2)
    turns = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    launches, state = decode_step(machine, layers, Linear(machine, head), ones, 1, (machine.put(turns[0]), machine.put(turns[1])), 16)
    machine.put(np.array([7], np.int32), state.token)
    step = machine.graph(launches)
    for _ in range(5):
        step()
    tokens, logits = tokens_of_float64(turns, 7, 5)
    assert machine.get(state.history)[0, :5].tolist() == tokens
    assert machine.get(state.position).tolist() == [5]
    assert far(machine.get(state.logits)[0], logits) < 0.02
