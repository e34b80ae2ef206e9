"""Products without zero weights and with weights in floats, on every target that this machine runs, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.kernels import sparse
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.floats import pack_floats, unpacked
from edgesdk.kernels.library import args_of, bits_of, library
from edgesdk.kernels.panels import FloatPanels, Panels, UnfitWeights
from edgesdk.kernels.reference import embedding, linear, matrix
from edgesdk.kernels.tape import Tape, panel_sizes, singles
from edgesdk.packed import Code, decode

TOLERANCE = 2e-3
"""Of the largest output: scales in float16."""
SHAPES = ((64, 512, 1), (3, 33, 17), (130, 288, 2), (65, 500, 21))
PATTERNS = (*sparse.PATTERNS, sparse.BLOCKS)


def grid(seed: int, rows: int, cols: int, bits: int, group: int, pattern: str, zeros: bool = False) -> Code:
    """A random grid of which only what `pattern` allows is not zero; of blocks of 4 rows by 32 columns about half."""
    rng = np.random.default_rng(seed)
    shape = (rows, 1 if group == 0 else -(-cols // group))
    zero = rng.integers(0, 1 << bits, shape).astype(np.uint8) if zeros else np.zeros(0, np.uint8)
    nothing = np.repeat(zero, group or cols, 1)[:, :cols] if zeros else np.uint8(1 << (bits - 1))
    q = np.where(mask(rng, rows, cols, pattern), rng.integers(0, 1 << bits, (rows, cols)), nothing).astype(np.uint8)
    return Code("grid", (rows, cols), (bits, group), (q, (rng.random(shape) + 0.1).astype(np.float32), zero))


def mask(rng: np.random.Generator, rows: int, cols: int, pattern: str) -> Any:
    if pattern == sparse.BLOCKS:
        return np.repeat(np.repeat(rng.random((-(-rows // 4), -(-cols // 32))) < 0.5, 4, 0), 32, 1)[:rows, :cols]
    n, m = sparse.PATTERNS[pattern]
    places = rng.random((rows, -(-cols // m), m)).argsort(2).argsort(2)
    return (places < n).reshape(rows, -1)[:, :cols]


def packed(code: Code, pattern: str, target: str) -> Panels:
    lib = library(target)
    return sparse.packed(code, pattern, lib.lanes, lib.together, lib.half)


def product(p: Panels, target: str, x: Any, bias: Any = None, residual: Any = None, threads: int = 1) -> Any:
    tape = Tape(library(target), threads)
    rows, out = tape.room(len(x), p.cols), tape.room(len(x), p.rows)
    rows.array[:] = x
    more: dict[str, Any] = {}
    if bias is not None:
        more["bias"] = np.zeros(len(p.row_scale), np.float32)
        more["bias"][: p.rows] = bias
    if residual is not None:
        more["residual"] = tape.room(len(x), p.rows)
        more["residual"].array[:] = residual
    if isinstance(p, FloatPanels):
        tape.floats(p, rows, out, **more)
    else:
        tape.linear(p, tape.round(rows, tape.library.shift_of(p.value_bits)), out, **more)
    tape.run()
    return out.array.copy()


def far(y: Any, wanted: Any) -> float:
    return float(np.abs(y - wanted).max() / max(np.abs(wanted).max(), 1e-30))


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize(
    ("bits", "group", "pattern"),
    [(8, 0, "2of4"), (4, 32, "2of4"), (4, 64, "4of16"), (8, 0, "1of4"), (8, 32, sparse.BLOCKS), (4, 0, sparse.BLOCKS)],
)
def test_products_are_those_of_float64(target: str, bits: int, group: int, pattern: str) -> None:
    check(target, bits, group, pattern)


@pytest.mark.wide
@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("bits", sparse.BITS)
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_form_on_every_target(target: str, bits: int, group: int, pattern: str) -> None:
    if sparse.pays(bits, pattern):
        check(target, bits, group, pattern)


def check(target: str, bits: int, group: int, pattern: str) -> None:
    rng = np.random.default_rng(bits)
    for rows, cols, m in SHAPES:
        code = grid(rows, rows, cols, bits, group, pattern)
        bias, residual = rng.standard_normal(rows).astype(np.float32), rng.standard_normal((m, rows)).astype(np.float32)
        x = rng.standard_normal((m, cols)).astype(np.float32)
        p = packed(code, pattern, target)
        assert far(product(p, target, x, bias, residual), linear(x, code, bias, residual)) < TOLERANCE
        assert far(product(p, target, x), linear(x, code)) < TOLERANCE


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize(("bits", "group", "zeros"), [(3, 32, False), (2, 32, True), (8, 0, True)])
def test_blocks_of_every_form_are_left_out(target: str, bits: int, group: int, zeros: bool) -> None:
    for rows, cols, m in SHAPES:
        code = grid(rows, rows, cols, bits, group, sparse.BLOCKS, zeros)
        x = np.random.default_rng(m).standard_normal((m, cols)).astype(np.float32)
        assert far(product(packed(code, sparse.BLOCKS, target), target, x), linear(x, code)) < TOLERANCE


@pytest.mark.parametrize("target", [t for t in host_targets() if "vnni" in t] or host_targets()[:1])
@pytest.mark.parametrize("pattern", ["2of4", "1of4"])
def test_many_rows_meet_weights_that_scales_were_multiplied_into(target: str, pattern: str) -> None:
    """Rounded once more, to int8."""
    for rows, cols, m in ((65, 500, 130), (130, 288, 71)):
        code, x = grid(rows, rows, cols, 4, 32, pattern), np.random.default_rng(m).standard_normal((m, cols)).astype(np.float32)
        p, wanted = packed(code, pattern, target), linear(x, code)
        y = product(p, target, x)
        assert far(y, wanted) < 0.02 and np.square(y - wanted).mean() < 0.008**2 * np.square(wanted).mean()
        assert np.array_equal(y, product(p, target, x, threads=2))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 200), m=st.integers(1, 14), bits=st.sampled_from(sparse.BITS),
    pattern=st.sampled_from(["2of4", "1of4", sparse.BLOCKS]), kept=st.sampled_from([0.0, 0.3, 1.0]), value=st.sampled_from([1e-20, 1.0, 3e30]), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_any_shape(rows: int, cols: int, m: int, bits: int, pattern: str, kept: float, value: float, seed: int) -> None:
    """Fewer weights than the pattern allows, rows of nothing but zeros; the lowest code; tiny and huge inputs."""
    group = 32 if bits == 4 else 0
    code = grid(seed, rows, cols, bits, group, pattern)
    rng = np.random.default_rng(seed)
    code.arrays[0][rng.random((rows, cols)) > kept] = 1 << (bits - 1)
    code.arrays[0][(rng.random((rows, cols)) < 0.3) & (code.arrays[0] != 1 << (bits - 1))] = 0
    x = (value * rng.standard_normal((m, cols))).astype(np.float32)
    y, wanted = product(packed(code, pattern, host_targets()[0]), host_targets()[0], x), linear(x, code)
    assert np.abs(y - wanted).max() <= TOLERANCE * (np.abs(wanted).max() + value * np.abs(decode(code)).sum(1).max() + 1e-30)


def test_two_threads_give_what_one_gives() -> None:
    for pattern in ("2of4", sparse.BLOCKS):
        p = packed(grid(1, 1024, 1024, 4, 32, pattern), pattern, host_targets()[0])
        for m in (1, 40):
            x = np.random.default_rng(2).standard_normal((m, 1024)).astype(np.float32)
            assert np.array_equal(product(p, host_targets()[0], x, threads=2), product(p, host_targets()[0], x))


def test_weights_take_the_bytes_that_their_bits_say() -> None:
    for bits, group, pattern, each in (
        (8, 0, "2of4", 5),
        (8, 0, "1of4", 2.5),
        (4, 32, "2of4", 3.5),
        (4, 32, "1of4", 2),
        (8, 0, "4of16", 3),
    ):
        p = sparse.of_pattern(grid(0, 1024, 2048, bits, group, pattern), pattern, 16)
        assert p.nbytes * 8 / (1024 * 2048) == pytest.approx(each, abs=0.1)


@pytest.mark.parametrize(
    ("bits", "pattern", "wanted"),
    [(8, "2of4", "8_row_2of4"), (8, "1of4", "8_row_1of4"), (8, "4of16", "8_row_4of16"), (8, "8of16", "8_row_8of16"), (4, "2of4", "4_row_2of4"),
     (8, "blocks", "8_row_blocks"), (4, "8of16", "4_row"), (8, "", "8_row")],
)  # fmt: skip
def test_the_form_of_fewest_bytes_is_taken(bits: int, pattern: str, wanted: str) -> None:
    code = grid(0, 256, 512, bits, 0, pattern or "8of16")
    if not pattern:
        code.arrays[0][code.arrays[0] == 1 << (bits - 1)] += 1
    assert sparse.packed(code, sparse.pattern_of(code, 4), 4).form == wanted


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grid(0, 8, 64, 4, 32, "8of16"), r"of 4 columns .* holds 2"),
        (grid(0, 8, 64, 3, 32, "2of4"), "3 bits"),
        (grid(0, 8, 64, 4, 32, "2of4", zeros=True), "zeros of their own"),
    ],
)
def test_weights_that_a_pattern_does_not_hold_are_refused(code: Code, words: str) -> None:
    with pytest.raises(UnfitWeights, match=words):
        sparse.of_pattern(code, "2of4", 16)


def test_masked_and_sparse_grids_are_grids_with_zeros() -> None:
    inner = grid(0, 8, 64, 4, 32, "8of16", zeros=True)
    kept = (np.random.default_rng(0).random((8, 64)) < 0.4).astype(np.uint8)
    masked = Code("masked", (8, 64), (), (kept,), (inner,))
    assert np.array_equal(decode(sparse.as_grid(masked)), decode(masked))
    few = Code(
        "grid",
        (1, int(kept.sum())),
        (8, 0),
        (np.arange(kept.sum(), dtype=np.uint8)[None], np.full((1, 1), 0.5, np.float32), inner.arrays[2][:0]),
    )
    apart = Code("sparse", (8, 64), (), (kept,), (few,))
    assert sparse.as_grid(apart).kind == "grid" and np.array_equal(decode(sparse.as_grid(apart)), decode(apart))
    assert sparse.as_grid(inner) is inner
    groups = Code("grid", few.shape, (8, 32), (few.arrays[0], np.ones((1, -(-few.shape[1] // 32)), np.float32), few.arrays[2]))
    unaligned = Code("sparse", (8, 64), (), (kept,), (groups,))
    assert sparse.as_grid(unaligned) is unaligned


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("bits", [32, 16])
def test_floats_are_multiplied_as_floats(target: str, bits: int) -> None:
    if bits == 16 and not library(target).half:
        pytest.skip("this CPU turns no float16 into float32")
    rng = np.random.default_rng(3)
    for rows, cols, m in (*SHAPES, (1, 1, 1)):
        for size in (1e-30, 1.0, 1e20):
            weight, x = ((rng.standard_normal(s) * f).astype(np.float32) for s, f in (((rows, cols), size), ((m, cols), 3.0)))
            lib = library(target)
            p = pack_floats(weight, bits, lib.lanes, lib.together)
            bias, residual = (rng.standard_normal(s).astype(np.float32) * np.float32(size) for s in (rows, (m, rows)))
            assert far(product(p, target, x, bias, residual), matrix(x, unpacked(p), bias, residual)) < 5e-6
            assert far(unpacked(p), weight) <= (2**-11 if bits == 16 else 0)


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("bits", [32, 16])
def test_rows_of_float_panels_are_looked_up(target: str, bits: int) -> None:
    lib = library(target)
    if bits == 16 and not lib.half:
        pytest.skip("this CPU turns no float16 into float32")
    weight, ids = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32), np.array([0, 49, 17, 17])
    p, tape = pack_floats(weight, bits, lib.lanes, lib.together), Tape(lib)
    out = tape.room(4, 70)
    tape.add(
        f"embed_{p.form}", 4, ids=ids, codes=p.codes, row_scale=p.row_scale, blocks=out.blocks, factor=bits_of(2.5), out=out, stride=out.stride,
        **panel_sizes(p),
    )  # fmt: skip
    tape.run()
    np.testing.assert_allclose(out.array, embedding(unpacked(p), ids, 2.5), rtol=1e-6)
    assert not out.values[:, 70:].any()


def test_names_have_their_args() -> None:
    assert "kept" in args_of("gemm_4_block_zeros_blocks") and "x_stride" in args_of("gemv_16")
    assert args_of("gemv_8_row_2of4") == args_of("gemv_8_row")


@pytest.mark.parametrize("target", host_targets())
def test_single_weights_meet_columns_of_many_rows(target: str) -> None:
    rng = np.random.default_rng(5)
    for rows, cols, m in ((64, 64, 16), (70, 100, 5), (3, 33, 70), (130, 40, 129), (1, 1, 3)):
        weights = np.where(rng.random((rows, cols)) < 0.1, rng.standard_normal((rows, cols)), 0).astype(np.float32)
        n, columns = np.nonzero(weights)
        starts = np.concatenate([[0], np.cumsum(np.bincount(n, minlength=rows))]).astype(np.int32)
        found = []
        for threads in (1, 2):
            tape = Tape(library(target), threads)
            x, out = tape.room(m, cols), tape.room(m, rows)
            x.array[:] = np.random.default_rng(m).standard_normal((m, cols))
            out.array[:] = 1
            turned = tape.turn(x)
            singles(tape, x, turned, (starts, columns.astype(np.int32), weights[n, columns]), out)
            tape.run()
            assert np.array_equal(turned.array[:cols], x.array.T)
            assert far(out.array, matrix(x.array, weights) + 1) < 1e-5
            assert not out.values[:, rows:].any()
            found.append(out.array.copy())
        assert np.array_equal(*found)
