"""Inputs → bytes with a scale and a zero a row, as the products of `products` read them; before it, in the same pass over a row, what a model
does to it there: a norm, or the feed-forward's activation.

Rows are padded with zeros to whole blocks; the pads of a norm's weight are zero, too, so that they stay zero.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import ACTIVATIONS, NORMS, ROUND_ARGS
from edgesdk.kernels.panels import BLOCK

from .emitter import Emitter
from .simd import F32, I8


class Rounding(Emitter):
    """x float32 [M, 32 · blocks] → q [blocks, M, 32], q_sums int32 [blocks, M] of q: x[m] ≈ q_scale[m] · (q - q_zero[m]).

    The range of a row always holds 0, so that 0 stays 0.
    """

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, ROUND_ARGS)
        self.width = self.times(self.a["blocks"], BLOCK)

    def emit(self, before: str, gated: bool, rounds: bool) -> None:
        """Rows first … last - 1: `before` one of NORMS or ACTIVATIONS or "", then bytes where it `rounds`."""
        with self.loop(self.first, self.last) as m:
            at = self.b.mul(m, self.a["stride"])
            x, out = self.b.add(self.a["x"], at), self.b.add(self.a["out"], at)
            if before in NORMS:
                self._norm(x, out, centred=before == "layer")
            elif before:
                self._activate(before, x, out, self.b.add(self.a["other"], at) if gated else None)
            if rounds:
                self._write(m, out if before else x)
        self.b.ret_void()

    # ---- what comes before

    def _sum(self, x: Any, square_of: Any = None) -> Any:
        """Σ of a row, or Σ (x - square_of)² with a vector `square_of`."""
        s, b, total = self.s, self.b, self.variable(self.s.floats)
        self.store_zero(total)

        def add(at: Any) -> None:
            v = s.load(x, at, s.floats)
            if square_of is not None:
                v = b.fsub(v, square_of)
                v = b.fmul(v, v)
            b.store(b.fadd(b.load(total), v), total)

        self.lanes(self.number(0), self.width, add)
        return s.reduce("fadd", b.load(total))

    def _norm(self, x: Any, out: Any, centred: bool) -> None:
        s, b = self.s, self.b
        cols = b.sitofp(self.a["cols"], F32)
        mean = b.fdiv(self._sum(x), cols) if centred else self.real(0.0)
        squares = self._sum(x, s.spread(mean))
        pads = b.sitofp(b.sub(self.width, self.a["cols"]), F32)
        squares = b.fsub(squares, b.fmul(pads, b.fmul(mean, mean)))
        root = s.root(b.fadd(b.fdiv(squares, cols), s.float_of(self.a["eps"])))
        factor, middle = s.spread(b.fdiv(self.real(1.0), root)), s.spread(mean)

        def scale(at: Any) -> None:
            v = b.fmul(b.fsub(s.load(x, at, s.floats), middle), factor)
            v = b.fmul(v, s.load(self.a["weight"], at, s.floats))
            if centred:
                v = b.fadd(v, s.load(self.a["bias"], at, s.floats))
            s.store(v, out, at)

        self.lanes(self.number(0), self.width, scale)

    def _activate(self, name: str, x: Any, out: Any, other: Any) -> None:
        s, b = self.s, self.b

        def apply(at: Any) -> None:
            v = activation(s, name, s.load(x, at, s.floats))
            s.store(v if other is None else b.fmul(v, s.load(other, at, s.floats)), out, at)

        self.lanes(self.number(0), self.width, apply)

    # ---- rounding

    def _range(self, x: Any) -> tuple[Any, Any]:
        """The least and the greatest of a row and 0; each vector of a block has its own, so that none waits for the one before."""
        s, b = self.s, self.b
        places = range(0, 4 * BLOCK, 4 * s.rows)
        lows, highs = ([self.variable(s.floats) for _ in places] for _ in range(2))
        self.store_zero(*lows, *highs)
        with self.loop(self.number(0), self.a["blocks"]) as g:
            at = b.add(x, self.times(g, 4 * BLOCK))
            for line in range(0, 4 * BLOCK, 64):
                s.prefetch(b.add(at, self.a["stride"]), line)  # the next row's
            for place, low, high in zip(places, lows, highs):  # noqa: B905 (Python 3.9)
                value = s.load(at, place, s.floats)
                b.store(s.lesser(value, b.load(low)), low)
                b.store(s.greater(value, b.load(high)), high)
        least, most = b.load(lows[0]), b.load(highs[0])
        for low, high in zip(lows[1:], highs[1:]):  # noqa: B905
            least, most = s.lesser(b.load(low), least), s.greater(b.load(high), most)
        return s.reduce("fmin", least), s.reduce("fmax", most)

    def _write(self, m: Any, x: Any) -> None:
        s, b = self.s, self.b
        low, high = self._range(x)
        shift = b.sitofp(self.a["shift"], F32)
        least, most = (b.fadd(shift, self.real(float(v))) for v in (-128, 127))
        step = b.fdiv(b.fsub(high, low), self.real(255.0))
        step = b.select(b.fcmp_ordered("<", step, self.real(2.0**-126)), self.real(1.0), step)  # its inverse would be no number
        inverse = b.fdiv(self.real(1.0), step)
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


def activation(s: Any, name: str, x: Any) -> Any:
    """silu(x) = x / (1 + e^-x); gelu_tanh(x) = x / (1 + e^-2u), u = 0.7978845608 (x + 0.044715 x³); gelu by the error function, which is
    1 - (a₁t + … + a₅t⁵) e^-z², t = 1 / (1 + 0.3275911 z), to 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    b = s.b

    def same(value: float) -> Any:
        return ir.Constant(s.floats, [value] * s.rows)

    if name == "relu":
        return s.greater(x, same(0.0))
    if name == "gelu":
        z = b.fmul(x, same(0.7071067811865476))
        size = s.absolute(z)
        t = b.fdiv(same(1.0), s.fma(size, same(0.3275911), same(1.0)))
        total = same(1.061405429)
        for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            total = s.fma(total, t, same(term))
        error = b.fsub(same(1.0), b.fmul(b.fmul(total, t), s.exp(b.fneg(b.fmul(size, size)))))
        error = b.select(b.fcmp_ordered("<", z, same(0.0)), b.fneg(error), error)
        return b.fmul(b.fmul(x, same(0.5)), b.fadd(error, same(1.0)))
    power = b.fneg(x)
    if name == "gelu_tanh":
        cube = b.fmul(b.fmul(x, x), x)
        power = b.fmul(s.fma(cube, same(0.044715), x), same(-2 * 0.7978845608028654))
    return b.fdiv(x, b.fadd(s.exp(power), same(1.0)))


def rounding_module(target: str) -> ir.Module:
    """`round`, `rms`, `layer` (norms alone), and `<norm>_round`, `<activation>_round`, `<activation>_gated_round`."""
    module = ir.Module(f"round-{target}")
    Rounding(module, "round", target).emit("", False, True)
    for norm in NORMS:
        Rounding(module, norm, target).emit(norm, False, False)
        Rounding(module, f"{norm}_round", target).emit(norm, False, True)
    for name in ACTIVATIONS:
        Rounding(module, f"{name}_round", target).emit(name, False, True)
        Rounding(module, f"{name}_gated_round", target).emit(name, True, True)
    return module
