"""Heads of queries, keys and values: their norm, rotary turns, scale. One function for each size of a head."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import HEADS_ARGS

from .emitter import Emitter
from .simd import F32


class Heads(Emitter):
    """Parts: the B · N rows."""

    def __init__(self, module: ir.Module, name: str, target: str, size: int) -> None:
        super().__init__(module, name, target, HEADS_ARGS)
        self.size = size
        self.whole, self.half = ir.VectorType(F32, size), ir.VectorType(F32, size // 2)

    def emit(self, turned: bool, normed: bool) -> None:
        a, b, s = self.a, self.b, self.s
        factor = s.float_of(a["scale"])
        with self.loop(self.first, self.last) as row:
            batch, token = b.sdiv(row, a["n"]), b.srem(row, a["n"])
            with self.loop(self.number(0), a["heads"]) as h:
                x = b.add(a["x"], b.add(b.mul(row, a["stride"]), self.times(h, 4 * self.size)))
                place = b.add(b.mul(b.add(b.mul(batch, a["heads"]), h), a["n"]), token)
                value = s.load(x, 0, self.whole)
                if normed:
                    value = self._normed(value)
                value = b.fmul(value, s.spread(factor, self.size))
                s.store(self._turned(value, row) if turned else value, a["out"], self.times(place, 4 * self.size))
        b.ret_void()

    def _normed(self, value: Any) -> Any:
        s, b = self.s, self.b
        mean = b.fdiv(s.total(b.fmul(value, value)), self.real(float(self.size)))
        factor = b.fdiv(self.real(1.0), s.root(b.fadd(mean, s.float_of(self.a["eps"]))))
        return b.fmul(b.fmul(value, s.spread(factor, self.size)), s.load(self.a["weight"], 0, self.whole))

    def _turned(self, value: Any, row: Any) -> Any:
        s, b, half = self.s, self.b, self.size // 2
        at = self.times(row, 4 * half)
        cos, sin = (s.load(self.a[n], at, self.half) for n in ("cos", "sin"))
        first, second = s.part(value, 0, half), s.part(value, half, half)
        one = b.fsub(b.fmul(first, cos), b.fmul(second, sin))
        two = b.fadd(b.fmul(second, cos), b.fmul(first, sin))
        return b.shuffle_vector(one, two, ir.Constant(ir.VectorType(ir.IntType(32), self.size), list(range(self.size))))


def heads_module(target: str, size: int) -> ir.Module:
    """`HEADS` for heads of `size` floats, an even number."""
    module = ir.Module(f"heads-{target}-{size}")
    for normed in (False, True):
        for turned in (False, True):
            Heads(module, "heads" + "_normed" * normed + "_turned" * turned, target, size).emit(turned, normed)
    return module


HEADS = ("heads", "heads_turned", "heads_normed", "heads_normed_turned")
