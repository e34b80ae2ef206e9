"""Linear layers on our kernels: every form of weights on every target that this machine runs, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.kernels.cpu import host_targets, targets_of
from edgesdk.kernels.library import bits_of, library
from edgesdk.kernels.linear import Linear
from edgesdk.kernels.nearest import nearest
from edgesdk.kernels.numba import compiled, simd
from edgesdk.kernels.numba import library as numba_library
from edgesdk.kernels.numba.simd import permutes
from edgesdk.kernels.pack import LOST, as_kept, pack
from edgesdk.kernels.panels import Panels, UnfitWeights
from edgesdk.kernels.patterns import BLOCKS
from edgesdk.kernels.reference import embedding, linear, round_inputs
from edgesdk.kernels.sparse import packed, pattern_of
from edgesdk.kernels.superblocks import super_blocks
from edgesdk.kernels.tape import Tape, panel_sizes
from edgesdk.packed import Code, decode

TOLERANCE = 2e-3
"""Of the largest output: scales in float16 (2^-11), and an input at the middle of two codes that goes the other way."""


def grid(seed: int, rows: int, cols: int, bits: int, group: int, zeros: bool, size: float = 1.0) -> Code:
    rng = np.random.default_rng(seed)
    groups = 1 if group == 0 else -(-cols // group)
    q = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    scale = (rng.random((rows, groups)) + 0.1).astype(np.float32) * np.float32(size)
    zero = rng.integers(0, 1 << bits, (rows, groups)).astype(np.uint8) if zeros else np.zeros(0, np.uint8)
    return Code("grid", (rows, cols), (bits, group), (q, scale, zero))


def table(seed: int, rows: int, cols: int, bits: int, group: int, own: bool) -> Code:
    """Codes of a table of normal numbers, one for all rows or one a row; scales where there are groups."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    numbers = np.sort(rng.standard_normal((rows if own else 1, 1 << bits)), 1).astype(np.float16)
    scale = (rng.random((rows, -(-cols // group) if group else 0)) + 0.1).astype(np.float32)
    return Code("table", (rows, cols), (bits, group), (q, numbers, scale))


def supers(seed: int, rows: int, cols: int) -> Code:
    """Weights away from 0, rounded to super-blocks."""
    return super_blocks((np.random.default_rng(seed).standard_normal((rows, cols)) + 0.3).astype(np.float32))


def ternary(seed: int, rows: int, cols: int, group: int, middle: bool = False) -> Code:
    """Weights of -1, 0 and 1 of a scale; with `middle` as a symmetric grid of 2 bits has them, else as the method `ternary` stores them."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 3, (rows, cols)).astype(np.uint8)
    scale = (rng.random((rows, -(-cols // group) if group else 1)) + 0.1).astype(np.float16)
    arrays = (q + 1, scale, np.zeros(0, np.uint8)) if middle else (q, scale, np.ones((1, 1), np.uint8))
    return Code("grid", (rows, cols), (2, group), arrays)


class Packed(Linear):
    """A layer on these panels."""

    def __init__(self, panels: Panels, target: str) -> None:
        self.library, self.threads, self.panels, self.bias, self._rows = library(target), 1, panels, None, 0


def far(y: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(y - wanted).max() / max(np.abs(wanted).max(), 1e-30))


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("zeros", [False, True], ids=["middle", "zeros"])
def test_products_are_those_of_float64(target: str, bits: int, group: int, zeros: bool) -> None:
    rng = np.random.default_rng(bits + group)
    for rows, cols, m in ((64, 512, 1), (3, 33, 17), (130, 288, 2), (65, 500, 21)):
        code = grid(rows, rows, cols, bits, group, zeros)
        bias, residual = rng.standard_normal(rows).astype(np.float32), rng.standard_normal((m, rows)).astype(np.float32)
        layer = Linear(code, target, bias)
        x = rng.standard_normal((m, cols)).astype(np.float32)
        assert far(layer(x, residual), linear(x, code, bias, residual)) < TOLERANCE
        assert far(layer(x), linear(x, code, bias)) < TOLERANCE


WIDE = pytest.mark.wide


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize(
    ("bits", "group", "own"),
    [
        (4, 0, True), (4, 32, False), (3, 32, True), (2, 0, False),
        *(pytest.param(*p, marks=WIDE) for p in ((4, 0, False), (4, 32, True), (3, 0, False), (3, 0, True), (3, 32, False), (2, 0, True), (2, 32, False), (2, 32, True))),
    ],
)  # fmt: skip
def test_products_of_tables_are_those_of_float64(target: str, bits: int, group: int, own: bool) -> None:
    rng = np.random.default_rng(bits + group)
    for rows, cols, m in ((64, 512, 1), (3, 33, 17), (130, 288, 2), (65, 500, 21)):
        code, bias = table(rows, rows, cols, bits, group, own), rng.standard_normal(rows).astype(np.float32)
        x = rng.standard_normal((m, cols)).astype(np.float32)
        y, wanted = Linear(code, target, bias)(x), linear(x, as_kept(code), bias)
        assert far(y, wanted) < TOLERANCE
        assert 0 < far(linear(x, code, bias), wanted) < LOST


@pytest.mark.parametrize("target", host_targets())
def test_products_of_super_blocks_are_those_of_float64(target: str) -> None:
    rng = np.random.default_rng(3)
    for rows, cols, m in ((64, 512, 1), (3, 33, 17), (130, 288, 2), (65, 500, 21)):
        code, x = supers(rows, rows, cols), rng.standard_normal((m, cols)).astype(np.float32)
        residual = rng.standard_normal((m, rows)).astype(np.float32)
        assert far(Linear(code, target)(x, residual), linear(x, code, residual=residual)) < TOLERANCE


def check_ternary(target: str) -> None:
    kernels, rng = library(target), np.random.default_rng(5)
    for rows, cols, m in ((64, 512, 1), (3, 33, 17), (130, 288, 2), (65, 500, 21), (20, 96, 1), (17, 64, 9)):
        for group, middle in ((0, False), (32, True)):
            code, x = ternary(rows, rows, cols, group, middle), rng.standard_normal((m, cols)).astype(np.float32)
            panels = pack(code, kernels.lanes, kernels.together, kernels.half, trits=True)
            assert panels.kind == "trits" and far(Packed(panels, target)(x), linear(x, code)) < TOLERANCE


@pytest.mark.parametrize("target", host_targets())
def test_products_of_ternary_weights_are_those_of_float64(target: str) -> None:
    check_ternary(target)


@pytest.mark.skipif(not permutes(host_targets()[0]), reason="this CPU has not AVX-512 VBMI: the test before goes the other way")
def test_products_of_ternary_weights_without_a_permutation_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (simd, compiled):
        monkeypatch.setattr(module, "permutes", lambda target: False)
    numba_library._functions.cache_clear()
    try:
        check_ternary(host_targets()[0])
    finally:
        numba_library._functions.cache_clear()


def test_ternary_weights_take_five_bits_for_three_where_that_is_faster() -> None:
    code = ternary(0, 1024, 3072, 0)
    assert pack(code, 16).nbytes * 8 / code.arrays[0].size == pytest.approx(5 / 3, abs=0.03)
    assert pack(code, 4).form == "2_row_zeros" and pack(code, 16).form == "5_row_trits"
    assert pack(grid(0, 4, 64, 2, 0, False), 16).form == "2_row"


def test_ternary_weights_may_leave_out_blocks_of_zeros() -> None:
    code = ternary(0, 64, 320, 0)
    code.arrays[0][:, 64:256] = 1  # 0
    assert pattern_of(code, 16) == BLOCKS and pattern_of(ternary(0, 64, 320, 0), 16) == ""
    panels = packed(code, BLOCKS, 16, 2)
    assert panels.form == "2_row_zeros_blocks" and panels.nbytes < 0.6 * pack(code, 16, 2).nbytes


@pytest.mark.parametrize("target", host_targets())
def test_rows_are_looked_up_in_every_form(target: str) -> None:
    kernels, ids = library(target), np.array([0, 49, 17, 3, 33])
    for code in (
        table(1, 50, 96, 4, 0, True),
        table(2, 50, 96, 3, 32, False),
        table(3, 50, 96, 2, 32, True),
        supers(4, 50, 320),
        ternary(5, 50, 128, 32),
    ):
        p = pack(code, kernels.lanes, kernels.together, kernels.half, trits=True)
        tape = Tape(kernels)
        out = tape.room(5, p.cols)
        parts = {name: getattr(p, name) for name in ("codes", "scales", "zeros", "row_scale", "tables")}
        tape.add(f"embed_{p.form}", 5, ids=ids, **parts, **panel_sizes(p), blocks=p.blocks, factor=bits_of(3.0), out=out, stride=out.stride)
        tape.run()
        assert far(out.array, embedding(as_kept(code), ids, 3.0)) < TOLERANCE


def test_super_blocks_are_nearer_than_grids_and_lose_nothing_in_panels() -> None:
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    w[:, 5] *= 30
    w[3] = 0
    w[4] = 2
    for half in (True, False):
        code = super_blocks(w, half)
        assert np.array_equal(decode(as_kept(code, half)), decode(code))
        lost = [np.sqrt(np.square(decode(c) - w)[6:].mean()) for c in (code, nearest(w, 4, 32, half))]
        assert lost[0] < 0.85 * lost[1] and lost[0] / np.sqrt((w[6:] ** 2).mean()) < 0.08
        assert not decode(code)[3].any() and np.allclose(decode(code)[4], 2, rtol=1e-2)
    assert pack(code, 16).nbytes * 8 / w.size == pytest.approx(4.56, abs=0.1)


def test_zeros_that_are_no_codes_become_offsets_where_that_loses_little() -> None:
    code = grid(0, 20, 320, 4, 32, True)
    q, scale, zero = code.arrays
    for turned in (1, -1):
        near = Code("grid", code.shape, (4, 32), (q, scale * turned, zero * np.float32(0.97) + np.float32(0.31)))
        x = np.random.default_rng(1).standard_normal((3, 320)).astype(np.float32)
        assert far(Linear(near, host_targets()[0])(x), linear(x, as_kept(near))) < TOLERANCE
        assert far(linear(x, near), linear(x, as_kept(near))) < LOST
    with pytest.raises(UnfitWeights, match="super-blocks hold"):
        pack(Code("grid", code.shape, (4, 32), (q, scale, zero * np.float32(3.5))), 16)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 200), m=st.integers(1, 14), bits=st.sampled_from([8, 4, 3, 2]), group=st.sampled_from([0, 32, 64]),
    zeros=st.booleans(), size=st.sampled_from([1e-30, 1e-6, 1.0, 1e20]), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_any_shape_and_size(rows: int, cols: int, m: int, bits: int, group: int, zeros: bool, size: float, seed: int) -> None:
    code = grid(seed, rows, cols, bits, group, zeros, size)
    x = np.random.default_rng(seed).standard_normal((m, cols)).astype(np.float32)
    y = Linear(code, host_targets()[0])(x)
    wanted = linear(x, code)
    unit = np.abs(wanted).max() + np.abs(x).max() * size * cols**0.5
    assert np.abs(y - wanted).max() <= TOLERANCE * unit


def test_inputs_of_one_value_of_zero_and_of_huge_values_come_out_right() -> None:
    code = grid(0, 32, 64, 4, 32, False)
    layer = Linear(code, host_targets()[0])
    for x in (np.zeros((2, 64)), np.full((2, 64), 7.5), np.full((2, 64), -3e30), np.eye(2, 64) * 1e-20):
        x = x.astype(np.float32)
        assert far(layer(x), linear(x, code)) < TOLERANCE or not linear(x, code).any()


def test_two_threads_give_what_one_gives() -> None:
    code = grid(1, 1024, 1024, 4, 32, False)
    for m in (1, 40):
        x = np.random.default_rng(2).standard_normal((m, 1024)).astype(np.float32)
        assert np.array_equal(Linear(code, host_targets()[0], threads=2)(x), Linear(code, host_targets()[0])(x))


def test_zero_stays_zero_when_inputs_are_rounded() -> None:
    q, scale, zero = round_inputs(np.array([[0, 1, 2.5], [-1, 0, 0]], np.float32))
    assert (scale[:, None] * (q - zero[:, None]))[[0, 1], [0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (Code("dense", (4, 4), (), (np.zeros((4, 4), np.float32),)), "no grid and no table"),
        (Code("table", (4, 64), (5, 0), (np.zeros((4, 64), np.uint8), np.ones((1, 32), np.float16), np.zeros(0))), "5 bits"),
        (
            Code(
                "table", (1, 4000), (2, 0), (np.arange(4000)[None] % 2 + (np.arange(4000) == 9), np.array([[1, 1.3, 60, 0]]), np.zeros(0))
            ),
            "int8 holds",
        ),
        (grid(0, 4, 64, 5, 0, False), "5 bits"),
        (grid(0, 4, 64, 4, 16, False), "groups of 16"),
    ],
)
def test_weights_that_the_kernels_do_not_read_are_refused(code: Code, words: str) -> None:
    with pytest.raises(UnfitWeights, match=words):
        pack(code, 16)


def test_a_table_keeps_what_its_numbers_and_their_use_allow() -> None:
    """An entry that no weight has costs nothing; of one that none is near to zero, what lies beyond the last column counts nothing."""
    code = table(0, 40, 70, 4, 0, True)
    q, numbers, scale = code.arrays
    numbers[:, 15] = 60000
    kept = decode(as_kept(Code("table", code.shape, code.numbers, (np.minimum(q, 14), numbers, scale))))
    wanted = np.take_along_axis(numbers.astype(np.float64), np.minimum(q, 14).astype(int), 1)
    assert np.sqrt(((kept - wanted) ** 2).mean() / (wanted**2).mean()) < 0.006
    away = Code("table", code.shape, code.numbers, (q, np.abs(numbers.clip(-3, 3)) + 1, scale))
    x = np.random.default_rng(1).standard_normal((3, 70)).astype(np.float32) + 5
    assert far(Linear(away, host_targets()[0])(x), linear(x, as_kept(away))) < TOLERANCE


def test_packed_weights_take_the_bytes_that_their_bits_say() -> None:
    for bits, group, each in ((4, 32, 4.5), (8, 0, 8.0), (2, 64, 2.5), (3, 32, 3.5), (4, 0, 4.0)):
        panels = pack(grid(0, 1024, 2048, bits, group, False), 16)
        assert panels.nbytes * 8 / (1024 * 2048) == pytest.approx(each, abs=0.05)
    for group, own, each in ((0, False, 4.0), (0, True, 4.06), (32, False, 4.5)):
        assert pack(table(0, 1024, 2048, 4, group, own), 16).nbytes * 8 / (1024 * 2048) == pytest.approx(each, abs=0.05)


def test_targets_are_found_by_the_cpu_s_features() -> None:
    assert targets_of("aarch64", {"asimd", "asimddp"}) == ("arm-dotprod", "arm-neon", "plain")
    assert targets_of("x86_64", {"avx2", "f16c", "fma"}) == ("x86-avx2", "plain")
    assert targets_of("riscv64", set()) == ("plain",)
