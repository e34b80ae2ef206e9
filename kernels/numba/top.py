"""The largest numbers of a row and where they are."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import TOP_ARGS

from .emitter import Emitter
from .simd import F32, I64


class Top(Emitter):
    """Parts: the rows. A list is kept in order; a vector whose numbers are all too small is passed by."""

    def __init__(self, module: ir.Module, name: str, target: str) -> None:
        super().__init__(module, name, target, TOP_ARGS)

    def emit(self) -> None:
        a, b, s = self.a, self.b, self.s
        with self.loop(self.first, self.last) as row:
            x = b.add(a["x"], b.mul(row, a["stride"]))
            values, ids = (b.add(a[n], b.mul(row, self.times(a["k"], size))) for n, size in (("values", 4), ("ids", 8)))
            with self.loop(self.number(0), a["k"]) as i:
                s.store(self.real(float("-inf")), values, self.times(i, 4))
                s.store(self.number(-1), ids, self.times(i, 8))
            whole = self.times(b.sdiv(a["n"], self.number(s.rows)), s.rows)
            end = b.sub(a["k"], self.number(1))
            with self.loop(self.number(0), whole, s.rows) as at:
                found, least = s.load(x, self.times(at, 4), s.floats), s.load(values, self.times(end, 4), F32)
                bits = b.bitcast(b.fcmp_ordered(">", found, s.spread(least)), ir.IntType(s.rows))
                with (
                    b.if_then(b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0)), likely=False),
                    self.loop(at, b.add(at, self.number(s.rows))) as t,
                ):
                    self._offered(x, t, values, ids, end)
            with self.loop(whole, a["n"]) as t:
                self._offered(x, t, values, ids, end)
        b.ret_void()

    def _offered(self, x: Any, t: Any, values: Any, ids: Any, end: Any) -> None:
        """Number t takes its place in the list if it is larger than the last one in it."""
        b, s = self.b, self.s
        value = s.load(x, self.times(t, 4), F32)
        with b.if_then(b.fcmp_ordered(">", value, s.load(values, self.times(end, 4), F32))):
            place = self.variable(I64)
            b.store(end, place)

            def ahead(size: int) -> Any:
                return self.times(b.sub(b.load(place), self.number(1)), size)

            with self.whilst(
                lambda: b.icmp_signed(">", b.load(place), self.number(0)),
                lambda: b.fcmp_ordered(">", value, s.load(values, ahead(4), F32)),
            ):
                s.store(s.load(values, ahead(4), F32), values, self.times(b.load(place), 4))
                s.store(s.load(ids, ahead(8), I64), ids, self.times(b.load(place), 8))
                b.store(b.sub(b.load(place), self.number(1)), place)
            s.store(value, values, self.times(b.load(place), 4))
            s.store(t, ids, self.times(b.load(place), 8))


def top_module(target: str) -> ir.Module:
    """`top`."""
    module = ir.Module(f"top-{target}")
    Top(module, "top", target).emit()
    return module
