"""The few weights that are kept apart, for many rows of inputs: rows are turned into columns, so that a weight meets a vector of them at once."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import SPARSE_ARGS, TURN_ARGS
from edgesdk.kernels.panels import BLOCK

from .emitter import Emitter
from .simd import F32, I32, I64

VECTORS = 4
"""Of rows of inputs whose sums are held at a time."""


class Turn(Emitter):
    """Parts: blocks of columns."""

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, TURN_ARGS)

    def emit(self) -> None:
        a, b, s = self.a, self.b, self.s
        with self.loop(self.first, self.last) as g, self.loop(self.number(0), a["m"]) as m:
            x = b.add(b.add(a["x"], b.mul(m, a["stride"])), self.times(g, 4 * BLOCK))
            out = b.add(b.add(a["out"], b.mul(self.times(g, BLOCK), a["out_stride"])), self.times(m, 4))
            for i in range(BLOCK):
                s.store(s.load(x, 4 * i, F32), b.add(out, b.mul(a["out_stride"], self.number(i))), 0)
        b.ret_void()


class Turned(Emitter):
    """Parts: as many rows of the weights as a vector has lanes. Their sums are written to a room of their own, from where they are added row by row."""

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, SPARSE_ARGS)
        lanes = self.s.rows
        with self.b.goto_entry_block():
            room = self.b.alloca(ir.ArrayType(F32, VECTORS * lanes * lanes))
            room.align = 64
        self.room = self.b.ptrtoint(room, I64)

    def emit(self) -> None:
        a, b, lanes = self.a, self.b, self.s.rows
        with self.loop(self.first, self.last) as part:
            rows, done = self.times(part, lanes), self.number(0)
            for count in (VECTORS, 1):
                tiles = b.sdiv(b.sub(self.add(a["m"], lanes - 1 if count == 1 else 0), done), self.number(count * lanes))
                last = b.add(done, self.times(tiles, count * lanes))
                with self.loop(done, last, count * lanes) as m:
                    with self.loop(self.number(0), self.number(lanes)) as j:
                        self._sums(b.add(rows, j), j, m, count)
                    self._add(rows, m, count)
                done = last
        b.ret_void()

    def _sums(self, n: Any, j: Any, m: Any, count: int) -> None:
        """Of row n of the weights, for `count` vectors of rows of inputs from row m."""
        a, b, s = self.a, self.b, self.s
        start, stop = (b.sext(s.load(a["starts"], self.add(self.times(n, 4), more), I32), I64) for more in (0, 4))
        sums = [self.variable(s.floats) for _ in range(count)]
        self.store_zero(*sums)
        with self.loop(start, stop) as i:
            column = b.sext(s.load(a["columns"], self.times(i, 4), I32), I64)
            x = b.add(b.add(a["x"], b.mul(column, a["stride"])), self.times(m, 4))
            weight = s.spread(s.load(a["values"], self.times(i, 4), F32))
            for k, v in enumerate(sums):
                b.store(s.fma(weight, s.load(x, 4 * s.rows * k, s.floats), b.load(v)), v)
        for k, v in enumerate(sums):
            s.store(b.load(v), self.room, self.add(self.times(j, 4 * VECTORS * s.rows), 4 * s.rows * k))

    def _add(self, rows: Any, m: Any, count: int) -> None:
        """Lane m of each row's sums, side by side, to row m of `out`."""
        a, b, s = self.a, self.b, self.s
        with self.loop(self.number(0), self.least(self.number(count * s.rows), b.sub(a["m"], m))) as i:
            found = ir.Constant(s.floats, ir.Undefined)
            for j in range(s.rows):
                value = s.load(self.room, self.add(self.times(i, 4), 4 * VECTORS * s.rows * j), F32)
                found = b.insert_element(found, value, ir.Constant(I32, j))
            out = b.add(b.add(a["out"], b.mul(b.add(m, i), a["out_stride"])), self.times(rows, 4))
            s.store(b.fadd(s.load(out, 0, s.floats), found), out, 0)


def apart_module(target: str) -> ir.Module:
    """`turn` and `sparse_turned`."""
    module = ir.Module(f"apart-{target}")
    Turn(module, "turn", target).emit()
    Turned(module, "sparse_turned", target).emit()
    return module
