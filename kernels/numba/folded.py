"""A GEMM of many rows of inputs whose weights have a scale a block: scales are multiplied into them first.

A scale every 32 columns costs a multiplication for eight dot products, and a second register for each sum. Over many rows of inputs it is cheaper
to unpack a group of panels once, into int8 with one scale a row (in the second cache), and to multiply those. Beside the rounding to 4 bits and
fewer this one is small: it adds less than 1% of the weights' own error at 4 bits, as much as int8 weights have.
"""

from __future__ import annotations

import copy
from typing import Any

from llvmlite import ir

from edgesdk.kernels.panels import BLOCK

from .products import Product, tiles, wide
from .simd import I8, I16, VNNI

ROWS = {False: 64, True: 32}
"""Rows of inputs from which it pays: of weights without and with zeros of their own."""
MOST = 16384
"""Columns, so that a group of panels stays in the second cache."""
REACH, LARGEST = 128.0, 127.0
"""What signed bytes of weights reach, and what the new ones may."""


class _Bytes(Product):
    """The GEMM over weights that were folded: int8 with one scale a row."""

    def __init__(self, whole: Product) -> None:
        self.__dict__.update(copy.copy(whole.__dict__))
        self.packed_bytes = whole.block_bytes
        self.bits, self.per_block, self.zeros, self.kind, self.signed = 8, False, False, "", True
        self.block_bytes, self.scale_kind, self.row = BLOCK * self.s.rows, self.s.floats, self.number(0)

    def scale(self, panel: dict[str, Any], g: Any) -> Any:
        return self.b.load(panel["step"])

    def factors(self, panel: dict[str, Any]) -> tuple[Any, Any]:
        return self.b.load(panel["row_scale"]), self.b.load(panel["sums"])

    def ahead(self, panels: list[dict[str, Any]], g: Any) -> None:
        """The next group's weights into the second cache: a line of each block for each tile."""
        b, lines = self.b, self.packed_bytes // 64
        line = b.sdiv(self.row, self.number(tiles(self.s.target, False)[0]))
        line = self.least(line, self.number(max(0, lines - 1)))
        for p in panels:
            at = self.add(p["packed"], self.times(self.a["panel_bytes"], len(panels)), self.times(g, self.packed_bytes))
            self.s.prefetch(b.add(at, self.times(line, 64)), 0, near=2)


class Folded(Product):
    """The GEMM of one form."""

    def gemm(self) -> None:
        b = self.b
        many = b.icmp_signed(">=", self.a["m"], self.number(ROWS[self.zeros]))
        fits = b.icmp_signed("<=", self.a["blocks"], self.number(MOST // BLOCK))
        with b.if_then(b.and_(many, fits)):
            self._groups()
            b.ret_void()
        super().gemm()

    def _groups(self) -> None:
        s, b, many = self.s, self.b, wide(self.s.target)
        size = self.times(self.a["blocks"], BLOCK * s.rows)
        place = b.alloca(ir.ArrayType(I8, 64), size=b.udiv(self.times(size, many), self.number(64)))
        place.align = 64
        room = b.ptrtoint(place, size.type)
        kept = [{n: self.variable(s.floats) for n in ("step", "row_scale", "sums")} for _ in range(many)]
        inner = _Bytes(self)
        with self.loop(self.first, self.last) as group:
            panels = []
            for i in range(many):
                panel = self.panel(self.add(self.times(group, many), i))
                at = b.add(room, self.times(size, i))
                self._fold(panel, at, kept[i])
                panels.append({**panel, **kept[i], "codes": at, "packed": panel["codes"], "tables": [], "looked_up": []})
            done = self.number(0)
            for tile in tiles(s.target, False):
                count = self.times(b.sdiv(b.sub(self.a["m"], done), self.number(tile)), tile)
                with self.loop(done, b.add(done, count), tile) as m:
                    inner.row = m
                    inner._tile(panels, m, tile)
                done = b.add(done, count)

    def _fold(self, panel: dict[str, Any], room: Any, kept: dict[str, Any]) -> None:
        """A panel's weights as int8: round(code · scale / step), `step` = what the largest could be / 127; and Σ of them."""
        s, b = self.s, self.b
        total = self.variable(s.ints)
        b.store(s.zero(s.ints), total)
        step = b.fdiv(self._most(panel), ir.Constant(s.floats, [LARGEST] * s.rows))
        inverse = b.fdiv(ir.Constant(s.floats, [32768.0] * s.rows), step)
        with self.loop(self.number(0), self.a["blocks"]) as g:
            factor = self._pairs(b.fptosi(s.rounded(b.fmul(self.scale(panel, g), inverse)), s.ints))
            zero = self._pairs(self.zero(panel, g)) if self.zeros else None
            to = b.add(room, self.times(g, BLOCK * s.rows))
            for i, quad in enumerate(self.unpacked(panel, g, prefetch=False)):
                folded = self._times_scale(quad, factor, zero)
                s.store(folded, to, 4 * s.rows * i)
                b.store(s.dot(b.load(total), folded, s.fill(s.ints, 0x01010101), True), total)
        row_scale, _ = self.factors(panel)
        b.store(step, kept["step"])
        b.store(row_scale, kept["row_scale"])
        b.store(b.fmul(s.to_float(b.load(total)), b.fmul(step, row_scale)), kept["sums"])

    def _most(self, panel: dict[str, Any]) -> Any:
        """What a row's largest weight can be, in its scale; without zeros the largest scale of a row is 1 (`kernels.pack`)."""
        s, b = self.s, self.b
        reach = ir.Constant(s.floats, [REACH] * s.rows)
        if not self.zeros:
            return reach
        most = self.variable(s.floats)
        b.store(ir.Constant(s.floats, [1e-30] * s.rows), most)
        with self.loop(self.number(0), self.a["blocks"]) as g:
            far = b.fadd(reach, s.absolute(s.to_float(self.zero(panel, g))))
            b.store(s.greater(b.fmul(s.absolute(self.scale(panel, g)), far), b.load(most)), most)
        return b.load(most)

    def _pairs(self, x: Any) -> Any:
        """The low half of each lane twice, as 16-bit lanes: one for each two bytes of a quad."""
        s, b = self.s, self.b
        both = b.or_(b.and_(x, s.fill(s.ints, 0xFFFF)), b.shl(x, s.fill(s.ints, 16)))
        return b.bitcast(both, ir.VectorType(I16, 2 * s.rows))

    def _times_scale(self, quad: Any, factor: Any, zero: Any) -> Any:
        """Signed bytes (from their zeros) times factors of 2^15: bytes."""
        s, b = self.s, self.b
        words = ir.VectorType(I16, 2 * s.rows)
        name = "llvm.x86.avx512.pmul.hr.sw.512" if s.rows == 16 else "llvm.x86.avx2.pmul.hr.sw"
        eight, pair = s.fill(words, 8), b.bitcast(quad, words)
        halves = []
        for half in (b.ashr(b.shl(pair, eight), eight), b.ashr(pair, eight)):
            moved = half if zero is None else b.add(half, zero)
            halves.append(s._call(name, words, [moved, factor]))
        low, high = b.and_(halves[0], s.fill(words, 0xFF)), b.shl(halves[1], eight)
        return b.bitcast(b.or_(low, high), s.bytes)


def product_module(target: str, bits: int, per_block: bool, zeros: bool, kind: str = "") -> ir.Module:
    """`gemv` and `gemm` for one form of weights."""
    module = ir.Module(f"product-{target}-{bits}-{per_block}-{zeros}-{kind}")
    Product(module, "gemv", target, bits, per_block, zeros, kind).gemv()
    (Folded if per_block and target in VNNI else Product)(module, "gemm", target, bits, per_block, zeros, kind).gemm()
    return module
