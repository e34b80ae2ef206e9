"""The inner loops of y = x · Wᵀ without the weights that are zero (`panels.SparsePanels`), in LLVM IR.

N of M: inputs are brought to the weights. The 16 inputs of half a block lie in one vector (again and again, where it is longer), the places
that are stored with the weights say which of them each weight meets, and one shuffle of bytes puts them there: a dot product does the work of
four columns that stay, in place of four columns. Blocks: a product over those alone that are kept.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import KEPT_ARGS
from edgesdk.kernels.panels import BLOCK
from edgesdk.kernels.patterns import BLOCKS, PATTERNS, place_bits, unit

from .folded import LARGEST, MOST, ROWS, Folded
from .products import NEAR, Product, wide
from .simd import I8, I16, I32, I64, VNNI

WINDOW = 16
"""Columns out of which a shuffle chooses."""
AHEAD = 4096
"""Bytes by which a GEMV of n of m fetches weights before they are needed."""
TILE = {"x86-avx512vnni": ((8, 4, 2, 1), (4, 2, 1)), "x86-avxvnni": ((8, 4, 2, 1), (4, 2, 1)), "x86-avx2": ((8, 4, 2, 1), (4, 2, 1))}
"""Target → rows of inputs of a GEMM's tile, where a row has one scale, and where blocks have."""
ALONE = {"x86-avx512vnni": (12, 6, 4, 1), "x86-avxvnni": (6, 4, 1), "x86-avx2": (4, 1)}
"""The same over blocks, whose GEMM works on one panel at a time: no other has the same."""


class Pattern(Product):
    """Of n of m."""

    def __init__(self, module: ir.Module, name: str, target: str, bits: int, per_block: bool, pattern: str) -> None:
        super().__init__(module, name, target, bits, per_block, False)
        n, m = PATTERNS[pattern]
        self.n, self.m, self.unit, self.place_bits = n, m, unit(bits, n, m), place_bits(m)
        self.signed = True
        self.small = bits == 4 and target == "x86-avx2"  # whose products of bytes, two of them added, must fit 16 bits
        self.vectors = WINDOW * n // m // 4  # of half a block
        self.sized(bits)

    def sized(self, bits: int) -> None:
        """Bytes of a unit, and of the codes before its places."""
        size = 2 * self.unit * self.vectors * 4 * self.s.rows
        self.bits, self.values_bytes, self.block_bytes = bits, size * bits // 8, size * (bits + self.place_bits) // 8

    # ---- parts

    def inputs(self, q: Any, first: int) -> Any:
        """16 inputs, as often as they fit a vector (once on "plain")."""
        s = self.s
        x = s.load(q, first, ir.VectorType(I8, WINDOW))
        copies = 4 * s.rows // WINDOW if s.target.startswith("x86") else 1
        return s.b.shuffle_vector(
            x, ir.Constant(x.type, ir.Undefined), ir.Constant(ir.VectorType(I32, WINDOW * copies), list(range(WINDOW)) * copies)
        )

    def quad(self, vector: int, byte: int) -> int:
        """The first column, of half a block, that a stored place counts from."""
        return (4 * (vector % self.vectors) + byte) // self.n * self.m if self.m < WINDOW else 0

    def places(self, at: Any, vector: int) -> Any:
        """Which of 16 inputs each weight of a vector meets; on "plain" which of m."""
        s, each = self.s, 8 // self.place_bits
        packed = s.load(at, self.values_bytes + vector // each * 4 * s.rows, s.bytes)
        found = s.mask(s.shift_right(packed, vector % each * self.place_bits), self.m - 1)
        if s.target == "plain" or self.m == WINDOW:
            return found
        return s.b.or_(found, ir.Constant(s.bytes, [self.quad(vector, i % 4) for i in range(4 * s.rows)]))

    def chosen(self, x: Any, places: Any, vector: int) -> Any:
        """The inputs that a vector's weights meet, as `Simd.dot` takes them."""
        s, t = self.s, self.s.target
        if t == "x86-avx512vnni":
            return s._call("llvm.x86.avx512.pshuf.b.512", s.bytes, [x, places])
        if t.startswith("x86"):
            return s._call("llvm.x86.avx2.pshuf.b", s.bytes, [x, places])
        if t.startswith("arm"):
            return s._call("llvm.aarch64.neon.tbl1.v16i8", s.bytes, [x, places])
        b, undefined = s.b, ir.Constant(x.type, ir.Undefined)
        found = []
        for k in range(self.m):
            columns = [self.quad(vector, i % 4) + k for i in range(4 * s.rows)]
            found.append(b.shuffle_vector(x, undefined, ir.Constant(ir.VectorType(I32, 4 * s.rows), columns)))
        for bit in range(self.place_bits):
            odd = b.icmp_unsigned("!=", s.mask(places, 1 << bit), s.zero(s.bytes))
            found = [b.select(odd, two, one) for one, two in zip(found[::2], found[1::2])]  # noqa: B905 (Python 3.9)
        return found[0]

    @property
    def top(self) -> bool:
        return super().top and not self.small

    def weights(self, at: Any, vector: int) -> Any:
        """A vector of codes, their middle taken off."""
        s = self.s
        if not self.small:
            return s.tops(at, self.bits, vector, 1)[0]
        packed = s.load(at, vector // 2 * 4 * s.rows, s.bytes)
        return s.b.sub(s.mask(s.shift_right(packed, vector % 2 * 4), 15), s.fill(s.bytes, 8))

    def product(self, total: Any, weights: Any, inputs: Any) -> Any:
        """`Simd.dot` of inputs that are not the same in every row."""
        s, b = self.s, self.s.b
        if s.target != "x86-avx2":
            return s.dot(total, weights, inputs, True)
        words = ir.VectorType(I16, 2 * s.rows)
        if self.small:
            pairs = s._call("llvm.x86.avx2.pmadd.ub.sw", words, [inputs, weights])
            return b.add(total, s._call("llvm.x86.avx2.pmadd.wd", s.ints, [pairs, s.fill(words, 1)]))
        halves = [(b.sext(s.part(weights, at, 16), words), b.zext(s.part(inputs, at, 16), words)) for at in (0, 16)]
        found = s._call("llvm.x86.avx2.phadd.d", s.ints, [s._call("llvm.x86.avx2.pmadd.wd", s.ints, pair) for pair in halves])
        return b.add(total, b.shuffle_vector(found, found, ir.Constant(s.ints, [0, 1, 4, 5, 2, 3, 6, 7])))  # rows lay in that order

    def blocks_of(self, u: Any) -> list[Any]:
        """The blocks of a unit; where the last one is not there, one that is: its weights are zero."""
        found = [self.add(self.times(u, self.unit), j) for j in range(self.unit)]
        return [g if j == 0 else self.least(g, self.b.sub(self.a["blocks"], self.number(1))) for j, g in enumerate(found)]

    def units(self) -> Any:
        return self.b.sdiv(self.add(self.a["blocks"], self.unit - 1), self.number(self.unit))

    def scale_at(self, panel: dict[str, Any], u: Any, j: int) -> Any:
        return self.scale(panel, self.add(self.times(u, self.unit), j))

    # ---- functions

    def gemv(self) -> None:
        s, b = self.s, self.b
        kind = s.floats if self.per_block else s.ints
        whole = self.variable(kind)
        units = self.units()
        with self.loop(self.first, self.last) as p:
            panel = self.panel(p)
            b.store(s.zero(kind), whole)
            with self.loop(self.number(0), units) as u:
                at = b.add(panel["codes"], self.times(u, self.block_bytes))
                for line in range(0, self.block_bytes, 64):
                    s.prefetch(at, AHEAD + line)
                for j, g in enumerate(self.blocks_of(u)):
                    q, _ = self.q_at(g, self.number(0))
                    total = s.zero(s.ints)
                    for i in range(2 * self.vectors):
                        vector = 2 * self.vectors * j + i
                        x = self.chosen(self.inputs(q, i // self.vectors * WINDOW), self.places(at, vector), vector)
                        total = self.product(total, self.weights(at, vector), x)
                    if self.per_block:
                        b.store(s.fma(s.to_float(total), self.scale_at(panel, u, j), b.load(whole)), whole)
                    else:
                        b.store(b.add(b.load(whole), total), whole)  # a block's products do not wait for the last one's
            value = b.load(whole) if self.per_block else b.fmul(s.to_float(b.load(whole)), self.scale(panel, None))
            self.write(value, panel, self.number(0))
        b.ret_void()

    def tiles(self) -> tuple[int, ...]:
        return TILE.get(self.s.target, ((4, 2, 1), (4, 2, 1)))[self.per_block]

    def gemm(self) -> None:
        many = wide(self.s.target)
        with self.loop(self.first, self.last) as group:
            panels = [self.panel(self.add(self.times(group, many), i)) for i in range(many)]
            self.over_rows(self.tiles(), panels)
        self.b.ret_void()

    def _tile(self, panels: list[dict[str, Any]], m: Any, tile: int) -> None:
        s, b = self.s, self.b
        kind = s.floats if self.per_block else s.ints
        sums = [[self.variable(kind) for _ in panels] for _ in range(tile)]
        for v in (v for row in sums for v in row):
            b.store(s.zero(kind), v)
        with self.loop(self.number(0), self.units()) as u:
            codes = [b.add(p["codes"], self.times(u, self.block_bytes)) for p in panels]
            for at in codes:
                self.fetch(at, len(panels))
            for j, g in enumerate(self.blocks_of(u)):
                q, _ = self.q_at(g, m)
                values = [[s.zero(s.ints) if self.per_block else b.load(v) for v in row] for row in sums]
                for i in range(2 * self.vectors):
                    self._vector(values, codes, q, 2 * self.vectors * j + i, i // self.vectors * WINDOW)
                scales = [self.scale_at(p, u, j) for p in panels] if self.per_block else []
                for row, new in zip(sums, values):  # noqa: B905 (Python 3.9)
                    for k, (v, value) in enumerate(zip(row, new)):  # noqa: B905
                        b.store(s.fma(s.to_float(value), scales[k], b.load(v)) if self.per_block else value, v)
        for k, p in enumerate(panels):
            for i in range(tile):
                value = b.load(sums[i][k])
                self.write(value if self.per_block else b.fmul(s.to_float(value), self.scale(p, None)), p, self.add(m, i))

    def fetch(self, at: Any, panels: int) -> None:
        """What comes next of a panel, and of the next group's."""
        following = self.b.add(at, self.times(self.a["panel_bytes"], panels))
        for line in range(0, self.block_bytes, 64):
            self.s.prefetch(at, NEAR + line)
            self.s.prefetch(following, line, near=2)

    def _vector(self, values: list[list[Any]], codes: list[Any], q: Any, vector: int, first: int) -> None:
        """One vector of weights of each panel, and all rows of inputs."""
        places = [self.places(at, vector) for at in codes]
        weights = [self.weights(at, vector) for at in codes]
        for i, row in enumerate(values):
            x = self.inputs(q, BLOCK * i + first)
            values[i] = [self.product(v, weights[k], self.chosen(x, places[k], vector)) for k, v in enumerate(row)]


class _Bytes(Pattern):
    """The GEMM over weights that were folded: int8 with one scale a row."""

    def __init__(self, whole: Pattern) -> None:
        self.__dict__.update(whole.__dict__)
        self.sized(8)
        self.per_block, self.scale_kind = False, self.s.floats

    def scale(self, panel: dict[str, Any], g: Any) -> Any:
        return self.b.load(panel["step"])

    def factors(self, panel: dict[str, Any]) -> tuple[Any, Any]:
        return self.b.load(panel["row_scale"]), self.b.load(panel["sums"])

    def fetch(self, at: Any, panels: int) -> None:
        """Nothing: it was written just now."""


class FoldedPattern(Pattern, Folded):
    """The GEMM of a form whose blocks have scales: over many rows of inputs they are multiplied into the weights first (`folded`)."""

    def gemm(self) -> None:
        b = self.b
        many = b.icmp_signed(">=", self.a["m"], self.number(ROWS[False]))
        fits = b.icmp_signed("<=", self.a["blocks"], self.number(MOST // BLOCK))
        with b.if_then(b.and_(many, fits)):
            self._groups()
            b.ret_void()
        Pattern.gemm(self)

    def _groups(self) -> None:
        s, b, many, inner = self.s, self.b, wide(self.s.target), _Bytes(self)
        size = self.times(self.units(), inner.block_bytes)
        place = b.alloca(ir.ArrayType(I8, 64), size=b.udiv(self.add(self.times(size, many), 63), self.number(64)))
        place.align = 64
        room = b.ptrtoint(place, I64)
        kept = [{n: self.variable(s.floats) for n in ("step", "row_scale", "sums")} for _ in range(many)]
        with self.loop(self.first, self.last) as group:
            panels = []
            for i in range(many):
                panel, at = self.panel(self.add(self.times(group, many), i)), self.add(room, self.times(size, i))
                self._fold_units(panel, at, kept[i], inner)
                panels.append({**panel, **kept[i], "codes": at})
            inner.over_rows(inner.tiles(), panels)

    def _fold_units(self, panel: dict[str, Any], room: Any, kept: dict[str, Any], inner: Pattern) -> None:
        """A panel's weights as int8, and Σ of them; their places as they are."""
        s, b, vector = self.s, self.b, 4 * self.s.rows
        total = self.variable(s.ints)
        b.store(s.zero(s.ints), total)
        step = b.fdiv(self._most(panel), ir.Constant(s.floats, [LARGEST] * s.rows))
        inverse = b.fdiv(ir.Constant(s.floats, [32768.0] * s.rows), step)
        with self.loop(self.number(0), self.units()) as u:
            at, to = b.add(panel["codes"], self.times(u, self.block_bytes)), b.add(room, self.times(u, inner.block_bytes))
            for line in range(0, self.block_bytes, 64):
                s.prefetch(at, AHEAD + line)
            for j in range(self.unit):
                factor = self._pairs(b.fptosi(s.rounded(b.fmul(self.scale_at(panel, u, j), inverse)), s.ints))
                for i in range(2 * self.vectors * j, 2 * self.vectors * (j + 1)):
                    folded = self._times_scale(self.weights(at, i), factor, None)
                    s.store(folded, to, vector * i)
                    b.store(s.dot(b.load(total), folded, s.fill(s.ints, 0x01010101), True), total)
            for place in range(0, self.block_bytes - self.values_bytes, vector):
                s.store(s.load(at, self.values_bytes + place, s.bytes), to, inner.values_bytes + place)
        row_scale, _ = self.factors(panel)
        b.store(step, kept["step"])
        b.store(row_scale, kept["row_scale"])
        b.store(b.fmul(s.to_float(b.load(total)), b.fmul(step, row_scale)), kept["sums"])


class Kept(Product):
    """Over the blocks that are kept."""

    def __init__(self, module: ir.Module, name: str, target: str, bits: int, per_block: bool, zeros: bool) -> None:
        super().__init__(module, name, target, bits, per_block, zeros)
        table = self.b.function.args[0]
        for more in ("starts", "kept"):
            self.a[more] = self.b.load(self.b.gep(table, [self.number(KEPT_ARGS.index(more))]))

    def panel(self, p: Any) -> dict[str, Any]:
        s, b, a = self.s, self.b, self.a
        start, stop = (b.sext(s.load(a["starts"], self.add(self.times(p, 4), more), I32), I64) for more in (0, 4))
        found = super().panel(p)
        self.kept = b.add(a["kept"], self.times(start, 4))
        found |= {"codes": b.add(a["codes"], self.times(start, self.block_bytes)), "count": b.sub(stop, start)}
        if self.per_block:
            each = s.rows * (4 if self.scale_kind == s.floats else 2)
            found |= {"scales": b.add(a["scales"], self.times(start, each)), "zeros": b.add(a["zeros"], self.times(start, s.rows))}
        return found

    def blocks(self, panel: dict[str, Any]) -> Any:
        return panel["count"]

    def q_at(self, g: Any, m: Any) -> tuple[Any, Any]:
        return super().q_at(self.b.sext(self.s.load(self.kept, self.times(g, 4), I32), I64), m)

    def gemm(self) -> None:
        many = wide(self.s.target)
        with self.loop(self.times(self.first, many), self.times(self.last, many)) as p:
            self.over_rows(ALONE.get(self.s.target, (8, 4, 1)), [self.panel(p)])
        self.b.ret_void()


def sparse_module(target: str, bits: int, per_block: bool, zeros: bool, pattern: str) -> ir.Module:
    """`gemv` and `gemm` of one form of weights."""
    module = ir.Module(f"sparse-{target}-{bits}-{per_block}-{zeros}-{pattern}")
    for name in ("gemv", "gemm"):
        if pattern == BLOCKS:
            made: Product = Kept(module, name, target, bits, per_block, zeros)
        else:
            folds = per_block and bits == 4 and target in VNNI and name == "gemm"
            made = (FoldedPattern if folds else Pattern)(module, name, target, bits, per_block, pattern)
        made.gemv() if name == "gemv" else made.gemm()
    return module
