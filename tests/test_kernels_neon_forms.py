"""Forms of weights that the C kernels have not: what LLVM makes of them for arm64, on emulated cores against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kernels_linear import supers, table, ternary

from edgesdk.kernels.neon import build
from edgesdk.kernels.pack import as_kept, pack
from edgesdk.kernels.panels import BLOCK
from edgesdk.kernels.reference import linear, round_inputs
from edgesdk.packed import Code
from tests import emulated

pytestmark = [
    pytest.mark.skipif(
        not build.compilers(), reason="no C compiler for arm64: pip install ziglang, or apt-get install gcc-aarch64-linux-gnu"
    ),
    pytest.mark.skipif(emulated.emulator() is None, reason="no emulator of arm64 programs: apt-get install qemu-user-static"),
]
CORES = [(target, cpu) for target, cpus in emulated.CPUS.items() for cpu in cpus]
CODES = {
    "one": lambda rows, cols: table(rows, rows, cols, 4, 32, False),
    "own": lambda rows, cols: table(rows, rows, cols, 4, 0, True),
    "super": lambda rows, cols: supers(rows, rows, cols),
    "ternary": lambda rows, cols: ternary(rows, rows, cols, 0),
    "ternary, groups": lambda rows, cols: ternary(rows, rows, cols, 32),
    "own, 3 bits": lambda rows, cols: table(rows, rows, cols, 3, 32, True),
}


def bytes_of(x: Any) -> tuple[Any, ...]:
    """x [M, cols] rounded as the reference does, as programs hold it: columns beyond the last are 0."""
    q, scale, zero = round_inputs(np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))))
    blocks = np.ascontiguousarray(q.astype(np.int8).reshape(len(q), -1, BLOCK).transpose(1, 0, 2))
    return blocks, blocks.sum(2, dtype=np.int32), scale.astype(np.float32), zero.astype(np.float32)


def kernels() -> list[str]:
    return [f"{how}_{pack(make(4, 64), 4, 2, trits=True).form}" for make in CODES.values() for how in ("gemv", "gemm")]


@pytest.fixture(scope="module")
def harness() -> tuple[Path, list[str]]:
    targets = tuple(emulated.CPUS)
    assert not set(kernels()) & set(build.kernels())
    names = [f"llvm_{build.symbol(t, k)}" for t in targets for k in kernels()]
    return emulated.program(names, emulated.emitted(targets, kernels())), names


@pytest.mark.parametrize(("target", "cpu"), CORES)
def test_products_are_those_of_float64(target: str, cpu: str, harness: tuple[Path, list[str]], tmp_path: Path) -> None:
    rng, cases = np.random.default_rng(7), []
    for make in CODES.values():
        for i, (rows, cols, m) in enumerate(((64, 256, 1), (3, 33, 17), (23, 96, 2), (9, 500, 5), (2, 40, 1))):
            code: Code = make(rows, cols)
            panels, x = pack(code, 4, 2, trits=True), rng.standard_normal((m, cols)).astype(np.float32)
            for how, given in (("gemv", x[:1]), ("gemm", x)):
                kernel = f"llvm_{build.symbol(target, how)}_{panels.form}"
                cases.append((emulated.product(kernel, panels, bytes_of(given), {}, None, i % 4), linear(given, as_kept(code))))
    emulated.run(*harness, [c for c, _ in cases], cpu, tmp_path)
    for case, wanted in cases:
        out = case.given("out", np.float32, (len(wanted), case.buffers[case.places["out"]].size // 4 // len(wanted)))
        assert np.abs(out[:, : wanted.shape[1]] - wanted).max() < 1e-3 * np.abs(wanted).max()
