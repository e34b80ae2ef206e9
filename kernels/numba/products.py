"""The inner loops of y = x · Wᵀ, in LLVM IR: weights of 8, 4, 3 or 2 bits (`panels.Panels`), inputs rounded to bytes.

All kernels have one signature, `void kernel(const int64_t *args, int64_t first, int64_t last)`: the part first … last - 1 of what `args`
describes. GEMV reads each panel once, as one stream. GEMM takes two panels and a few rows of inputs at a time and keeps their sums in
registers from the first column to the last; where a row of weights has one scale, they stay integers until the end.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import LINEAR_ARGS, TABLES
from edgesdk.kernels.panels import BLOCK, OFFSET, SUPER

from .emitter import Emitter
from .simd import F16, F32, I8, I16, I32, I64, VNNI

QUADS = BLOCK // 4
AHEAD = {8: 1024, 5: 6144, 4: 6144, 3: 6144, 2: 6144}
"""Bits → bytes by which a GEMV fetches weights before they are needed."""
NEAR = 2048
"""The same of a GEMM, whose weights are in the second cache: it fetches the next group's from memory into it while it works on one."""
WIDE = {"x86-avx512vnni": 2, "x86-avxvnni": 1, "x86-avx2": 1}
"""Target → panels that a GEMM works on at a time (two, where there are 32 registers)."""
TILE = {"x86-avx512vnni": ((12, 8, 4, 1), (6, 4, 2, 1)), "x86-avxvnni": ((8, 4, 1), (4, 2, 1)), "x86-avx2": ((4, 1), (4, 1))}
"""Target → rows of inputs whose sums stay in registers, the tail in smaller steps: where a row has one scale, and where blocks have, whose
sums take two registers, one of integers and one of floats. Stores into memory cost as much as two dot products each (Zen 5), so none is made."""


def wide(target: str) -> int:
    return WIDE.get(target, 2)


def tiles(target: str, per_block: bool) -> tuple[int, ...]:
    return TILE.get(target, ((8, 4, 1), (4, 2, 1)))[per_block]


def halves(target: str) -> bool:
    """Whether the CPU turns float16 into float32 by an instruction."""
    return target != "plain"


class Product(Emitter):
    """Emits one function of one form of weights. `small`: none of the numbers that meet inputs is beyond ±64."""

    small = False

    def __init__(self, module: ir.Module, name: str, target: str, bits: int, per_block: bool, zeros: bool, kind: str = "") -> None:
        super().__init__(module, name, target, LINEAR_ARGS)
        self.bits, self.per_block, self.zeros, self.kind = bits, per_block, zeros or kind == "super", kind
        self.signed = bits == 8 or kind in TABLES or target in VNNI
        self.block_bytes = BLOCK * self.s.rows * bits // 8
        self.scale_kind = ir.VectorType(F16 if bits != 8 and halves(target) else F32, self.s.rows)

    # ---- parts

    @property
    def top(self) -> bool:
        """Whether codes stand at the top of their bytes (`Simd.tops`)."""
        return self.signed and self.bits != 8 and self.kind not in TABLES

    @property
    def late(self) -> bool:
        return self.kind == "super" and not self.top

    def panel(self, p: Any) -> dict[str, Any]:
        """The addresses of a panel."""
        a, b = self.a, self.b
        tables = b.add(a["tables"], b.mul(p, a["table_bytes"]))
        return {
            "codes": b.add(a["codes"], b.mul(p, a["panel_bytes"])),
            "scales": b.add(a["scales"], b.mul(p, a["scale_bytes"])),
            "zeros": b.add(a["zeros"], b.mul(p, a["zero_bytes"])),
            "at": self.times(p, 4 * self.s.rows),
            "tables": tables,
            "looked_up": self.s.tables(tables, self.kind == "tables") if self.kind in ("table", "tables") else [],
        }

    def blocks(self, panel: dict[str, Any]) -> Any:
        """How many blocks of a panel there are."""
        return self.a["blocks"]

    def unpacked(self, panel: dict[str, Any], g: Any, prefetch: bool) -> list[Any]:
        here, tables = self.place(panel, g)
        if prefetch:
            for line in range(0, self.block_bytes, 64):
                self.s.prefetch(here, AHEAD[self.bits] + line)
            if self.kind == "super":
                self.s.prefetch(self.b.add(panel["scales"], self.times(g, 2 * self.s.rows)), 1024)
        return self.codes(here, 0, QUADS, tables)

    def place(self, panel: dict[str, Any], g: Any) -> tuple[Any, list[Any]]:
        """Where the codes of a block are, and what they are looked up in."""
        return self.b.add(panel["codes"], self.times(g, self.block_bytes)), panel["looked_up"]

    def codes(self, at: Any, first: int, count: int, tables: list[Any]) -> list[Any]:
        """Quads of a block: what codes stand for in the tables, or they themselves; where the CPU multiplies signed weights by unsigned inputs as
        fast, with the middle taken off (`Simd.tops`)."""
        found = (self.s.tops if self.top else self.s.quads)(at, self.bits, first, count)
        return [self.s.lookup(tables, quad, self.bits) for quad in found] if tables else found

    def scale(self, panel: dict[str, Any], g: Any) -> Any:
        """The scales of a block, float32 lanes; of the row with g = None."""
        if self.kind == "super":
            return self.step(panel, g)
        wide = self.scale_kind == self.s.floats
        at = 0 if g is None else self.times(g, self.s.rows * (4 if wide else 2))
        value = self.s.load(panel["scales"], at, self.scale_kind)
        return value if wide else self.s.to_float(value)

    def step(self, panel: dict[str, Any], g: Any) -> Any:
        """The same of a block in a super-block."""
        s, b = self.s, self.b
        real = F16 if halves(s.target) else F32
        at = self.times(b.ashr(g, self.number(SUPER.bit_length() - 1)), s.rows * (2 if halves(s.target) else 4))
        d = s.load(panel["tables"], at, ir.VectorType(real, s.rows))
        whole = b.zext(s.load(panel["scales"], self.times(g, 2 * s.rows), ir.VectorType(I8, s.rows)), s.ints)
        return b.fmul(s.to_float(d) if halves(s.target) else d, s.to_float(whole))

    def zero(self, panel: dict[str, Any], g: Any) -> Any:
        """What Σ q of a block (of the row with g = None) is multiplied with, so that codes count from their zeros."""
        s, b = self.s, self.b
        if self.kind == "super":  # in sixteenths, as codes at the top of their bytes are
            at = self.add(self.times(g, 2 * s.rows), s.rows)
            offset = b.sext(s.load(panel["scales"], at, ir.VectorType(I8, s.rows)), s.ints)
            return offset if self.top else b.sub(offset, s.fill(s.ints, 8 * OFFSET))
        zero = b.sext(s.load(panel["zeros"], 0 if g is None else self.times(g, s.rows), ir.VectorType(I8, s.rows)), s.ints)
        if self.top:
            zero = b.shl(b.sub(zero, s.fill(s.ints, 1 << (self.bits - 1))), s.fill(s.ints, 8 - self.bits))
        return b.neg(zero)

    def begin(self, zero: Any, total: Any) -> Any:
        """The integer sums before a block: what makes codes out of the middle or of their zeros; `total` is Σ q of the block (int32)."""
        s = self.s
        if self.zeros:  # both fit 16 bits, and LLVM takes the faster multiplication where it can tell
            return s.b.mul(zero, s.spread(s.b.sext(s.b.trunc(total, I16), I32)))
        if self.signed:
            return s.zero(s.ints)
        return s.spread(s.b.mul(total, ir.Constant(I32, -(1 << (self.bits - 1)))))

    def start(self, start: Any) -> Any:
        """What products of a block are added to: `begin`, or 0 where that counts in sixteenths and they do not."""
        return self.s.zero(self.s.ints) if self.late else start

    def end(self, total: Any, start: Any) -> Any:
        """The block's sum."""
        return self.b.add(self.b.shl(total, self.s.fill(self.s.ints, 4)), start) if self.late else total

    def dots(self, total: Any, quads: list[Any], q: Any) -> Any:
        for i, quad in enumerate(quads):
            total = self.s.dot(total, quad, self.s.spread(self.s.load(q, 4 * i, I32)), self.signed, self.small)
        return total

    def q_at(self, g: Any, m: Any) -> tuple[Any, Any]:
        """Addresses of a block of a row of inputs, and of its sum: q [blocks, M, 32], q_sums [blocks, M]."""
        place = self.b.add(self.b.mul(g, self.a["m"]), m)
        return self.b.add(self.a["q"], self.times(place, BLOCK)), self.b.add(self.a["q_sums"], self.times(place, 4))

    def factors(self, panel: dict[str, Any]) -> tuple[Any, Any]:
        """What a row's sums are multiplied with, and the sum of its weights."""
        s, b = self.s, self.b
        row_scale = s.load(self.a["row_scale"], panel["at"], s.floats)
        if self.top or self.late:
            row_scale = b.fmul(row_scale, ir.Constant(s.floats, [2.0 ** (self.bits - 8)] * s.rows))
        return row_scale, s.load(self.a["sums"], panel["at"], s.floats)

    def write(self, value: Any, panel: dict[str, Any], m: Any) -> None:
        """y = q_scale · (row_scale · value - q_zero · sums) + bias + residual → out."""
        s, b, a = self.s, self.b, self.a
        row_scale, sums = self.factors(panel)
        at4 = self.times(m, 4)
        zero, scale = (s.spread(s.load(a[n], at4, F32)) for n in ("q_zero", "q_scale"))
        y = b.fmul(scale, b.fsub(b.fmul(value, row_scale), b.fmul(zero, sums)))
        self.finish(y, panel["at"], m)

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
            with self.loop(self.number(0), self.blocks(panel)) as g:
                quads = self.unpacked(panel, g, prefetch=True)
                q, q_sum = self.q_at(g, self.number(0))
                if self.per_block and self.zeros:
                    zero = self.zero(panel, g)
                start = self.begin(zero, s.load(q_sum, 0, I32))
                if self.per_block:
                    total = self.end(self.dots(self.start(start), quads, q), start)
                    b.store(s.fma(s.to_float(total), self.scale(panel, g), b.load(whole)), whole)
                else:
                    b.store(b.add(b.load(ints), self.dots(start, quads, q)), ints)  # a block's products do not wait for the last one's
            value = b.load(whole) if self.per_block else b.fmul(s.to_float(b.load(ints)), self.scale(panel, None))
            self.write(value, panel, self.number(0))
        b.ret_void()

    def gemm(self) -> None:
        """Of any number of rows: groups of panels first … last - 1. Sums stay in registers from the first column to the last."""
        many = wide(self.s.target)
        with self.loop(self.first, self.last) as group:
            panels = [self.panel(self.add(self.times(group, many), i)) for i in range(many)]
            self.over_rows(tiles(self.s.target, self.per_block), panels)
        self.b.ret_void()

    def over_rows(self, tiles: tuple[int, ...], panels: list[dict[str, Any]]) -> None:
        """All rows of inputs, in tiles."""
        done = self.number(0)
        for tile in tiles:
            count = self.times(self._times(self.b.sub(self.a["m"], done), tile), tile)
            with self.loop(done, self.b.add(done, count), tile) as m:
                self._tile(panels, m, tile)
            done = self.b.add(done, count)

    def _times(self, rows: Any, tile: int) -> Any:
        """How many tiles of so many rows are done of `rows`: of six, one less where two more rows would be left, which are slow alone."""
        b = self.b
        count = b.sdiv(rows, self.number(tile))
        if tile != 6:
            return count
        eight = b.and_(b.icmp_signed("==", b.srem(rows, self.number(6)), self.number(2)), b.icmp_signed(">", rows, self.number(6)))
        return b.sub(count, b.zext(eight, I64))

    def _tile(self, panels: list[dict[str, Any]], m: Any, tile: int) -> None:
        """`tile` rows of inputs side by side, so that one sum need not wait for itself."""
        s, b = self.s, self.b
        kind = s.floats if self.per_block else s.ints
        sums = [[self.variable(kind) for _ in panels] for _ in range(tile)]
        for v in (v for row in sums for v in row):
            b.store(s.zero(kind), v)
        zeros = [self.zero(p, None) if self.zeros and not self.per_block else None for p in panels]
        with self.loop(self.number(0), self.blocks(panels[0])) as g:
            if self.zeros and self.per_block:
                zeros = [self.zero(p, g) for p in panels]
            q, q_sum = self.q_at(g, m)
            starts = [[self.begin(z, s.load(q_sum, 4 * i, I32)) for z in zeros] for i in range(tile)]
            if not self.per_block:
                starts = [[b.add(b.load(v), x) for v, x in zip(*pair)] for pair in zip(sums, starts)]  # noqa: B905 (Python 3.9)
            values = self._dots([[self.start(x) for x in row] for row in starts], panels, g, q)
            values = [[self.end(x, y) for x, y in zip(*pair)] for pair in zip(values, starts)]  # noqa: B905
            scales = [self.scale(p, g) for p in panels] if self.per_block else []
            for row, new in zip(sums, values):  # noqa: B905
                for j, (v, value) in enumerate(zip(row, new)):  # noqa: B905
                    b.store(s.fma(s.to_float(value), scales[j], b.load(v)) if self.per_block else value, v)
        for j, p in enumerate(panels):
            for i in range(tile):
                value = b.load(sums[i][j])
                self.write(value if self.per_block else b.fmul(s.to_float(value), self.scale(p, None)), p, self.add(m, i))

    def ahead(self, panels: list[dict[str, Any]], g: Any) -> None:
        """Fetches this group's next weights into the first cache, the next group's into the second."""
        for p in panels:
            at = self.b.add(p["codes"], self.times(g, self.block_bytes))
            following = self.b.add(at, self.times(self.a["panel_bytes"], len(panels)))
            for line in range(0, self.block_bytes, 64):
                self.s.prefetch(at, NEAR + line)
                self.s.prefetch(following, line, near=2)

    def _dots(self, values: list[list[Any]], panels: list[dict[str, Any]], g: Any, q: Any) -> list[list[Any]]:
        """Sums + a block's products, [row of inputs][panel]; quads are unpacked as they are needed."""
        s = self.s
        places = [self.place(p, g) for p in panels]
        self.ahead(panels, g)
        step = 1 if self.top or self.small else QUADS if self.bits == 3 else 8 // self.bits  # few at a time: registers hold the sums
        for first in range(0, QUADS, step):
            quads = [self.codes(at, first, step, tables) for at, tables in places]
            for k in range(step):
                for i, row in enumerate(values):
                    x = s.spread(s.load(q, BLOCK * i + 4 * (first + k), I32))
                    values[i] = [s.dot(v, quads[j][k], x, self.signed, self.small) for j, v in enumerate(row)]
        return values
