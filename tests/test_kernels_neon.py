"""The C kernels for arm64, and those in LLVM IR, on emulated cores against float64: odd, tiny, unaligned and extreme cases, none of which traps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesdk.errors import CheckFailed, MissingTool
from edgesdk.kernels.library import LINEAR_ARGS
from edgesdk.kernels.neon import build
from edgesdk.kernels.pack import pack
from edgesdk.kernels.panels import BLOCK
from edgesdk.kernels.reference import linear, round_inputs
from edgesdk.packed import Code
from tests import emulated
from tests.emulated import Case, Panels

pytestmark = [
    pytest.mark.skipif(
        not build.compilers(), reason="no C compiler for arm64: pip install ziglang, or apt-get install gcc-aarch64-linux-gnu"
    ),
    pytest.mark.skipif(emulated.emulator() is None, reason="no emulator of arm64 programs: apt-get install qemu-user-static"),
]
CORES = [(target, cpu) for target, cpus in emulated.CPUS.items() for cpu in cpus]
SHAPES = ((64, 256, 1), (3, 33, 17), (23, 96, 2), (9, 500, 5), (1, 1, 1), (20, 64, 131))
EXACT = 2e-6
"""Of Σ |terms|: whole sums in float32, scales that are powers of two."""


def grid(seed: int, rows: int, cols: int, bits: int, group: int, zeros: bool) -> Code:
    """Codes that take every value, the lowest and the highest often; scales are powers of two, which float16 holds exactly."""
    rng = np.random.default_rng(seed)
    top = (1 << bits) - 1
    q = np.clip(rng.integers(-top // 2, top + top // 2 + 2, (rows, cols)), 0, top).astype(np.uint8)
    shape = (rows, 1 if group == 0 else -(-cols // group))
    scale = np.exp2(rng.integers(-6, 3, shape)).astype(np.float32)
    return Code(
        "grid",
        (rows, cols),
        (bits, group),
        (q, scale, rng.integers(0, top + 1, shape).astype(np.uint8) if zeros else np.zeros(0, np.uint8)),
    )


def bytes_of(x: Any) -> tuple[Any, ...]:
    """x [M, cols] rounded as the reference does → q int8 [blocks, M, 32] (0 beyond the last column), sums int32, scale, zero float32."""
    q, scale, zero = round_inputs(x)
    rows, cols = q.shape
    wide = np.zeros((rows, -(-cols // BLOCK) * BLOCK), np.int8)
    wide[:, :cols] = q
    blocks = np.ascontiguousarray(wide.reshape(rows, -1, BLOCK).transpose(1, 0, 2))
    return blocks, blocks.sum(2, dtype=np.int32), scale.astype(np.float32), zero.astype(np.float32)


class Checks:
    """Cases for one set of kernels, with what each must give."""

    def __init__(self, prefix: str, lanes: int = 4) -> None:
        self.prefix, self.lanes = prefix, lanes
        self.cases: list[tuple[Case, Any, Any, str]] = []

    def product(self, how: str, code: Code, x: Any, more: bool, part: tuple[int, int] | None = None, shift: int = 0) -> None:
        panels = pack(code, self.lanes, 2)
        rows = code.shape[0]
        rng = np.random.default_rng(rows)
        bias, residual = rng.standard_normal(rows).astype(np.float32), rng.standard_normal((len(x), rows)).astype(np.float32)
        width = panels.panels * panels.lanes
        extra = {"bias": _wide(bias[None], width), "residual": _wide(residual, width)} if more else {}
        kernel = f"{self.prefix}{how}_{form(panels)}"
        case = emulated.product(kernel, panels, bytes_of(x), extra, part, shift)
        wanted = linear(x, code, bias, residual) if more else linear(x, code)
        size = np.abs(x).max(1, keepdims=True) * np.abs(pull(code)).sum(1)[None] + (1 if more else 0) * 4
        self.cases.append((case, _wide(wanted, width), _wide(size, width), f"{kernel} {code.shape} x {len(x)} {part} {shift}"))

    def check(self) -> None:
        for case, wanted, size, what in self.cases:
            out = case.given("out", np.float32, wanted.shape)
            (kernel, _, (first, last), _) = case.steps[0]
            each = self.lanes * (2 if "gemm" in kernel else 1)
            inside = np.zeros(wanted.shape[1], bool)
            inside[first * each : last * each] = True
            assert (out[:, ~inside] == 777).all(), f"{what}: wrote outside its part"
            wrong = np.abs(out - wanted)[:, inside] - EXACT * size[:, inside]
            assert (wrong <= 0).all(), f"{what}: off by {np.abs(out - wanted)[:, inside].max():.3g}"


def _wide(values: Any, width: int) -> Any:
    out = np.zeros((len(values), width), np.asarray(values).dtype)
    out[:, : values.shape[1]] = values
    return out


def pull(code: Code) -> Any:
    from edgesdk.packed import decode

    return decode(code).astype(np.float64)


def form(panels: Panels) -> str:
    return f"{panels.bits}_{'row' if panels.group == 0 else 'block'}{'_zeros' if panels.zeros.size else ''}"


def everything(prefix: str) -> Checks:
    checks = Checks(prefix)
    rng = np.random.default_rng(7)
    for bits in (8, 4, 3, 2):
        for group in (0, 32, 128):
            for zeros in (False, True):
                for i, (rows, cols, m) in enumerate(SHAPES):
                    code, x = grid(i, rows, cols, bits, group, zeros), rng.standard_normal((m, cols)).astype(np.float32)
                    checks.product("gemm", code, x, more=i % 2 == 0, shift=i % 4)
                    checks.product("gemv", code, x[:1], more=i % 2 == 1, shift=i % 3)
                code = grid(3, 40, 96, bits, group, zeros)
                x = rng.standard_normal((3, 96)).astype(np.float32)
                checks.product("gemv", code, x[:1], False, (3, 8))
                checks.product("gemm", code, x, False, (1, 4))
                checks.product("gemv", code, x[:1], False, (2, 2))
                for worst in (extreme(bits, group, zeros, 0), extreme(bits, group, zeros, (1 << bits) - 1)):
                    for value in (-3e30, 3e30, 0.0, 1e-20):
                        x = np.full((2, 160), value, np.float32)
                        checks.product("gemm", worst, x, False)
                        checks.product("gemv", worst, x[:1], False)
    return checks


def extreme(bits: int, group: int, zeros: bool, value: int) -> Code:
    """Every code the lowest or the highest one, its zero at the other end."""
    shape = (5, 1 if group == 0 else -(-160 // group))
    zero = np.full(shape, (1 << bits) - 1 - value, np.uint8) if zeros else np.zeros(0, np.uint8)
    return Code("grid", (5, 160), (bits, group), (np.full((5, 160), value, np.uint8), np.ones(shape, np.float32), zero))


NAMES = [build.symbol(target, kernel) for target in build.CORES for kernel in build.kernels()]


@pytest.fixture(scope="module")
def harness() -> Path:
    return emulated.program(NAMES)


@pytest.mark.parametrize(("target", "cpu"), CORES)
def test_products_are_those_of_float64(target: str, cpu: str, harness: Path, tmp_path: Path) -> None:
    checks = everything(build.symbol(target, ""))
    emulated.run(harness, NAMES, [c for c, *_ in checks.cases], cpu, tmp_path)
    checks.check()


def inputs() -> list[Any]:
    rng = np.random.default_rng(1)
    shapes = ((1, 32), (3, 64), (7, 1024), (1, 96))
    plain = [rng.standard_normal(s) * size for s in shapes for size in (1, 1e-20, 1e25)]
    odd = [np.zeros((2, 32)), np.full((2, 64), 7.5), np.full((1, 32), -3e38), np.eye(3, 32) * 1e-30, np.arange(64.0).reshape(2, 32) - 20]
    return [np.asarray(x, np.float32) for x in (*plain, *odd)]


@pytest.mark.parametrize(("target", "cpu"), CORES)
def test_inputs_are_rounded_as_the_reference_does(target: str, cpu: str, harness: Path, tmp_path: Path) -> None:
    check_rounding(build.symbol(target, "round"), harness, NAMES, cpu, tmp_path)


def check_rounding(kernel: str, harness: Path, names: Sequence[str], cpu: str, folder: Path) -> None:
    """Bytes at most one apart (an input in the middle of two), and nearly all the same."""
    given = inputs()
    cases = [emulated.rounded(kernel, x, i % 4) for i, x in enumerate(given)]
    odd = np.array([[np.nan, np.inf, -np.inf, 1.0] * 8], np.float32)  # no answer is right, but none may trap
    emulated.run(harness, names, [*cases, emulated.rounded(kernel, odd)], cpu, folder)
    for x, case in zip(given, cases, strict=True):
        wanted, sums, scale, zero = bytes_of(x)
        q = case.given("q", np.int8, wanted.shape)
        apart = np.abs(q.astype(int) - wanted)
        assert apart.max() <= 1 and apart.mean() < 0.01
        assert np.array_equal(case.given("q_sums", np.int32, sums.shape), q.sum(2, dtype=np.int32))
        np.testing.assert_allclose(case.given("q_scale", np.float32, scale.shape), scale, rtol=1e-6)
        assert np.abs(case.given("q_zero", np.float32, zero.shape) - zero).max() <= 1


@pytest.mark.parametrize(("target", "cpu"), CORES)
@pytest.mark.parametrize("threads", [1, 3])
def test_steps_run_in_order_over_threads(target: str, cpu: str, threads: int, harness: Path, tmp_path: Path) -> None:
    code, x = grid(0, 200, 96, 4, 32, False), np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    cases = []
    for m in (1, 6):
        case, panels = emulated.rounded(build.symbol(target, "round"), x[:m]), pack(code, 4, 2)
        later = emulated.product(build.symbol(target, "gemv_4_block" if m == 1 else "gemm_4_block"), panels, bytes_of(x[:m]), {})
        for name in ("codes", "scales", "row_scale", "sums", "out"):
            case.add(name, later.buffers[later.places[name]])
        case.table(LINEAR_ARGS, emulated.numbers(panels, m))
        count = panels.panels if m == 1 else panels.panels // 2
        round_step = (*case.steps[0][:2], m, 1)
        case.steps = [round_step, (later.steps[0][0], 1, count, 4)] * 5
        case.threads = threads
        cases.append(case)
    emulated.run(harness, NAMES, cases, cpu, tmp_path)
    for m, case in zip((1, 6), cases, strict=True):
        wanted = linear(x[:m], code)
        assert np.abs(case.given("out", np.float32, (m, 200)) - wanted).max() < 1e-2 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def emitted() -> tuple[Path, list[str]]:
    """The harness with the kernels in LLVM IR, as objects for these targets."""
    targets = ("arm-neon", "arm-dotprod")
    names = [f"llvm_{build.symbol(t, k)}" for t in targets for k in build.kernels()]
    return emulated.program(names, emulated.emitted(targets, build.kernels())), names


@pytest.mark.parametrize(("target", "cpu"), [c for c in CORES if c[0] != "arm-i8mm"])
def test_kernels_in_llvm_ir_give_the_same(target: str, cpu: str, emitted: tuple[Path, list[str]], tmp_path: Path) -> None:
    prefix = "llvm_" + build.symbol(target, "")
    checks = everything(prefix)
    emulated.run(*emitted, [c for c, *_ in checks.cases], cpu, tmp_path)
    checks.check()
    check_rounding(prefix + "round", *emitted, cpu, tmp_path)


def test_the_harness_sees_an_instruction_that_a_core_has_not(harness: Path, tmp_path: Path) -> None:
    case = emulated.product(
        "arm_dotprod_gemv_4_block", pack(grid(0, 8, 64, 4, 32, False), 4, 2), bytes_of(np.ones((1, 64), np.float32)), {}
    )
    with pytest.raises(AssertionError, match="signal 4"):
        emulated.run(harness, NAMES, [case], "cortex-a72", tmp_path)


@pytest.mark.parametrize("by", build.compilers(), ids=lambda c: c.kind)
def test_the_library_loads_on_debian_11_and_has_every_kernel(by: build.Compiler) -> None:
    content = build.library(by).read_bytes()
    asked = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_([0-9.]+)", content)}
    assert asked and max(asked) <= (2, 31)
    assert all(n.encode() + b"\0" in content for n in (*NAMES, "edge_run"))


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compilers", lambda: ())
    with pytest.raises(MissingTool) as caught:
        build.library()
    assert "ziglang" in caught.value.hint and "\n" not in caught.value.what


def test_a_compiler_s_words_come_back(tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text("int main(void) { return nothing; }")
    with pytest.raises(CheckFailed, match=r"nothing|failed"):
        build.compiler().run(["-c", str(tmp_path / "bad.c"), "-o", str(tmp_path / "bad.o")])
