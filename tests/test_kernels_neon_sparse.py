"""Products without zero weights and with weights in floats, as LLVM makes them for arm64, on emulated cores against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_kernels_neon_forms import CORES, bytes_of, pytestmark  # noqa: F401
from test_kernels_sparse import grid

from edgesdk.kernels import sparse
from edgesdk.kernels.floats import pack_floats, unpacked
from edgesdk.kernels.library import FLOAT_ARGS
from edgesdk.kernels.neon import build
from edgesdk.kernels.reference import linear, matrix
from tests import emulated

FORMS = ((8, 0, "2of4"), (4, 32, "2of4"), (8, 0, "1of4"), (4, 32, "4of16"), (8, 0, "8of16"), (8, 0, "blocks"), (4, 32, "blocks"))
SHAPES = ((64, 256, 1), (3, 33, 17), (23, 96, 2), (9, 500, 5), (2, 40, 1))


def kernels() -> list[str]:
    forms = [f"{bits}_{'block' if group else 'row'}_{pattern}" for bits, group, pattern in FORMS]
    return [f"{how}_{form}" for form in (*forms, "32", "16") for how in ("gemv", "gemm")]


@pytest.fixture(scope="module")
def harness() -> tuple[Path, list[str]]:
    targets = tuple(emulated.CPUS)
    names = [f"llvm_{build.symbol(t, k)}" for t in targets for k in kernels()]
    return emulated.program(names, emulated.emitted(targets, kernels())), names


@pytest.mark.parametrize(("target", "cpu"), CORES)
def test_products_are_those_of_float64(target: str, cpu: str, harness: tuple[Path, list[str]], tmp_path: Path) -> None:
    rng, cases = np.random.default_rng(7), []
    for bits, group, pattern in FORMS:
        for i, (rows, cols, m) in enumerate(SHAPES):
            code, x = grid(i, rows, cols, bits, group, pattern), rng.standard_normal((m, cols)).astype(np.float32)
            panels = sparse.packed(code, pattern, 4, 2)
            for how, given in (("gemv", x[:1]), ("gemm", x)):
                kernel = f"llvm_{build.symbol(target, how)}_{panels.form}"
                cases.append((emulated.product(kernel, panels, bytes_of(given), {}, None, i % 4), linear(given, code), 1e-3))
    for bits in (32, 16):
        for rows, cols, m in SHAPES:
            weight, x = rng.standard_normal((rows, cols)).astype(np.float32), rng.standard_normal((m, cols)).astype(np.float32)
            made = pack_floats(weight, bits, 4, 2)
            for how, given in (("gemv", x[:1]), ("gemm", x)):
                case = emulated.Case()
                for name, array in (
                    ("codes", made.codes),
                    ("row_scale", made.row_scale),
                    ("x", given),
                    ("out", np.zeros((len(given), made.panels * 4), "f")),
                ):
                    case.add(name, array)
                sizes = {
                    "x_stride": 4 * cols,
                    "m": len(given),
                    "cols": cols,
                    "panel_bytes": made.codes.nbytes // made.panels,
                    "stride": 16 * made.panels,
                }
                parts = (0, made.panels // (1 if how == "gemv" else 2))
                case.steps.append((f"llvm_{build.symbol(target, how)}_{bits}", case.table(FLOAT_ARGS, sizes), parts, 1))
                cases.append((case, matrix(given, unpacked(made)), 5e-6))
    emulated.run(*harness, [case for case, *_ in cases], cpu, tmp_path)
    for case, wanted, most in cases:
        out = case.given("out", np.float32, (len(wanted), case.buffers[case.places["out"]].size // 4 // len(wanted)))
        assert np.abs(out[:, : wanted.shape[1]] - wanted).max() <= most * np.abs(wanted).max(), case.steps[0][0]
