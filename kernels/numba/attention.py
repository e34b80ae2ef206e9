"""Attention over keys and values that stay where they are. One function for each size of a head and form of what is in slots.

Some rows of queries go through the keys and values of their head together: each is read, and turned into float32, once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from edgesdk.kernels.attention import FORMS, ROWS
from edgesdk.kernels.library import ATTEND_ARGS
from edgesdk.sequence.card import groups

from .emitter import Emitter
from .products import halves
from .simd import F16, F32, I8, I16, I32, I64

HIDDEN = -5e3
"""A mask below this hides."""


@dataclass
class Row:
    """A row of queries: its mask, its room for scores, its output, and its queries' vectors; of int4 the sum of each group of them."""

    mask: Any
    scores: Any
    out: Any
    q: list[Any]
    sums: list[Any]
    top: Any
    total: Any
    least: list[Any]


@dataclass(frozen=True)
class Held:
    """Keys or values of one head: `form` of `FORMS`, addresses of the vectors and of what stands beside them, how many."""

    form: str
    vectors: Any
    scales: Any
    first: Any
    last: Any


class Attend(Emitter):
    """Parts: the B · heads heads. Slots before the first and behind the last one that the rows may see are not read."""

    def __init__(self, module: ir.Module, name: str, target: str, size: int, form: str) -> None:
        super().__init__(module, name, target, ATTEND_ARGS)
        self.size, self.form, self.target = size, form, target
        n, span = self.s.rows, size // 2 if form == "int4" else size
        self.pieces = [(first, min(n, begin + span - first)) for begin in range(0, size, span) for first in range(begin, begin + span, n)]
        self.groups = groups(size) if form == "int4" else 1

    def emit(self) -> None:
        a, b = self.a, self.b
        first, last, n = b.mul(self.first, a["n"]), b.mul(self.last, a["n"]), a["n"]
        together, at = b.mul(a["shared"], n), self.variable(I64)
        seen = b.add(a["slots"], a["tokens"])
        room = b.add(a["scores"], b.mul(self.first, self.times(seen, 4 * ROWS * self.groups)))
        b.store(first, at)
        with self.whilst(lambda: b.icmp_signed("<", b.load(at), last)):
            row = b.load(at)
            kv = b.sdiv(row, together)
            end = self.least(b.mul(b.add(kv, self.number(1)), together), last)
            b.store(end, at)
            count = ROWS
            while count:
                until = b.add(row, self.times(b.sdiv(b.sub(end, row), self.number(count)), count))
                with self.loop(row, until, count) as r:
                    self._rows([b.add(r, self.number(i)) for i in range(count)], kv, room)
                row, count = until, count // 2
        b.ret_void()

    def _rows(self, rows: list[Any], kv: Any, room: Any) -> None:
        a, b = self.a, self.b
        found = [self._row(r, b.add(room, self.times(b.add(a["slots"], a["tokens"]), 4 * i * self.groups))) for i, r in enumerate(rows)]
        begin, end = self._seen(found)
        cached, new = b.mul(kv, a["slots"]), b.mul(b.mul(kv, a["tokens"]), self.number(4 * self.size))
        keys, values = (
            (self._held(kind, cached, begin, end), Held("", b.add(a[f"new_{kind}s"], new), None, self.number(0), a["tokens"]))
            for kind in ("key", "value")
        )
        self._scores(found, keys[0], self.number(0))
        self._scores(found, keys[1], a["slots"])
        for row in found:
            most = self._highest(b.load(row.top))
            for held, before in zip(values, (self.number(0), a["slots"]), strict=True):
                self._powers(row, held, before, most)
        self._mix(found, values)

    def _row(self, r: Any, scores: Any) -> Row:
        a, b, s = self.a, self.b, self.s
        part, i = b.sdiv(r, a["n"]), b.srem(r, a["n"])
        batch, head = b.sdiv(part, a["heads"]), b.srem(part, a["heads"])
        mask = self.add(a["mask"], b.mul(batch, a["mask_batch"]), b.mul(head, a["mask_head"]), b.mul(i, a["mask_row"]))
        out = self.add(a["out"], b.mul(b.add(b.mul(batch, a["n"]), i), a["stride"]), self.times(head, 4 * self.size))
        q = b.add(a["q"], self.times(r, 4 * self.size))
        vectors = [self._wide(s.load(q, 4 * first, ir.VectorType(F32, count))) for first, count in self.pieces]
        sums = [s.total(self._sum([vectors[p] for p in pieces])) for pieces in self._by_group()] if self.form == "int4" else []
        top, total = self.variable(s.floats), self.variable(s.floats)
        least = [self.variable(s.floats) for _ in sums]
        b.store(s.spread(self.real(-3e38)), top)
        self.store_zero(total, *least)
        return Row(mask, scores, out, vectors, sums, top, total, least)

    def _by_group(self) -> list[list[int]]:
        """Numbers of the pieces of each group."""
        size = self.size // self.groups
        return [[p for p, (first, _) in enumerate(self.pieces) if first // size == g] for g in range(self.groups)]

    def _seen(self, rows: list[Row]) -> tuple[Any, Any]:
        """The slots from the first to behind the last that a row may see, to a vector of them."""
        b, s, n = self.b, self.s, self.s.rows
        begin, end = self.variable(I64), self.variable(I64)
        b.store(self.number(0), begin)
        b.store(self.a["slots"], end)

        def hidden(at: Any) -> Any:
            most = s.load(rows[0].mask, self.times(at, 4), s.floats)
            for row in rows[1:]:
                most = s.greater(most, s.load(row.mask, self.times(at, 4), s.floats))
            bits = b.bitcast(b.fcmp_unordered(">=", most, s.spread(self.real(HIDDEN))), ir.IntType(n))
            return b.icmp_unsigned("==", bits, ir.Constant(ir.IntType(n), 0))

        def more() -> Any:
            return b.icmp_signed("<=", b.add(b.load(begin), self.number(n)), b.load(end))

        with self.whilst(more, lambda: hidden(b.sub(b.load(end), self.number(n)))):
            b.store(b.sub(b.load(end), self.number(n)), end)
        with self.whilst(more, lambda: hidden(b.load(begin))):
            b.store(b.add(b.load(begin), self.number(n)), begin)
        nothing = b.and_(b.icmp_signed("==", b.load(end), self.number(0)), b.icmp_signed("==", self.a["tokens"], self.number(0)))
        return b.load(begin), b.select(nothing, self.a["slots"], b.load(end))

    # ---- what is in slots

    def _held(self, kind: str, first: Any, begin: Any, end: Any) -> Held:
        """The keys or values in slots from number `first` on."""
        a, b = self.a, self.b
        vectors = b.add(a[f"{kind}s"], self.times(first, self.size * FORMS[self.form] // 8))
        scales = {"int8": 4, "int4": 4 * self.groups}.get(self.form)
        return Held(self.form, vectors, None if scales is None else b.add(a[f"{kind}_scales"], self.times(first, scales)), begin, end)

    def _piece(self, held: Held, t: Any, piece: int) -> Any:
        """A piece of number t of them, in float32, before its scale; columns that are not there are 0."""
        b, s, (first, count) = self.b, self.s, self.pieces[piece]
        at = self.times(t, self.size * FORMS[held.form] // 8)
        bytes_, floats = ir.VectorType(I8, count), ir.VectorType(F32, count)
        if held.form == "":
            found = s.load(held.vectors, b.add(at, self.number(4 * first)), floats)
        elif held.form == "half":
            found = self._from_half(s.load(held.vectors, b.add(at, self.number(2 * first)), ir.VectorType(F16, count)))
        elif held.form == "int8":
            found = b.sitofp(s.load(held.vectors, b.add(at, self.number(first)), bytes_), floats)
        else:
            half = self.size // 2
            words = b.zext(s.load(held.vectors, b.add(at, self.number(first % half)), bytes_), ir.VectorType(I32, count))
            words = b.lshr(words, s.fill(words.type, 4)) if first >= half else b.and_(words, s.fill(words.type, 15))
            found = b.sitofp(words, floats)
        return self._wide(found)

    def _from_half(self, x: Any) -> Any:
        """float16 lanes as float32, also where the CPU has no instruction for it: the exponent by a product. What is infinite becomes 65536."""
        b, count = self.b, x.type.count
        if halves(self.target):
            return b.fpext(x, ir.VectorType(F32, count))
        words = ir.VectorType(I32, count)
        bits = b.zext(b.bitcast(x, ir.VectorType(I16, count)), words)
        size = b.bitcast(b.shl(b.and_(bits, self.s.fill(words, 0x7FFF)), self.s.fill(words, 13)), ir.VectorType(F32, count))
        size = b.fmul(size, self.s.spread(self.real(2.0**112), count))
        sign = b.shl(b.and_(bits, self.s.fill(words, 0x8000)), self.s.fill(words, 16))
        return b.bitcast(b.or_(b.bitcast(size, words), sign), size.type)

    def _beside(self, held: Held, t: Any, count: int) -> list[tuple[Any, Any]]:
        """Of `count` of them from t on the scale of each group, and the least value or None."""
        b, s = self.b, self.s
        floats = ir.VectorType(F32, count)
        if held.form == "int8":
            return [(s.load(held.scales, self.times(t, 4), floats), None)]
        if held.form != "int4":
            return []
        width = 2 * self.groups
        found = s.load(held.scales, self.times(t, 2 * width), ir.VectorType(F16, count * width))
        undefined = ir.Constant(found.type, ir.Undefined)

        def lane(i: int) -> Any:
            places = ir.Constant(ir.VectorType(I32, count), [j * width + i for j in range(count)])
            return self._from_half(b.shuffle_vector(found, undefined, places))

        return [(lane(2 * g), lane(2 * g + 1)) for g in range(self.groups)]

    # ---- vectors

    def _wide(self, x: Any) -> Any:
        """Filled up with zeros to a vector's lanes."""
        n, count = self.s.rows, x.type.count
        if count == n:
            return x
        places = ir.Constant(ir.VectorType(I32, n), [i if i < count else count for i in range(n)])
        return self.b.shuffle_vector(x, self.s.zero(x.type), places)

    def _sum(self, vectors: list[Any]) -> Any:
        total = vectors[0]
        for v in vectors[1:]:
            total = self.b.fadd(total, v)
        return total

    def _highest(self, x: Any) -> Any:
        return self.s.reduce("fmax", x)

    def _joined(self, x: Any, y: Any, level: int) -> Any:
        """Sums of neighbours, those of x before those of y: at the first two levels within each four lanes, then of whole fours.

        Of as many vectors as there are lanes, joined two by two, level by level, one is left, whose lanes are their sums in order.
        """
        b, n = self.b, self.s.rows
        sums = []
        for odd in (0, 1):
            if level < 2:
                places = [k for f in range(0, n, 4) for k in (f + odd, f + 2 + odd, n + f + odd, n + f + 2 + odd)]
            else:
                fours = [f for f in range(2 * n // 4) if f % 2 == odd]
                places = [4 * f + i for f in fours for i in range(4)]
            sums.append(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, n), places)))
        return b.fadd(*sums)

    # ---- scores

    def _scores(self, rows: list[Row], keys: Held, before: Any) -> None:
        """scores = q · keys · scale + mask, from number `before` on; `top` grows to the highest. Of slots the last ones that make no whole
        vector are taken with some before them again."""
        b, n = self.b, self.s.rows
        if keys.last is self.a["tokens"]:  # they are few
            self._singles(rows, keys, before)
            return
        with b.if_else(b.icmp_signed(">=", keys.last, self.number(n))) as (then, otherwise):
            with then, self.loop(keys.first, keys.last, n) as t:
                self._block(rows, keys, self.least(t, b.sub(keys.last, self.number(n))), before, n)
            with otherwise:
                self._singles(rows, keys, before)

    def _singles(self, rows: list[Row], keys: Held, before: Any) -> None:
        with self.loop(keys.first, keys.last) as t:
            self._block(rows, keys, t, before, 1)

    def _block(self, rows: list[Row], keys: Held, first: Any, before: Any, count: int) -> None:
        """`count` keys: one, or as many as a vector has lanes."""
        b, s = self.b, self.s
        groups = self._by_group() if keys.form == "int4" else [list(range(len(self.pieces)))]
        waiting: list[list[tuple[int, Any]]] = [[] for _ in range(len(rows) * len(groups))]
        for j in range(count):
            key = [self._piece(keys, b.add(first, self.number(j)), p) for p in range(len(self.pieces))]
            for i, row in enumerate(rows):
                for g, pieces in enumerate(groups):
                    found = b.fmul(row.q[pieces[0]], key[pieces[0]])
                    for p in pieces[1:]:
                        found = s.fma(row.q[p], key[p], found)
                    level, held = 0, waiting[i * len(groups) + g]
                    while held and held[-1][0] == level:
                        found, level = self._joined(held.pop()[1], found, level), level + 1
                    held.append((level, found))
        beside = self._beside(keys, first, count)
        at = self.times(b.add(before, first), 4)
        for i, row in enumerate(rows):
            sums = [waiting[i * len(groups) + g][0][1] for g in range(len(groups))]
            if count == 1:
                sums = [s.spread(s.total(x), 1) for x in sums]
            score = s.load(row.mask, at, sums[0].type)
            for g, x in enumerate(sums):
                scale, least = beside[g] if beside else (None, None)
                score = b.fadd(score, x) if scale is None else s.fma(x, scale, score)
                if least is not None:
                    score = s.fma(s.spread(row.sums[g], count), least, score)
            s.store(score, row.scores, at)
            most = score if count > 1 else s.spread(s.total(score))
            b.store(s.greater(most, b.load(row.top)), row.top)

    # ---- weights

    def _powers(self, row: Row, values: Held, before: Any, most: Any) -> None:
        """Each score s becomes e^(s - most), times the value's scale; `total` grows by the first, `least` by what the least values add."""
        b, s, n = self.b, self.s, self.s.rows
        count = b.sub(values.last, values.first)
        whole = b.add(values.first, self.times(b.sdiv(count, self.number(n)), n))
        room = self.times(b.add(self.a["slots"], self.a["tokens"]), 4)
        for first, last, kind in ((values.first, whole, s.floats), (whole, values.last, ir.VectorType(F32, 1))):
            with self.loop(first, last, kind.count) as t:
                at = self.times(b.add(before, t), 4)
                power = s.exp(b.fsub(s.load(row.scores, at, kind), s.spread(most, kind.count)))
                b.store(b.fadd(b.load(row.total), self._wide(power)), row.total)
                beside = self._beside(values, t, kind.count) or [(None, None)]
                for g in range(self.groups):
                    scale, least = beside[g] if g < len(beside) else beside[0]
                    weight = power if scale is None else b.fmul(power, scale)
                    s.store(weight, b.add(row.scores, self.times(room, g)), at)
                    if least is not None:
                        b.store(b.fadd(b.load(row.least[g]), self._wide(b.fmul(power, least))), row.least[g])

    def _mix(self, rows: list[Row], values: tuple[Held, Held]) -> None:
        """out = Σ weight · value / total, so many columns at a time that sums stay in registers."""
        b, s = self.b, self.s
        most = 24 if s.rows == 16 or self.target.startswith("arm") else 12
        each = max(1, most // len(rows))
        banks = 2 if 2 * len(rows) * min(each, len(self.pieces)) <= most else 1
        factors = [b.fdiv(self.real(1.0), s.total(b.load(row.total))) for row in rows]
        size = self.size // self.groups
        for first in range(0, len(self.pieces), each):
            pieces = list(range(first, min(first + each, len(self.pieces))))
            sums = [[[self.variable(s.floats) for _ in pieces] for _ in rows] for _ in range(banks)]
            self.store_zero(*(v for bank in sums for row in bank for v in row))
            for held, before in zip(values, (self.number(0), self.a["slots"]), strict=True):
                self._weighed(rows, held, before, pieces, sums)
            for i, row in enumerate(rows):
                for j, p in enumerate(pieces):
                    at, count = self.pieces[p]
                    total = self._sum([b.load(bank[i][j]) for bank in sums])
                    if row.least:
                        total = b.fadd(total, s.spread(s.total(b.load(row.least[at // size]))))
                    total = b.fmul(total, s.spread(factors[i]))
                    s.store(total if count == s.rows else s.part(total, 0, count), row.out, 4 * at)

    def _weighed(self, rows: list[Row], values: Held, before: Any, pieces: list[int], sums: list[Any]) -> None:
        b, s, banks = self.b, self.s, len(sums)
        room, size = self.times(b.add(self.a["slots"], self.a["tokens"]), 4), self.size // self.groups
        count = b.sub(values.last, values.first)
        whole = b.add(values.first, self.times(b.sdiv(count, self.number(banks)), banks))
        for first, last, used in ((values.first, whole, banks), (whole, values.last, 1))[: 2 if banks > 1 else 1]:
            with self.loop(first, last, used) as t:
                for bank in range(used):
                    at = b.add(t, self.number(bank))
                    value = [self._piece(values, at, p) for p in pieces]
                    for i, row in enumerate(rows):
                        weights = {g: self._weight(row, room, g, b.add(before, at)) for g in {self.pieces[p][0] // size for p in pieces}}
                        for j, p in enumerate(pieces):
                            place = sums[bank][i][j]
                            b.store(s.fma(weights[self.pieces[p][0] // size], value[j], b.load(place)), place)

    def _weight(self, row: Row, room: Any, group: int, t: Any) -> Any:
        return self.s.spread(self.s.load(self.b.add(row.scores, self.times(room, group)), self.times(t, 4), F32))


def attention_module(target: str, size: int, form: str) -> ir.Module:
    """`attend` for heads of `size` floats, an even number, over slots of a form of `FORMS`."""
    module = ir.Module(f"attention-{target}-{size}-{form}")
    Attend(module, "attend", target, size, form).emit()
    return module
