"""Inputs → bytes with a scale and a zero a row, as the products of `products` read them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.panels import BLOCK

from .emitter import Emitter
from .simd import F32, I8

ROUND_ARGS = ("x", "blocks", "stride", "m", "shift", "q", "q_sums", "q_scale", "q_zero")
"""`stride`: bytes of a row of x; `shift`: 0 for int8, 128 for unsigned bytes."""


class Rounding(Emitter):
    """x float32 [M, 32 · blocks] → q [blocks, M, 32], q_sums int32 [blocks, M] of q: x[m] ≈ q_scale[m] · (q - q_zero[m]).

    The range of a row always holds 0, so that 0 stays 0.
    """

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, ROUND_ARGS)

    def plain(self) -> None:
        with self.loop(self.first, self.last) as m:
            x = self.b.add(self.a["x"], self.b.mul(m, self.a["stride"]))
            low, high = self._range(x)
            self._write(m, x, low, high)
        self.b.ret_void()

    def _range(self, x: Any) -> tuple[Any, Any]:
        s, b = self.s, self.b
        low, high = (self.variable(s.floats) for _ in range(2))
        for v in (low, high):
            b.store(s.zero(s.floats), v)
        with self.loop(self.number(0), self.a["blocks"]) as g:
            at = self.times(g, 4 * BLOCK)
            for i in range(0, BLOCK, s.rows):
                value = s.load(b.add(x, at), 4 * i, s.floats)
                b.store(s.lesser(value, b.load(low)), low)
                b.store(s.greater(value, b.load(high)), high)
        return s.reduce("fmin", b.load(low)), s.reduce("fmax", b.load(high))

    def _write(self, m: Any, x: Any, low: Any, high: Any) -> None:
        s, b = self.s, self.b
        shift = b.sitofp(self.a["shift"], F32)
        least, most = (b.fadd(shift, ir.Constant(F32, float(v))) for v in (-128, 127))
        step = b.fdiv(b.fsub(high, low), ir.Constant(F32, 255.0))
        step = b.select(b.fcmp_ordered("==", step, ir.Constant(F32, 0.0)), ir.Constant(F32, 1.0), step)
        inverse = b.fdiv(ir.Constant(F32, 1.0), step)
        zero = s.rounded(b.fsub(least, b.fmul(low, inverse)))
        at4 = self.times(m, 4)
        s.store(step, self.a["q_scale"], at4)
        s.store(zero, self.a["q_zero"], at4)
        least, most, inverse, zero = (s.spread(v) for v in (least, most, inverse, zero))
        bytes_kind = ir.VectorType(I8, s.rows)
        with self.loop(self.number(0), self.a["blocks"]) as g:
            place = b.add(b.mul(g, self.a["m"]), m)
            sums = s.zero(s.ints)
            for i in range(0, BLOCK, s.rows):
                value = s.fma(s.load(b.add(x, self.times(g, 4 * BLOCK)), 4 * i, s.floats), inverse, zero)
                whole = b.fptosi(s.rounded(s.lesser(s.greater(value, least), most)), s.ints)
                sums = b.add(sums, whole)
                s.store(b.trunc(whole, bytes_kind), b.add(self.a["q"], self.times(place, BLOCK)), i)
            s.store(s.reduce("add", sums), self.a["q_sums"], self.times(place, 4))


def rounding_module(target: str) -> ir.Module:
    module = ir.Module(f"round-{target}")
    Rounding(module, "round", target).plain()
    return module
