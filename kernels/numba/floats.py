"""y = x · Wᵀ with weights in float32 or float16 (`panels.FloatPanels`) and inputs in float32, and rows of such a table, in LLVM IR."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import FLOAT_ARGS

from .emitter import Emitter
from .products import wide
from .simd import F16, F32
from .tables import Embed

TILE = {"x86-avx512vnni": (12, 6, 4, 1), "x86-avxvnni": (6, 4, 1), "x86-avx2": (6, 4, 1)}
"""Target → rows of inputs whose sums stay in registers, beside `wide` panels."""
AHEAD = 4096
"""Bytes by which a GEMV fetches weights before they are needed."""
SUMS = 4
"""Of a GEMV, so that one addition need not wait for the one before."""
STEP = 8
"""Columns that a turn of the loop takes."""


class Floats(Emitter):
    """`bits`: 32 or 16."""

    def __init__(self, module: ir.Module, name: str, target: str, bits: int) -> None:
        super().__init__(module, name, target, FLOAT_ARGS)
        self.kind = ir.VectorType(F32 if bits == 32 else F16, self.s.rows)
        self.column = self.s.rows * bits // 8

    def panel(self, p: Any) -> tuple[Any, Any]:
        """Its weights' address, and how far its rows are from the first in bytes of float32."""
        return self.b.add(self.a["codes"], self.b.mul(p, self.a["panel_bytes"])), self.times(p, 4 * self.s.rows)

    def weights(self, at: Any, column: int) -> Any:
        value = self.s.load(at, column * self.column, self.kind)
        return value if self.kind == self.s.floats else self.s.to_float(value)

    def over(self, count: int, body: Any) -> None:
        """`body(k, n)` for columns k … k + n - 1: `count` at a time, then one by one."""
        whole = self.times(self.b.sdiv(self.a["cols"], self.number(count)), count)
        for first, last, step in ((self.number(0), whole, count), (whole, self.a["cols"], 1)):
            with self.loop(first, last, step) as k:
                body(k, step)

    def gemv(self) -> None:
        """Of one row of inputs: panels first … last - 1."""
        s, b = self.s, self.b
        sums = [self.variable(s.floats) for _ in range(SUMS)]
        with self.loop(self.first, self.last) as p:
            codes, at = self.panel(p)
            self.store_zero(*sums)

            def columns(k: Any, n: int, codes: Any = codes) -> None:
                here, x = b.add(codes, self.times(k, self.column)), b.add(self.a["x"], self.times(k, 4))
                for line in range(0, n * self.column, 64):
                    s.prefetch(here, AHEAD + line)
                for i in range(n):
                    v = sums[i % SUMS]
                    b.store(s.fma(self.weights(here, i), s.spread(s.load(x, 4 * i, F32)), b.load(v)), v)

            self.over(STEP, columns)
            values = [b.load(v) for v in sums]
            while len(values) > 1:
                values = [b.fadd(x, y) for x, y in zip(values[::2], values[1::2])]  # noqa: B905 (Python 3.9)
            self.write(values[0], at, self.number(0))
        b.ret_void()

    def gemm(self) -> None:
        """Of any number of rows: groups of panels first … last - 1."""
        many, b = wide(self.s.target), self.b
        with self.loop(self.first, self.last) as group:
            panels = [self.panel(self.add(self.times(group, many), i)) for i in range(many)]
            done = self.number(0)
            for tile in TILE.get(self.s.target, (4, 2, 1)):
                last = b.add(done, self.times(b.sdiv(b.sub(self.a["m"], done), self.number(tile)), tile))
                with self.loop(done, last, tile) as m:
                    self._tile(panels, m, tile)
                done = last
        b.ret_void()

    def _tile(self, panels: list[tuple[Any, Any]], m: Any, tile: int) -> None:
        s, b = self.s, self.b
        sums = [[self.variable(s.floats) for _ in panels] for _ in range(tile)]
        self.store_zero(*(v for row in sums for v in row))
        rows = [b.add(self.a["x"], b.mul(self.add(m, i), self.a["x_stride"])) for i in range(tile)]

        def columns(k: Any, n: int) -> None:
            places = [b.add(codes, self.times(k, self.column)) for codes, _ in panels]
            for here in places:
                for line in range(0, n * self.column, 64):
                    s.prefetch(here, AHEAD + line, near=2)
            for j in range(n):
                weights = [self.weights(here, j) for here in places]
                for row, sums_of in zip(rows, sums):  # noqa: B905 (Python 3.9)
                    x = s.spread(s.load(b.add(row, self.times(k, 4)), 4 * j, F32))
                    for w, v in zip(weights, sums_of):  # noqa: B905
                        b.store(s.fma(w, x, b.load(v)), v)

        self.over(2, columns)
        for i, row in enumerate(sums):
            for (_, at), v in zip(panels, row):  # noqa: B905
                self.write(b.load(v), at, self.add(m, i))

    def write(self, value: Any, at: Any, m: Any) -> None:
        s, b, a = self.s, self.b, self.a
        y = b.fmul(value, s.load(a["row_scale"], at, s.floats))
        self.finish(y, at, m)


class FloatRows(Embed):
    """Rows of a table in a product's own panels."""

    def __init__(self, module: ir.Module, name: str, target: str, bits: int) -> None:
        super().__init__(module, name, target, bits)
        self.element = F32 if bits == 32 else F16

    def _panel(self, row: Any, factor: Any, out: Any) -> None:
        a, b, lanes, size = self.a, self.b, self.s.rows, self.bits // 8
        panel, lane = b.sdiv(row, self.number(lanes)), b.srem(row, self.number(lanes))
        codes = b.add(b.add(a["codes"], b.mul(panel, a["panel_bytes"])), self.times(lane, size))
        factor = b.fmul(factor, self.s.load(a["row_scale"], self.times(row, 4), F32))
        with self.loop(self.number(0), b.sdiv(a["panel_bytes"], self.number(lanes * size))) as k:
            value = self.s.load(codes, self.times(k, lanes * size), self.element)
            self.s.store(b.fmul(value if self.bits == 32 else b.fpext(value, F32), factor), out, self.times(k, 4))


def floats_module(target: str, bits: int) -> ir.Module:
    """`gemv`, `gemm` and `embed` of weights in so many bits."""
    module = ir.Module(f"floats-{target}-{bits}")
    Floats(module, "gemv", target, bits).gemv()
    Floats(module, "gemm", target, bits).gemm()
    FloatRows(module, "embed", target, bits).emit()
    return module
