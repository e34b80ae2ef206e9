"""y = x · Wᵀ with weights of -1, 0 and 1 of their scale, three in a code of 5 bits: that of quad j of three blocks beside each other.

A code is looked up as it is, one shuffle of bytes for each of its three quads (two, where a shuffle chooses among 16 bytes only), in place of
the divisions by 3 that five digits in a byte would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from edgesdk.kernels.panels import TRITS

from .products import AHEAD, QUADS, Product
from .simd import I32


class Ternary(Product):
    """Emits one function."""

    small = True

    def __init__(self, module: ir.Module, name: str, target: str, per_block: bool) -> None:
        super().__init__(module, name, target, 5, per_block, False, "trits")

    def place(self, panel: dict[str, Any], g: Any) -> tuple[Any, list[Any]]:
        b = self.b
        unit = b.udiv(g, self.number(TRITS))
        table = self.add(self.a["tables"], self.times(b.sub(g, self.times(unit, TRITS)), 32))
        return self.unit(panel, unit), self.s.tables_of_trits(table)

    def unit(self, panel: dict[str, Any], unit: Any) -> Any:
        """Where the codes of three blocks are."""
        return self.b.add(panel["codes"], self.times(unit, self.block_bytes))

    def ahead(self, panels: list[dict[str, Any]], g: Any) -> None:
        super().ahead(panels, self.b.udiv(g, self.number(TRITS)))

    def codes(self, at: Any, first: int, count: int, tables: list[Any]) -> list[Any]:
        return [self.s.trits(tables, code) for code in self.s.fives(at, first, count)]

    def gemv(self) -> None:
        """Codes are read once for their three blocks."""
        s, b = self.s, self.b
        kind = s.floats if self.per_block else s.ints
        whole = self.variable(kind)
        tables = [s.tables_of_trits(self.add(self.a["tables"], 32 * i)) for i in range(TRITS)]
        units = b.udiv(self.a["blocks"], self.number(TRITS))
        left = b.sub(self.a["blocks"], self.times(units, TRITS))
        with self.loop(self.first, self.last) as p:
            panel = self.panel(p)
            b.store(s.zero(kind), whole)
            with self.loop(self.number(0), units) as unit:
                for line in range(0, self.block_bytes, 64):
                    s.prefetch(self.unit(panel, unit), AHEAD[self.bits] + line)
                self._added(panel, unit, range(TRITS), tables, whole)
            for i in range(TRITS - 1):
                with b.if_then(b.icmp_signed(">", left, self.number(i))):
                    self._added(panel, units, [i], tables, whole)
            value = b.load(whole)
            self.write(value if self.per_block else b.fmul(s.to_float(value), self.scale(panel, None)), panel, self.number(0))
        b.ret_void()

    def _added(self, panel: dict[str, Any], unit: Any, which: Sequence[int], tables: list[list[Any]], whole: Any) -> None:
        """These of a unit's three blocks."""
        s, b = self.s, self.b
        blocks = [self.add(self.times(unit, TRITS), i) for i in which]
        inputs, at = [self.q_at(g, self.number(0))[0] for g in blocks], self.unit(panel, unit)
        totals = [s.zero(s.ints) for _ in which]
        for j in range(QUADS):
            code = s.fives(at, j, 1)[0]
            for k, i in enumerate(which):
                x = s.spread(s.load(inputs[k], 4 * j, I32))
                totals[k] = s.dot(totals[k], s.trits(tables[i], code), x, True, True)
        for g, total in zip(blocks, totals):  # noqa: B905 (Python 3.9)
            if self.per_block:
                b.store(s.fma(s.to_float(total), self.scale(panel, g), b.load(whole)), whole)
            else:
                b.store(b.add(b.load(whole), total), whole)


def ternary_module(target: str, per_block: bool) -> ir.Module:
    """`gemv` and `gemm`."""
    module = ir.Module(f"ternary-{target}-{per_block}")
    Ternary(module, "gemv", target, per_block).gemv()
    Ternary(module, "gemm", target, per_block).gemm()
    return module
