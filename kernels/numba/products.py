"""The inner loops of y = x · Wᵀ, in LLVM IR: weights of 8, 4, 3 or 2 bits (`panels.Panels`), inputs rounded to bytes.

All kernels have one signature, `void kernel(const int64_t *args, int64_t first, int64_t last)`: the part first … last - 1 of what `args`
describes. GEMV reads each panel once, as one stream. GEMM unpacks a block of two panels into registers once and lets every row of the
inputs pass by; where a row of weights has one scale, sums stay integers from the first column to the last.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import LINEAR_ARGS
from edgesdk.kernels.panels import BLOCK

from .emitter import Emitter
from .simd import F16, F32, I8, I32, I64

QUADS = BLOCK // 4
AHEAD = 2048
"""Bytes by which weights are fetched before they are needed."""
CHUNK = 128
"""Rows of inputs whose sums are kept at hand by one GEMM loop."""
WIDE = {"x86-avx512vnni": 2, "x86-avxvnni": 1, "x86-avx2": 1}
"""Target → panels that a GEMM works on at a time (two, where there are 32 registers)."""
MINGLED = (4, 1)
TILE = {"x86-avx512vnni": (12, 8, 4, 1), "x86-avxvnni": (8, 4, 1), "x86-avx2": (4, 1)}
"""Target → rows of inputs whose integer sums stay in registers, the tail in smaller steps."""


def wide(target: str) -> int:
    return WIDE.get(target, 2)


def tiles(target: str) -> tuple[int, ...]:
    return TILE.get(target, (8, 4, 1))


def halves(target: str) -> bool:
    """Whether the CPU turns float16 into float32 by an instruction."""
    return target != "plain"


class Product(Emitter):
    """Emits one function of one form of weights."""

    def __init__(self, module: ir.Module, name: str, target: str, bits: int, per_block: bool, zeros: bool) -> None:
        super().__init__(module, name, target, LINEAR_ARGS)
        self.bits, self.per_block, self.zeros = bits, per_block, zeros
        self.block_bytes = BLOCK * self.s.rows * bits // 8
        self.scale_kind = ir.VectorType(F16 if bits != 8 and halves(target) else F32, self.s.rows)

    # ---- parts

    def panel(self, p: Any) -> dict[str, Any]:
        """The addresses of a panel."""
        a, b = self.a, self.b
        return {
            "codes": b.add(a["codes"], b.mul(p, a["panel_bytes"])),
            "scales": b.add(a["scales"], b.mul(p, a["scale_bytes"])),
            "zeros": b.add(a["zeros"], b.mul(p, a["zero_bytes"])),
            "at": self.times(p, 4 * self.s.rows),
        }

    def unpacked(self, panel: dict[str, Any], g: Any, prefetch: bool) -> list[Any]:
        here = self.b.add(panel["codes"], self.times(g, self.block_bytes))
        if prefetch:
            for line in range(0, self.block_bytes, 64):
                self.s.prefetch(here, AHEAD + line)
        return self.s.quads(here, self.bits, 0, QUADS)

    def scale(self, panel: dict[str, Any], g: Any) -> Any:
        """The scales of a block, float32 lanes; of the row with g = None."""
        wide = self.scale_kind == self.s.floats
        at = 0 if g is None else self.times(g, self.s.rows * (4 if wide else 2))
        value = self.s.load(panel["scales"], at, self.scale_kind)
        return value if wide else self.s.to_float(value)

    def zero(self, panel: dict[str, Any], g: Any) -> Any:
        kind = ir.VectorType(I8, self.s.rows)
        return self.b.sext(self.s.load(panel["zeros"], 0 if g is None else self.times(g, self.s.rows), kind), self.s.ints)

    def begin(self, zero: Any, total: Any) -> Any:
        """The integer sums before a block: what makes codes out of the middle or of their zeros; `total` is Σ q of the block (int32)."""
        s = self.s
        if self.zeros:
            return s.b.neg(s.b.mul(zero, s.spread(total)))
        if self.bits == 8:
            return s.zero(s.ints)
        return s.spread(s.b.mul(total, ir.Constant(I32, -(1 << (self.bits - 1)))))

    def dots(self, total: Any, quads: list[Any], q: Any) -> Any:
        for i, quad in enumerate(quads):
            total = self.s.dot(total, quad, self.s.spread(self.s.load(q, 4 * i, I32)), self.bits == 8)
        return total

    def q_at(self, g: Any, m: Any) -> tuple[Any, Any]:
        """Addresses of a block of a row of inputs, and of its sum: q [blocks, M, 32], q_sums [blocks, M]."""
        place = self.b.add(self.b.mul(g, self.a["m"]), m)
        return self.b.add(self.a["q"], self.times(place, BLOCK)), self.b.add(self.a["q_sums"], self.times(place, 4))

    def write(self, value: Any, panel: dict[str, Any], m: Any) -> None:
        """y = q_scale · (row_scale · value - q_zero · sums) + bias + residual → out."""
        s, b, a = self.s, self.b, self.a
        row_scale = s.load(a["row_scale"], panel["at"], s.floats)
        sums = s.load(a["sums"], panel["at"], s.floats)
        at4 = self.times(m, 4)
        zero, scale = (s.spread(s.load(a[n], at4, F32)) for n in ("q_zero", "q_scale"))
        y = b.fmul(scale, b.fsub(b.fmul(value, row_scale), b.fmul(zero, sums)))
        place = b.add(b.mul(m, a["stride"]), panel["at"])
        for name, where in (("bias", panel["at"]), ("residual", place)):
            with_it = self.variable(s.floats)
            b.store(y, with_it)
            with b.if_then(b.icmp_signed("!=", a[name], self.number(0))):
                b.store(b.fadd(y, s.load(a[name], where, s.floats)), with_it)
            y = b.load(with_it)
        s.store(y, a["out"], place)

    # ---- functions

    def gemv(self) -> None:
        """Of one row of inputs: panels first … last - 1."""
        s, b = self.s, self.b
        whole, ints = self.variable(s.floats), self.variable(s.ints)
        with self.loop(self.first, self.last) as p:
            panel = self.panel(p)
            b.store(s.zero(s.floats), whole)
            b.store(s.zero(s.ints), ints)
            zero = self.zero(panel, None) if self.zeros and not self.per_block else None
            with self.loop(self.number(0), self.a["blocks"]) as g:
                quads = self.unpacked(panel, g, prefetch=True)
                q, q_sum = self.q_at(g, self.number(0))
                if self.per_block and self.zeros:
                    zero = self.zero(panel, g)
                start = self.begin(zero, s.load(q_sum, 0, I32))
                if self.per_block:
                    b.store(s.fma(s.to_float(self.dots(start, quads, q)), self.scale(panel, g), b.load(whole)), whole)
                else:
                    b.store(self.dots(b.add(b.load(ints), start), quads, q), ints)
            value = b.load(whole) if self.per_block else b.fmul(s.to_float(b.load(ints)), self.scale(panel, None))
            self.write(value, panel, self.number(0))
        b.ret_void()

    def gemm_blocks(self) -> None:
        """Of any number of rows, each block with its scale: groups of panels first … last - 1."""
        s, b, many = self.s, self.b, wide(self.s.target)
        size = 4 * s.rows
        with b.goto_entry_block():
            room = b.alloca(s.floats, CHUNK * many)
            room.align = 64
        sums_at = b.ptrtoint(room, I64)
        with self.loop(self.first, self.last) as group:
            panels = [self.panel(self.add(self.times(group, many), i)) for i in range(many)]
            with self.loop(self.number(0), self.a["m"], CHUNK) as start:
                stop = self.least(self.add(start, CHUNK), self.a["m"])
                with self.loop(self.number(0), self.times(b.sub(stop, start), many)) as i:
                    s.store(s.zero(s.floats), sums_at, self.times(i, size))
                with self.loop(self.number(0), self.a["blocks"]) as g:
                    quads = [self.unpacked(p, g, prefetch=False) for p in panels]
                    scales = [self.scale(p, g) for p in panels]
                    zeros = [self.zero(p, g) if self.zeros else None for p in panels]
                    done = start
                    for tile in MINGLED:
                        count = self.times(b.sdiv(b.sub(stop, done), self.number(tile)), tile)
                        with self.loop(done, b.add(done, count), tile) as m:
                            self._mingled(quads, scales, zeros, g, m, tile, b.add(sums_at, self.times(b.sub(m, start), many * size)))
                        done = b.add(done, count)
                with self.loop(start, stop) as m:
                    for j, p in enumerate(panels):
                        at = self.add(self.times(b.sub(m, start), many * size), j * size)
                        self.write(s.load(sums_at, at, s.floats), p, m)
        b.ret_void()

    def _mingled(self, quads: list[Any], scales: list[Any], zeros: list[Any], g: Any, m: Any, tile: int, sums_at: Any) -> None:
        """A block of `tile` rows of inputs side by side, so that one sum need not wait for itself."""
        s, size = self.s, 4 * self.s.rows
        q, q_sum = self.q_at(g, m)
        totals = [s.load(q_sum, 4 * t, I32) for t in range(tile)]
        values = [[self.begin(z, total) for z in zeros] for total in totals]
        for i in range(QUADS):
            for t in range(tile):
                x = s.spread(s.load(q, BLOCK * t + 4 * i, I32))
                values[t] = [s.dot(v, quads[j][i], x, self.bits == 8) for j, v in enumerate(values[t])]
        for t in range(tile):
            for j, v in enumerate(values[t]):
                at = (t * len(scales) + j) * size
                s.store(s.fma(s.to_float(v), scales[j], s.load(sums_at, at, s.floats)), sums_at, at)

    def gemm_rows(self) -> None:
        """Of any number of rows, each row of weights with one scale: groups of panels first … last - 1."""
        many = wide(self.s.target)
        with self.loop(self.first, self.last) as group:
            panels = [self.panel(self.add(self.times(group, many), i)) for i in range(many)]
            done = self.number(0)
            for tile in tiles(self.s.target):
                count = self.times(self.b.sdiv(self.b.sub(self.a["m"], done), self.number(tile)), tile)
                with self.loop(done, self.b.add(done, count), tile) as m:
                    self._tile(panels, m, tile)
                done = self.b.add(done, count)
        self.b.ret_void()

    def _tile(self, panels: list[dict[str, Any]], m: Any, tile: int) -> None:
        s, b = self.s, self.b
        sums = [[self.variable(s.ints) for _ in panels] for _ in range(tile)]
        for row in sums:
            for v in row:
                b.store(s.zero(s.ints), v)
        zeros = [self.zero(p, None) if self.zeros else None for p in panels]
        with self.loop(self.number(0), self.a["blocks"]) as g:
            values = [[b.load(v) for v in row] for row in sums]
            q0, sum0 = self.q_at(g, m)
            if self.zeros or self.bits != 8:
                for i in range(tile):
                    total = s.load(sum0, 4 * i, I32)
                    values[i] = [b.add(v, self.begin(z, total)) for v, z in zip(values[i], zeros)]  # noqa: B905 (Python 3.9)
            quads = [self.unpacked(p, g, prefetch=False) for p in panels]
            for k in range(QUADS):
                for i in range(tile):
                    x = s.spread(s.load(q0, BLOCK * i + 4 * k, I32))
                    values[i] = [s.dot(v, quads[j][k], x, self.bits == 8) for j, v in enumerate(values[i])]
            for row, new in zip(sums, values):  # noqa: B905
                for v, value in zip(row, new):  # noqa: B905
                    b.store(value, v)
        for j, p in enumerate(panels):
            scale = self.scale(p, None)
            for i in range(tile):
                self.write(b.fmul(s.to_float(b.load(sums[i][j])), scale), p, self.add(m, i))


def product_module(target: str, bits: int, per_block: bool, zeros: bool) -> ir.Module:
    """`gemv` and `gemm` for one form of weights."""
    module = ir.Module(f"product-{target}-{bits}-{per_block}-{zeros}")
    Product(module, "gemv", target, bits, per_block, zeros).gemv()
    gemm = Product(module, "gemm", target, bits, per_block, zeros)
    (gemm.gemm_blocks if per_block else gemm.gemm_rows)()
    return module
