"""Rows looked up: of an embedding in panels or in float32, and of what a model computed."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import EMBED_ARGS, PICK_ARGS, SPARSE_ARGS, TABLES
from edgesdk.kernels.panels import BLOCK, OFFSET, SUPER, TRITS

from .emitter import Emitter
from .products import halves
from .simd import F16, F32, I8, I32, I64, Simd


class Embed(Emitter):
    """Parts: the M ids. `bits` 0: a table in float32."""

    def __init__(
        self, module: ir.Module, name: str, target: str, bits: int, per_block: bool = False, zeros: bool = False, kind: str = ""
    ) -> None:
        super().__init__(module, name, target, EMBED_ARGS)
        self.bits, self.per_block, self.zeros, self.kind = bits, per_block, zeros, kind
        self.one = Simd(self.b, target, one=True)

    def emit(self) -> None:
        a, b, s = self.a, self.b, self.s
        factor = s.float_of(a["factor"])
        with self.loop(self.first, self.last) as m:
            at8 = self.times(m, 8)
            row = s.load(a["ids"], at8, I64)
            out = b.add(a["out"], b.mul(m, a["stride"]))
            (self._panel if self.bits else self._dense)(row, factor, out)
            with b.if_then(b.icmp_signed("!=", a["places"], self.number(0))):
                place = b.add(s.load(a["at"], at8, I64), a["offset"])
                extra = b.add(a["places"], b.mul(place, a["stride"]))

                def add(at: Any, out: Any = out, extra: Any = extra) -> None:
                    s.store(b.fadd(s.load(out, at, s.floats), s.load(extra, at, s.floats)), out, at)

                self.lanes(self.number(0), self.times(a["blocks"], BLOCK), add)
        b.ret_void()

    def _dense(self, row: Any, factor: Any, out: Any) -> None:
        a, b, s = self.a, self.b, self.s
        table = b.add(a["codes"], b.mul(row, a["stride"]))
        whole = s.spread(factor)

        def copy(at: Any) -> None:
            s.store(b.fmul(s.load(table, at, s.floats), whole), out, at)

        self.lanes(self.number(0), self.times(a["blocks"], BLOCK), copy)

    def _panel(self, row: Any, factor: Any, out: Any) -> None:
        a, b, one, lanes = self.a, self.b, self.one, self.s.rows
        panel, lane = b.sdiv(row, self.number(lanes)), b.srem(row, self.number(lanes))
        codes = b.add(b.add(a["codes"], b.mul(panel, a["panel_bytes"])), self.times(lane, 4))
        scales = b.add(a["scales"], b.mul(panel, a["scale_bytes"]))
        zeros = b.add(a["zeros"], b.mul(panel, a["zero_bytes"]))
        tables = b.add(a["tables"], b.mul(panel, a["table_bytes"]))
        factor = b.fmul(factor, one.load(a["row_scale"], self.times(row, 4), F32))
        half = self.bits != 8 and halves(one.target)
        quad = ir.VectorType(F32, 4)
        with self.loop(self.number(0), a["blocks"]) as g:
            place = b.add(self.times(g, lanes), lane) if self.per_block else lane
            at = place if self.kind != "super" else self.add(self.times(b.sdiv(g, self.number(SUPER)), lanes), lane)
            scale = one.load(tables if self.kind == "super" else scales, self.times(at, 2 if half else 4), F16 if half else F32)
            step = b.fmul(b.fpext(scale, F32) if half else scale, factor)
            middle = self.real(0.0 if self.bits == 8 or self.kind in TABLES else float(1 << (self.bits - 1)))
            zero = b.sitofp(one.load(zeros, place, I8), F32) if self.zeros else middle
            if self.kind == "super":
                mine = self.add(self.times(g, 2 * lanes), lane)
                zero = b.fsub(middle, b.fmul(b.sitofp(one.load(scales, self.add(mine, lanes), I8), F32), self.real(1 / OFFSET)))
                step = b.fmul(step, b.uitofp(one.load(scales, mine, I8), F32))
            unit = b.udiv(g, self.number(TRITS)) if self.kind == "trits" else g
            place = b.add(codes, self.times(unit, BLOCK * lanes * self.bits // 8))
            found = one.fives(place, 0, BLOCK // 4) if self.kind == "trits" else one.quads(place, self.bits, 0, BLOCK // 4)
            if self.kind in TABLES:
                third = b.add(tables, self.times(b.sub(g, self.times(unit, TRITS)), 32)) if self.kind == "trits" else tables
                found = self._looked(found, third, lane)
            for i, value in enumerate(found):
                count = b.fsub(b.sitofp(value, quad), one.spread(zero, 4))
                one.store(b.fmul(count, one.spread(step, 4)), b.add(out, self.times(g, 4 * BLOCK)), 16 * i)

    def _looked(self, quads: list[Any], table: Any, lane: Any) -> list[Any]:
        """What the codes of a row stand for, one after the other; `table`: the address of its panel's."""
        b, one = self.b, self.one
        if self.kind == "tables":
            vector, place = b.srem(lane, self.number(4)), b.sdiv(lane, self.number(4))
            table = self.add(table, self.times(vector, 4 * one.panel), self.times(place, 16))
        out = []
        for codes in quads:
            found = codes
            for i in range(4):
                place = ir.Constant(I32, i)
                code = b.and_(b.zext(b.extract_element(codes, place), I64), self.number((1 << self.bits) - 1))
                found = b.insert_element(found, one.load(b.add(table, code), 0, I8), place)
            out.append(found)
        return out


class Pick(Emitter):
    """Parts: the B batches."""

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, PICK_ARGS)

    def emit(self) -> None:
        a, b, s = self.a, self.b, self.s
        with self.loop(self.first, self.last) as batch:
            row = b.add(b.mul(batch, a["n"]), s.load(a["last"], self.times(batch, 8), I64))
            x, out = b.add(a["x"], b.mul(row, a["stride"])), b.add(a["out"], b.mul(batch, a["stride"]))
            self.lanes(self.number(0), b.sdiv(a["stride"], self.number(4)), lambda at: s.store(s.load(x, at, s.floats), out, at))
        b.ret_void()


FOUR = ir.VectorType(F32, 4)


class Sparse(Emitter):
    """Parts: the rows of the weights."""

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, SPARSE_ARGS)

    def emit(self) -> None:
        a, b, s = self.a, self.b, self.s
        with self.loop(self.first, self.last) as n:
            start, stop = (b.sext(s.load(a["starts"], self.add(self.times(n, 4), more), I32), I64) for more in (0, 4))
            with self.loop(self.number(0), a["m"]) as m:
                x, four, total = b.add(a["x"], b.mul(m, a["stride"])), self.variable(FOUR), self.variable(F32)
                out = b.add(b.add(a["out"], b.mul(m, a["out_stride"])), self.times(n, 4))
                b.store(s.load(out, 0, F32), total)
                whole = b.add(start, b.and_(b.sub(stop, start), self.number(-4)))
                with b.if_then(b.icmp_signed(">", whole, start)):
                    b.store(s.zero(FOUR), four)
                    with self.loop(start, whole, 4) as i:
                        found = ir.Constant(FOUR, ir.Undefined)
                        for k in range(4):
                            found = b.insert_element(found, self._met(x, self.add(i, k)), ir.Constant(I32, k))
                        b.store(s.fma(s.load(a["values"], self.times(i, 4), FOUR), found, b.load(four)), four)
                    b.store(b.fadd(b.load(total), s.total(b.load(four))), total)
                with self.loop(whole, stop) as i:
                    product = b.fmul(s.load(a["values"], self.times(i, 4), F32), self._met(x, i))
                    b.store(b.fadd(b.load(total), product), total)
                s.store(b.load(total), out, 0)
        b.ret_void()

    def _met(self, x: Any, i: Any) -> Any:
        """The input that weight i meets."""
        column = self.b.sext(self.s.load(self.a["columns"], self.times(i, 4), I32), I64)
        return self.s.load(x, self.times(column, 4), F32)


def embed_module(target: str, bits: int, per_block: bool, zeros: bool, kind: str = "") -> ir.Module:
    """`embed` of one form of weights."""
    module = ir.Module(f"embed-{target}-{bits}-{per_block}-{zeros}-{kind}")
    Embed(module, "embed", target, bits, per_block, zeros, kind).emit()
    return module


def tables_module(target: str) -> ir.Module:
    """`embed` of float32, `pick`, `sparse`."""
    module = ir.Module(f"tables-{target}")
    Embed(module, "embed", target, 0).emit()
    Pick(module, "pick", target).emit()
    Sparse(module, "sparse", target).emit()
    return module
