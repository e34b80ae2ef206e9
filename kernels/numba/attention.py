"""Heads of queries, keys and values, and attention over keys and values that stay where they are. One function for each size of a head."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import ATTEND_ARGS, HEADS_ARGS

from .emitter import Emitter
from .simd import F32, I8

HIDDEN = -5e3
"""A mask below this hides."""


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


class Attend(Emitter):
    """Parts: the B · heads heads. Slots behind the last one that a row may see are not read."""

    def __init__(self, module: ir.Module, name: str, target: str, size: int, int8: bool) -> None:
        """`int8`: keys and values in slots are int8, with a scale each."""
        super().__init__(module, name, target, ATTEND_ARGS)
        self.size, self.whole, self.int8 = size, ir.VectorType(F32, size), int8

    def emit(self) -> None:
        a, b = self.a, self.b
        with self.loop(self.first, self.last) as part:
            batch, head = b.sdiv(part, a["heads"]), b.srem(part, a["heads"])
            kv = b.sdiv(part, a["shared"])
            scores = b.add(a["scores"], b.mul(part, self.times(b.add(a["slots"], a["tokens"]), 4)))
            cached = b.mul(kv, a["slots"])
            new = b.mul(b.mul(kv, a["tokens"]), self.number(4 * self.size))
            mask = b.add(a["mask"], b.add(b.mul(batch, a["mask_batch"]), b.mul(head, a["mask_head"])))
            with self.loop(self.number(0), a["n"]) as i:
                row = b.add(mask, b.mul(i, a["mask_row"]))
                q = self.s.load(a["q"], self.times(b.add(b.mul(part, a["n"]), i), 4 * self.size), self.whole)
                out = b.add(a["out"], b.add(b.mul(b.add(b.mul(batch, a["n"]), i), a["stride"]), self.times(head, 4 * self.size)))
                self._row(q, row, scores, cached, new, out)
        b.ret_void()

    def _row(self, q: Any, mask: Any, scores: Any, cached: Any, new: Any, out: Any) -> None:
        """scores = q · keys + mask; out = softmax(scores) · values."""
        a, b, s = self.a, self.b, self.s
        seen = self._seen(mask)
        new_scores, new_mask = (b.add(x, self.times(a["slots"], 4)) for x in (scores, mask))
        top = self.variable(F32)
        b.store(self.real(-3e38), top)
        for keys, count, into, where in (
            (self._held("key", cached), seen, scores, mask),
            ((b.add(a["new_keys"], new), None), a["tokens"], new_scores, new_mask),
        ):
            self._scores(q, keys, count, into, where, top)
        total, mixed = self.variable(F32), self.variable(self.whole)
        b.store(self.real(0.0), total)
        b.store(s.zero(self.whole), mixed)
        most = b.load(top)
        for values, count, into in (
            (self._held("value", cached), seen, scores),
            ((b.add(a["new_values"], new), None), a["tokens"], new_scores),
        ):
            self._powers(into, count, most, total)
            with self.loop(self.number(0), count) as t:
                value, scale = self._vector(values, t)
                weight = s.load(into, self.times(t, 4), F32)
                weight = weight if scale is None else b.fmul(weight, scale)
                b.store(s.fma(s.spread(weight, self.size), value, b.load(mixed)), mixed)
        s.store(b.fmul(b.load(mixed), s.spread(b.fdiv(self.real(1.0), b.load(total)), self.size)), out, 0)

    def _held(self, kind: str, first: Any) -> tuple[Any, Any]:
        """The addresses of the keys or values in slots from number `first` on, and of their scales or None."""
        a, b = self.a, self.b
        width = self.size if self.int8 else 4 * self.size
        vectors = b.add(a[kind + "s"], self.times(first, width))
        return vectors, b.add(a[kind + "_scales"], self.times(first, 4)) if self.int8 else None

    def _vector(self, held: tuple[Any, Any], t: Any) -> tuple[Any, Any]:
        """Number t of them, in float32, and its scale or None."""
        vectors, scales = held
        if scales is None:
            return self.s.load(vectors, self.times(t, 4 * self.size), self.whole), None
        codes = self.s.load(vectors, self.times(t, self.size), ir.VectorType(I8, self.size))
        return self.b.sitofp(codes, self.whole), self.s.load(scales, self.times(t, 4), F32)

    def _seen(self, mask: Any) -> Any:
        """Slots up to the last that is not hidden."""
        b, left = self.b, self.variable(ir.IntType(64))
        b.store(self.a["slots"], left)
        function = b.function
        head, look, less, done = (function.append_basic_block(n) for n in ("seen", "look", "less", "found"))
        b.branch(head)
        b.position_at_end(head)
        count = b.load(left)
        b.cbranch(b.icmp_signed(">", count, self.number(0)), look, done)
        b.position_at_end(look)
        hidden = b.fcmp_ordered("<", self.s.load(mask, self.times(b.sub(count, self.number(1)), 4), F32), self.real(HIDDEN))
        b.cbranch(hidden, less, done)
        b.position_at_end(less)
        b.store(b.sub(count, self.number(1)), left)
        b.branch(head)
        b.position_at_end(done)
        return b.load(left)

    def _scores(self, q: Any, keys: tuple[Any, Any], count: Any, scores: Any, mask: Any, top: Any) -> None:
        b, s = self.b, self.s
        with self.loop(self.number(0), count) as t:
            at4 = self.times(t, 4)
            key, scale = self._vector(keys, t)
            score = s.total(b.fmul(q, key))
            score = b.fadd(score if scale is None else b.fmul(score, scale), s.load(mask, at4, F32))
            s.store(score, scores, at4)
            most = b.load(top)
            b.store(b.select(b.fcmp_ordered(">", score, most), score, most), top)

    def _powers(self, scores: Any, count: Any, most: Any, total: Any) -> None:
        """Each score s becomes e^(s - most); `total` grows by them."""
        b, s = self.b, self.s
        whole = b.mul(b.sdiv(count, self.number(s.rows)), self.number(s.rows))
        for first, last, kind in ((self.number(0), whole, s.floats), (whole, count, ir.VectorType(F32, 1))):
            with self.loop(first, last, kind.count) as t:
                at4 = self.times(t, 4)
                power = s.exp(b.fsub(s.load(scores, at4, kind), s.spread(most, kind.count)))
                s.store(power, scores, at4)
                b.store(b.fadd(b.load(total), s.total(power)), total)


def attention_module(target: str, size: int) -> ir.Module:
    """`heads`, `heads_turned`, `heads_normed`, `heads_normed_turned`, `attend`, `attend_int8` for heads of `size` floats, an even number."""
    module = ir.Module(f"attention-{target}-{size}")
    for normed in (False, True):
        for turned in (False, True):
            Heads(module, "heads" + "_normed" * normed + "_turned" * turned, target, size).emit(turned, normed)
    Attend(module, "attend", target, size, int8=False).emit()
    Attend(module, "attend_int8", target, size, int8=True).emit()
    return module


ATTENTION = ("heads", "heads_turned", "heads_normed", "heads_normed_turned", "attend", "attend_int8")
