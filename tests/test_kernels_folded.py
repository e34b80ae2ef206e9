"""GEMMs of many rows, whose scales are multiplied into the weights first: how far that may be from float64, for every form."""

from __future__ import annotations

import numpy as np
import pytest

from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.linear import Linear
from edgesdk.kernels.numba.folded import MOST, ROWS
from edgesdk.kernels.numba.simd import VNNI
from edgesdk.kernels.pack import as_kept
from edgesdk.kernels.reference import linear, round_inputs
from edgesdk.packed import Code, decode
from tests.test_kernels_linear import TOLERANCE, far, grid, supers, table

TARGETS = [t for t in host_targets() if t in VNNI]
pytestmark = pytest.mark.skipif(not TARGETS, reason="this CPU has no instruction for products of bytes (VNNI)")
FORMS = {
    **{f"{bits} bits{', zeros' * zeros}": (lambda rows, cols, b=bits, z=zeros: grid(rows, rows, cols, b, 32, z)) for bits in (4, 3, 2) for zeros in (False, True)},
    "groups of 128": lambda rows, cols: grid(rows, rows, cols, 4, 128, False),
    "a table": lambda rows, cols: table(rows, rows, cols, 4, 32, False),
    "tables": lambda rows, cols: table(rows, rows, cols, 3, 32, True),
    "super-blocks": lambda rows, cols: supers(rows, rows, cols),
}  # fmt: skip


def allowed(x: np.ndarray, code: Code) -> np.ndarray:
    """Half a step of an int8 row (and a little: factors are rounded, too) of every weight that an input meets, [M, rows]."""
    q, scale, zero = round_inputs(x)
    step = 2.2 * np.abs(decode(code)).max(1) / 127
    return 0.6 * np.abs(scale[:, None] * (q - zero[:, None])).sum(1)[:, None] * step


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_many_rows_are_within_the_rounding_of_int8_rows(target: str, form: str) -> None:
    rng = np.random.default_rng(0)
    for rows, cols, m in ((64, 512, 64), (3, 500, 96), (130, 288, 131), (65, 1024, 75)):
        code, bias = FORMS[form](rows, cols), rng.standard_normal(rows).astype(np.float32)
        x, residual = rng.standard_normal((m, cols)).astype(np.float32) + 0.5, rng.standard_normal((m, rows)).astype(np.float32)
        layer, kept = Linear(code, target, bias), as_kept(code)
        wanted = linear(x, kept, bias, residual)
        y = layer(x, residual)
        assert (np.abs(y - wanted) <= allowed(x, kept) + 1e-4).all()
        weights = decode(kept)
        noise = np.sqrt(np.square(y - wanted).mean() / np.square(wanted - residual - bias).mean())
        assert noise < 0.025, "of the products, root mean square"
        own = np.sqrt(
            np.square(
                weights - np.round(weights * 127 / np.abs(weights).max(1, keepdims=True)) * np.abs(weights).max(1, keepdims=True) / 127
            ).mean()
        )
        assert noise < 3.0 * own / np.sqrt(np.square(weights).mean()), "of what int8 rows would add"


@pytest.mark.parametrize("target", TARGETS)
def test_scales_that_differ_by_thousands_and_rows_of_zeros(target: str) -> None:
    rng = np.random.default_rng(1)
    code = grid(1, 48, 320, 4, 32, False)
    scale = (
        code.arrays[1]
        * np.float32(10.0) ** rng.integers(-4, 1, code.arrays[1].shape).astype(np.float32)
        * rng.choice([-1, 1], code.arrays[1].shape)
    )
    scale[5] = 0
    code = Code("grid", code.shape, code.numbers, (code.arrays[0], scale.astype(np.float32), code.arrays[2]))
    x = rng.standard_normal((70, 320)).astype(np.float32) * 1e3
    y, wanted = Linear(code, target)(x), linear(x, code)
    assert (np.abs(y - wanted) <= allowed(x, code) + 1e-3).all()
    assert not y[:, 5].any()


@pytest.mark.parametrize("target", TARGETS)
def test_threads_make_no_difference(target: str) -> None:
    code, x = grid(2, 200, 256, 4, 32, True), np.random.default_rng(2).standard_normal((97, 256)).astype(np.float32)
    np.testing.assert_array_equal(Linear(code, target)(x), Linear(code, target, threads=2)(x))


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_rows_and_very_long_ones_keep_their_scales(target: str) -> None:
    rng = np.random.default_rng(3)
    for cols, m in ((256, ROWS[False] - 1), (MOST + 32, ROWS[False])):
        code, x = grid(3, 16, cols, 4, 32, False), rng.standard_normal((m, cols)).astype(np.float32)
        assert far(Linear(code, target)(x), linear(x, code)) < TOLERANCE
