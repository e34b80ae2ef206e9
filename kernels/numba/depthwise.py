"""Depthwise convolutions of int8, channels last: bytes of four columns interleaved into quads, which dot products take."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.depthwise import PLACES, shifts, table
from edgesdk.kernels.library import DEPTHWISE_ARGS

from .emitter import Emitter
from .simd import F32, I8, I32, Simd


def _narrow(builder: Any, target: str, rows: int) -> Simd:
    """Vectors of so many lanes on a target that has more."""
    found = Simd(builder, target)
    found.rows = rows
    found.ints, found.floats, found.bytes = (ir.VectorType(t, n) for t, n in ((I32, rows), (F32, rows), (I8, 4 * rows)))
    return found


class Depthwise(Emitter):
    """Parts: the rows of the output."""

    def __init__(self, module: ir.Module, name: str, target: str, size: int, stride: int, floats: bool) -> None:
        super().__init__(module, name, target, DEPTHWISE_ARGS)
        self.size, self.stride, self.floats, self.target = size, stride, floats, target
        self.shifts = table(size, stride)

    def emit(self) -> None:
        a, b = self.a, self.b
        together = PLACES[self.size, self.stride]
        with self.loop(self.first, self.last) as y:
            batch, line = b.sdiv(y, a["rows"]), b.srem(y, a["rows"])
            image = b.add(a["x"], b.mul(batch, b.mul(a["height"], b.mul(a["width"], a["channels"]))))
            whole = self.times(b.sdiv(a["columns"], self.number(together)), together)
            for first, last, places in ((self.number(0), whole, together), (whole, a["columns"], 1)):
                with self.loop(first, last, places) as x:
                    self._places(image, y, line, x, places)
        b.ret_void()

    def _columns(self, image: Any, line: Any, x: Any, row: int, places: int) -> list[Any]:
        """The addresses of the columns that one row of the kernel reads; what is outside, or met by no weight, is a row of zero points."""
        a, b = self.a, self.b
        quads = max(q for _, q, _ in shifts(self.size, self.stride, places)) + 1
        at = b.add(b.sub(self.times(line, self.stride), a["top"]), self.number(row))
        there = b.icmp_unsigned("<", at, a["height"])
        begin = b.add(image, b.mul(b.mul(at, a["width"]), a["channels"]))
        found = []
        for c in range(4 * quads):
            if c >= (places - 1) * self.stride + self.size:
                found.append(a["nothing"])
                continue
            column = b.add(b.sub(self.times(x, self.stride), a["left"]), self.number(c))
            inside = b.and_(there, b.icmp_unsigned("<", column, a["width"]))
            found.append(b.select(inside, b.add(begin, b.mul(column, a["channels"])), a["nothing"]))
        return found

    def _places(self, image: Any, y: Any, line: Any, x: Any, places: int) -> None:
        a, b = self.a, self.b
        columns = [self._columns(image, line, x, row, places) for row in range(self.size)]
        out = b.mul(b.add(b.mul(y, a["columns"]), x), a["channels"])
        channel, weights, lanes = self.number(0), a["weights"], self.s.panel
        while lanes >= 4:
            block = 4 * lanes
            last = b.add(channel, self.times(b.sdiv(b.sub(a["channels"], channel), self.number(block)), block))
            each = len(self.shifts) * self.size * 4 * block
            with self.loop(channel, last, block) as c:
                held = b.add(weights, b.mul(b.sdiv(b.sub(c, channel), self.number(block)), self.number(each)))
                self._block(_narrow(b, self.target, lanes), columns, held, c, out, places)
            weights = b.add(weights, b.mul(b.sdiv(b.sub(last, channel), self.number(block)), self.number(each)))
            channel, lanes = last, lanes // 2

    def _block(self, s: Simd, columns: list[list[Any]], weights: Any, c: Any, out: Any, places: int) -> None:
        b, n = self.b, s.rows
        wanted = shifts(self.size, self.stride, places)
        bias = [s.load(self.a["bias"], self.add(self.times(c, 4), 4 * n * r), s.ints) for r in range(4)]
        sums = [list(bias) for _ in range(places)]
        for row in range(self.size):
            for q in range(len(columns[row]) // 4):
                quads = self._quads(s, [s.load(at, c, s.bytes) for at in columns[row][4 * q : 4 * q + 4]])
                for p, _, shift in (w for w in wanted if w[1] == q):
                    first = (row * len(self.shifts) + self.shifts.index(shift)) * 16 * n
                    for r in range(4):
                        sums[p][r] = self._dot(s, sums[p][r], s.load(weights, first + 4 * n * r, s.bytes), quads[r])
        for p in range(places):
            at = b.add(b.add(out, b.mul(self.number(p), self.a["channels"])), c)
            self._write(s, sums[p], c, at)

    def _dot(self, s: Simd, sums: Any, weights: Any, quads: Any) -> Any:
        """Unlike in products, each lane has a quad of its own."""
        if self.target == "x86-avx2":
            return s._plain_dot(sums, weights, quads, True)
        return s.dot(sums, weights, quads, signed=True)

    def _quads(self, s: Simd, columns: list[Any]) -> list[Any]:
        """Bytes of four columns side by side, four vectors of them, in the order that `kernels.depthwise` tells; unsigned on x86."""
        b, n = self.b, 4 * s.rows

        def zipped(x: Any, y: Any, width: int, high: int) -> Any:
            """Elements of `width` bytes in turn, of the low or high half of each 128 bits."""
            each = 16 // width
            places = [
                i
                for f in range(0, n // width, each)
                for k in range(each // 2)
                for i in (f + k + high * each // 2, n // width + f + k + high * each // 2)
            ]
            kind = ir.VectorType(ir.IntType(8 * width), n // width)
            mixed = b.shuffle_vector(b.bitcast(x, kind), b.bitcast(y, kind), ir.Constant(ir.VectorType(I32, n // width), places))
            return b.bitcast(mixed, s.bytes)

        first, second = ([zipped(columns[i], columns[i + 1], 1, h) for h in (0, 1)] for i in (0, 2))
        found = [zipped(first[r // 2], second[r // 2], 2, r % 2) for r in range(4)]
        return [b.xor(v, s.fill(s.bytes, 0x80)) for v in found] if self.target.startswith("x86") else found

    def _write(self, s: Simd, sums: list[Any], c: Any, out: Any) -> None:
        a, b, n = self.a, self.b, s.rows
        real = []
        for r, total in enumerate(sums):
            scale = s.load(a["scales"], self.add(self.times(c, 4), 4 * n * r), s.floats)
            real.append(b.fmul(b.sitofp(total, s.floats), scale))
        low, high = (s.spread(s.float_of(a[name])) for name in ("low", "high"))
        real = [s.greater(s.lesser(x, high), low) for x in real]
        if self.floats:
            for r, x in enumerate(real):
                for g in range(n // 4):
                    s.store(s.part(x, 4 * g, 4), a["out"], self.add(self.times(out, 4), 4 * (16 * g + 4 * r)))
            return
        zero = s.spread(b.trunc(a["zero"], I32))
        whole = [b.add(b.fptosi(s.rounded(x), s.ints), zero) for x in real]
        s.store(self._packed(s, whole), a["out"], out)

    def _packed(self, s: Simd, words: list[Any]) -> Any:
        """Four vectors of int32 within int8 → their channels' bytes in order."""
        b, n = self.b, s.rows
        if not self.target.startswith("x86"):
            both = [b.shuffle_vector(*words[i : i + 2], ir.Constant(ir.VectorType(I32, 2 * n), list(range(2 * n)))) for i in (0, 2)]
            every = b.trunc(b.shuffle_vector(*both, ir.Constant(ir.VectorType(I32, 4 * n), list(range(4 * n)))), s.bytes)
            places = [r * n + 4 * g + i for g in range(n // 4) for r in range(4) for i in range(4)]
            return b.shuffle_vector(every, every, ir.Constant(ir.VectorType(I32, 4 * n), places))
        halves = ir.VectorType(ir.IntType(16), 2 * n)
        first, second = {4: ("sse2.packssdw.128", "sse2.packsswb.128"), 8: ("avx2.packssdw", "avx2.packsswb")}.get(
            n, ("avx512.packssdw.512", "avx512.packsswb.512")
        )
        pairs = [s._call(f"llvm.x86.{first}", halves, words[i : i + 2]) for i in (0, 2)]
        return s._call(f"llvm.x86.{second}", s.bytes, pairs)


def depthwise_module(target: str, size: int, stride: int) -> ir.Module:
    """`depthwise`, to int8, and `depthwise_float`."""
    module = ir.Module(f"depthwise-{target}-{size}-{stride}")
    Depthwise(module, "depthwise", target, size, stride, floats=False).emit()
    Depthwise(module, "depthwise_float", target, size, stride, floats=True).emit()
    return module
