"""Vectors in LLVM IR: the few operations the kernels are made of, for each set of instructions. Numba compiles what is built here.

A *quad* is four neighbouring columns. A vector of bytes holds one quad of each of `rows` rows, so that one dot-product instruction adds
four products to each of `rows` sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgesdk.kernels.cpu import host_features

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VNNI = ("x86-avx512vnni", "x86-avxvnni")
"""Targets whose dot product takes unsigned and signed bytes and never saturates."""
ROWS = {"x86-avx512vnni": 16, "x86-avxvnni": 8, "x86-avx2": 8, "arm-i8mm": 4, "arm-dotprod": 4, "arm-neon": 4, "plain": 8}
"""Target → rows of a panel: the 32-bit lanes of a vector."""


@lru_cache(maxsize=8)
def permutes(target: str) -> bool:
    """Whether this machine has one instruction that chooses any of 64 bytes. x86 kernels are compiled where they run."""
    return target == "x86-avx512vnni" and "avx512vbmi" in host_features()


class Simd:
    """Emits instructions through `builder`. Bytes of weights are codes from 0 to 127, or with `signed` from -128 to 127."""

    def __init__(self, builder: Any, target: str, one: bool = False) -> None:
        """`one`: vectors of one row, taken out of panels of as many as the target has."""
        self.b, self.target, self.panel = builder, target, ROWS[target]
        self.rows = 1 if one else self.panel
        self.ints, self.floats, self.bytes = (ir.VectorType(t, n) for t, n in ((I32, self.rows), (F32, self.rows), (I8, 4 * self.rows)))

    # ---- memory

    def at(self, address: Any, offset: Any, kind: Any) -> Any:
        """A pointer to `kind` at an address (int64) plus an offset in bytes (a value or an int)."""
        if isinstance(offset, int):
            offset = ir.Constant(I64, offset)
        return self.b.inttoptr(self.b.add(address, offset), kind.as_pointer())

    def load(self, address: Any, offset: Any, kind: Any) -> Any:
        value = self.b.load(self.at(address, offset, kind))
        value.align = 1
        return value

    def store(self, value: Any, address: Any, offset: Any) -> None:
        self.b.store(value, self.at(address, offset, value.type)).align = 1

    def prefetch(self, address: Any, offset: Any, near: int = 3) -> None:
        """`near`: 3 into the first cache, 2 into the second."""
        args = [self.at(address, offset, I8), *(ir.Constant(I32, n) for n in (0, near, 1))]
        self._call("llvm.prefetch.p0", ir.VoidType(), args)

    def spread(self, value: Any, count: int = 0) -> Any:
        """One number in all lanes, or in `count` of them."""
        count = count or self.rows
        undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, count), [0] * count))

    # ---- arithmetic

    def zero(self, kind: Any) -> Any:
        return ir.Constant(kind, [0] * kind.count)

    def fill(self, kind: Any, value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def shift_right(self, x: Any, bits: int) -> Any:
        """Every byte moved by `bits`; the bits that come in from the next byte are for the caller to mask."""
        if not bits:
            return x
        words = ir.VectorType(I16, x.type.count // 2)
        return self.b.bitcast(self.b.lshr(self.b.bitcast(x, words), self.fill(words, bits)), x.type)

    def shift_left(self, x: Any, bits: int) -> Any:
        if not bits:
            return x
        words = ir.VectorType(I16, x.type.count // 2)
        return self.b.bitcast(self.b.shl(self.b.bitcast(x, words), self.fill(words, bits)), x.type)

    def mask(self, x: Any, value: int) -> Any:
        return self.b.and_(x, self.fill(x.type, value))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x · y + z of float lanes."""
        return self._call(f"llvm.fma.v{x.type.count}f32", x.type, [x, y, z])

    def lesser(self, x: Any, y: Any) -> Any:
        """The smaller of each two lanes; `y` where `x` is no number."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def greater(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def rounded(self, x: Any) -> Any:
        """float32 lanes, or one float32, to the nearest whole number; ties to even."""
        kind = f"v{self.rows}f32" if x.type == self.floats else "f32"
        return self._call(f"llvm.rint.{kind}", x.type, [x])

    def reduce(self, how: str, x: Any) -> Any:
        """All lanes to one number: "add" of integers; "fmin", "fmax", "fadd" of floats."""
        if how == "fadd":
            return self.total(x)
        element = x.type.element
        kind = f"v{self.rows}{'i32' if element == I32 else 'f32'}"
        return self._call(f"llvm.vector.reduce.{how}.{kind}", element, [x])

    def absolute(self, x: Any) -> Any:
        return self._call(f"llvm.fabs.v{self.rows}f32", self.floats, [x])

    def root(self, x: Any) -> Any:
        """The square root of one float32."""
        return self._call("llvm.sqrt.f32", F32, [x])

    # ---- vectors of any width, which LLVM divides into those the CPU has

    def part(self, x: Any, first: int, count: int) -> Any:
        """Lanes first … first + count - 1."""
        places = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
        return self.b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), places)

    def total(self, x: Any) -> Any:
        """The sum of all lanes, in an order that LLVM may choose."""
        if x.type.count == 1:
            return self.b.extract_element(x, ir.Constant(I32, 0))
        kind = ir.FunctionType(F32, [F32, x.type])
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.vector.reduce.fadd.v{x.type.count}f32")
        return self.b.call(function, [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))

    # ---- functions

    def float_of(self, word: Any) -> Any:
        """The float32 whose bits are the low half of an int64 arg."""
        return self.b.bitcast(self.b.trunc(word, I32), F32)

    def exp(self, x: Any) -> Any:
        """e^x of float lanes from -87 to 88, to 2 units in the last place: 2^whole by its exponent, 2^rest by Taylor's first seven terms."""
        kind, b = x.type, self.b

        def same(value: float) -> Any:
            return ir.Constant(kind, [value] * kind.count)

        low, high = same(-87.0), same(88.0)
        x = b.select(b.fcmp_ordered("<", x, low), low, b.select(b.fcmp_ordered(">", x, high), high, x))
        y = b.fmul(x, same(1.4426950408889634))
        whole = self._call(f"llvm.rint.v{kind.count}f32", kind, [y])
        rest = b.fsub(y, whole)
        total = same(1.5403530393381608e-4)
        for term in (1.3333558146428443e-3, 9.618129107628477e-3, 5.550410866482158e-2, 0.2402265069591007, 0.6931471805599453, 1.0):
            total = self.fma(total, rest, same(term))
        whole_kind = ir.VectorType(I32, kind.count)
        bits = b.add(b.bitcast(total, whole_kind), b.shl(b.fptosi(whole, whole_kind), ir.Constant(whole_kind, [23] * kind.count)))
        return b.bitcast(bits, kind)

    def to_float(self, x: Any) -> Any:
        """int32 or float16 lanes → float32 lanes."""
        return self.b.sitofp(x, self.floats) if x.type.element == I32 else self.b.fpext(x, self.floats)

    def dot(self, sums: Any, weights: Any, quad: Any, signed: bool = False, small: bool = False) -> Any:
        """sums [rows] int32 += the products of `weights` (a quad a row) and one quad of int8 inputs in all lanes (int32 [rows]).

        On x86 with `signed` weights the inputs are unsigned bytes: the instruction multiplies unsigned by signed. `small`: none is beyond ±64.
        """
        b, t = self.b, self.target
        quad = b.bitcast(quad, self.bytes)
        if t in VNNI:
            first, second = (quad, weights) if signed else (weights, quad)
            return self._call(f"llvm.x86.avx512.vpdpbusd.{32 * self.rows}", self.ints, [sums, first, second])
        if t in ("arm-dotprod", "arm-i8mm"):
            return self._call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.ints, [sums, weights, quad])
        if t == "x86-avx2" and (small or not signed):  # 127 * 127 * 2 fits an int16: no sum of two products saturates
            words = ir.VectorType(I16, 2 * self.rows)
            pairs = self._call("llvm.x86.avx2.pmadd.ub.sw", words, [quad, weights] if signed else [weights, quad])
            return b.add(sums, self._call("llvm.x86.avx2.pmadd.wd", self.ints, [pairs, self.fill(words, 1)]))
        if t == "x86-avx2":
            return self._word_dot(sums, weights, quad)
        if t == "arm-neon":
            return self._neon_dot(sums, weights, quad)
        return self._plain_dot(sums, weights, quad, signed and t.startswith("x86"))

    def _neon_dot(self, sums: Any, weights: Any, quad: Any) -> Any:
        """Products of 16 bits, pairs of them in 32, pairs of those: six instructions without a dot product of the CPU's own."""
        words, pairs = ir.VectorType(I16, 8), []
        for first in (0, 8):
            products = self._call("llvm.aarch64.neon.smull.v8i16", words, [self.part(weights, first, 8), self.part(quad, first, 8)])
            pairs.append(self._call("llvm.aarch64.neon.saddlp.v4i32.v8i16", self.ints, [products]))
        return self.b.add(sums, self._call("llvm.aarch64.neon.addp.v4i32", self.ints, pairs))

    def _word_dot(self, sums: Any, weights: Any, quad: Any) -> Any:
        """The same on AVX2, of signed weights and unsigned inputs: two products of 16 bits at a time, then pairs of sums."""
        b, words = self.b, ir.VectorType(I16, 16)
        x = b.zext(self.part(quad, 0, 16), words)
        pairs = [self._call("llvm.x86.avx2.pmadd.wd", self.ints, [b.sext(self.part(weights, at, 16), words), x]) for at in (0, 16)]
        found = self._call("llvm.x86.avx2.phadd.d", self.ints, pairs)  # rows 0, 1, 4, 5, 2, 3, 6, 7
        return b.add(sums, b.shuffle_vector(found, ir.Constant(self.ints, ir.Undefined), ir.Constant(self.ints, [0, 1, 4, 5, 2, 3, 6, 7])))

    def _plain_dot(self, sums: Any, weights: Any, quad: Any, unsigned_inputs: bool) -> Any:
        """The same in 16-bit products that any vector unit has: two columns at a time, so that LLVM finds pmaddwd and smlal."""
        b, n = self.b, 4 * self.rows
        wide = ir.VectorType(I16, n)
        w, x = b.sext(weights, wide), (b.zext if unsigned_inputs else b.sext)(quad, wide)
        long = ir.VectorType(I32, n)
        products = b.mul(b.sext(w, long), b.sext(x, long))
        undefined = ir.Constant(long, ir.Undefined)
        for i in range(4):
            places = ir.Constant(self.ints, [4 * r + i for r in range(self.rows)])
            sums = b.add(sums, b.shuffle_vector(products, undefined, places))
        return sums

    def _call(self, name: str, returns: Any, args: Sequence[Any]) -> Any:
        kind = ir.FunctionType(returns, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    # ---- weights of few bits

    def quads(self, address: Any, bits: int, first: int, count: int) -> list[Any]:
        """`count` quads of codes, from quad `first` (a multiple of what one load holds) of a panel that starts at `address`.

        Layout, in units of one vector of bytes: 8 bits: a quad; 4 bits: quads 2i (low half) and 2i + 1; 2 bits: quads 4i … 4i + 3 from the
        low bits up; 3 bits: eight quads as two vectors of their low two bits, then one of their high bits, quad 8i + j in bit j.
        """
        size = 4 * self.panel
        if bits == 3:
            return [q for i in range(first, first + count, 8) for q in self._three(address, i // 8 * 3 * size)]
        each = 8 // bits
        out = []
        for i in range(first, first + count, each):
            packed = self.load(address, i // each * size, self.bytes)
            for j in range(each):
                shifted = self.shift_right(packed, j * bits)
                out.append(shifted if bits == 8 else self.mask(shifted, (1 << bits) - 1))
        return out

    def tops(self, address: Any, bits: int, first: int, count: int) -> list[Any]:
        """Any quads as signed bytes, (code - 2^(bits-1)) · 2^(8-bits): the code at the top of its byte, its highest bit turned over."""
        size, keep = 4 * self.panel, 256 - (1 << (8 - bits))
        if bits == 8:
            return self.quads(address, bits, first, count)
        if bits == 3:
            return [self._top_three(address, q // 8 * 3 * size, q % 8) for q in range(first, first + count)]
        out, turned, each = [], {4: 0x88, 2: 0xAA}[bits], 8 // bits
        for q in range(first, first + count):
            packed = self.b.xor(self.load(address, q // each * size, self.bytes), self.fill(self.bytes, turned))
            out.append(self.mask(self.shift_left(packed, 8 - bits - q % each * bits), keep))
        return out

    def _top_three(self, address: Any, offset: int, j: int) -> Any:
        size, at = 4 * self.panel, 5 - j % 4 * 2
        low = self.load(address, offset + j // 4 * size, self.bytes)
        high = self.b.xor(self.load(address, offset + 2 * size, self.bytes), self.fill(self.bytes, 0xFF))
        two = self.mask(self.shift_left(low, at) if at > 0 else self.shift_right(low, -at), 0x60)
        return self.b.or_(two, self.mask(self.shift_left(high, 7 - j), 0x80))

    # ---- weights looked up

    def tables(self, address: Any, own: bool) -> list[Any]:
        """What `lookup` takes: 16 bytes in each 128 bits of a vector; with tables of their `own`, four, those of rows j, 4 + j, 8 + j … in vector j."""
        sixteen = ir.VectorType(I8, 16)
        if own:
            return [self.load(address, 4 * self.rows * j, self.bytes) for j in range(4)]
        places = ir.Constant(ir.VectorType(I32, 4 * self.rows), list(range(16)) * (self.rows // 4))
        return [self.b.shuffle_vector(self.load(address, 0, sixteen), ir.Constant(sixteen, ir.Undefined), places)]

    def lookup(self, tables: list[Any], codes: Any, bits: int) -> Any:
        """A quad of codes below 2^bits → the bytes they stand for."""
        if self.target == "plain":
            return self._chosen(self._entries(tables, bits), codes)
        if self.target.startswith("x86"):
            name = "llvm.x86.avx512.pshuf.b.512" if self.rows == 16 else "llvm.x86.avx2.pshuf.b"
            found = self._call(name, self.bytes, [tables[0], codes])
            for j, table in enumerate(tables[1:], 1):
                mine = ir.Constant(ir.VectorType(I1, 4 * self.rows), [i // 4 % 4 == j for i in range(4 * self.rows)])
                found = self.b.select(mine, self._call(name, self.bytes, [table, codes]), found)
            return found
        if len(tables) > 1:
            codes = self.b.or_(codes, ir.Constant(self.bytes, [16 * (i // 4) for i in range(16)]))
        return self._call(f"llvm.aarch64.neon.tbl{len(tables)}.v16i8", self.bytes, [*tables, codes])

    def tables_of_trits(self, address: Any) -> list[Any]:
        """What `trits` takes: the 32 bytes at an address, again and again in one vector, or the first 16 in one and the others in another."""
        if not permutes(self.target):
            return [self.tables(self.b.add(address, ir.Constant(I64, at)), False)[0] for at in (0, 16)]
        whole = self.load(address, 0, ir.VectorType(I8, 32))
        return [
            self.b.shuffle_vector(whole, ir.Constant(whole.type, ir.Undefined), ir.Constant(ir.VectorType(I32, 64), list(range(32)) * 2))
        ]

    def trits(self, tables: list[Any], codes: Any) -> Any:
        """A quad of codes of 5 bits, with more above them, → the bytes they stand for."""
        if self.target == "plain":
            return self._chosen(self._entries(tables, 5), codes)
        if self.target.startswith("arm"):
            return self._call("llvm.aarch64.neon.tbl2.v16i8", self.bytes, [*tables, self.mask(codes, 31)])
        if len(tables) == 1:
            return self._call("llvm.x86.avx512.permvar.qi.512", self.bytes, [tables[0], codes])
        name = "llvm.x86.avx512.pshuf.b.512" if self.rows == 16 else "llvm.x86.avx2.pshuf.b"
        low, high = (self._call(name, self.bytes, [table, self.mask(codes, 15)]) for table in tables)
        return self.b.select(self.b.icmp_unsigned("!=", self.mask(codes, 16), self.zero(self.bytes)), high, low)

    def fives(self, address: Any, first: int, count: int) -> list[Any]:
        """Codes of 5 bits, with more above them, from `first` of eight that are stored in five vectors: five at the bottom of their bytes, three in
        the bits above, three of the first, two (of three) of the second, and so on; the last has the two that are left."""

        def part(i: int, shift: int, keep: int) -> Any:
            return self.mask(self.shift_right(self.load(address, 4 * self.panel * i, self.bytes), shift), keep)

        out = []
        for j in range(first, first + count):
            if j < 5:
                out.append(self.load(address, 4 * self.panel * j, self.bytes))
            elif j < 7:
                out.append(self.b.or_(part(2 * (j - 5), 5, 7), part(2 * (j - 5) + 1, 2, 24)))
            else:
                out.append(self.b.or_(part(4, 5, 7), self.b.or_(part(1, 4, 8), part(3, 3, 16))))
        return out

    def _entries(self, tables: list[Any], bits: int) -> list[Any]:
        """Entry e of every row's table, 2^bits vectors, as `codes` lie in a quad."""
        count, joined = 4 * self.rows, tables[0]
        if bits == 5:
            joined = self._side_by_side(*tables)
            return [self._everywhere(joined, e // 16 * count + e % 16, count) for e in range(32)]
        if len(tables) > 1:
            pairs = [self._side_by_side(*tables[i : i + 2]) for i in (0, 2)]
            joined = self._side_by_side(*pairs)
        out = []
        for e in range(1 << bits):
            rows = [i // 4 for i in range(count)]
            places = [(r % 4 * count + r // 4 * 16 if len(tables) > 1 else 0) + e for r in rows]
            kind = ir.Constant(ir.VectorType(I32, count), places)
            out.append(self.b.shuffle_vector(joined, ir.Constant(joined.type, ir.Undefined), kind))
        return out

    def _everywhere(self, x: Any, place: int, count: int) -> Any:
        """One element in `count` lanes."""
        return self.b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), ir.Constant(ir.VectorType(I32, count), [place] * count))

    def _side_by_side(self, x: Any, y: Any) -> Any:
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 2 * x.type.count), list(range(2 * x.type.count))))

    def _chosen(self, entries: list[Any], codes: Any) -> Any:
        """By one bit of the codes after the other, in any vector unit."""
        bit = 1
        while len(entries) > 1:
            odd = self.b.icmp_unsigned("!=", self.mask(codes, bit), self.zero(codes.type))
            entries = [self.b.select(odd, y, x) for x, y in zip(entries[::2], entries[1::2])]  # noqa: B905 (Python 3.9)
            bit *= 2
        return entries[0]

    def _three(self, address: Any, offset: int) -> list[Any]:
        size = 4 * self.panel
        low = [self.load(address, offset + i * size, self.bytes) for i in range(2)]
        high = self.load(address, offset + 2 * size, self.bytes)
        out = []
        for j in range(8):
            two = self.mask(self.shift_right(low[j // 4], j % 4 * 2), 3)
            one = self.mask(self.shift_left(high, 2 - j) if j < 2 else self.shift_right(high, j - 2), 4)
            out.append(self.b.or_(two, one))
        return out
