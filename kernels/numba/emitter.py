"""Functions in LLVM IR with one signature, `void kernel(const int64_t *args, int64_t first, int64_t last)`, written by these parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from .simd import F32, I64, Simd


class Emitter:
    """A function `void name(const int64_t *args, int64_t first, int64_t last)` being written; `a` holds its args by name."""

    def __init__(self, module: ir.Module, name: str, target: str, args: Sequence[str]) -> None:
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64, I64])
        function = ir.Function(module, kind, name)
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.s = Simd(self.b, target)
        table, self.first, self.last = function.args
        self.a: dict[str, Any] = {name: self.b.load(self.b.gep(table, [self.number(i)])) for i, name in enumerate(args)}

    def number(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def times(self, x: Any, n: int) -> Any:
        return self.b.mul(x, self.number(n))

    def add(self, *values: Any) -> Any:
        total = values[0]
        for v in values[1:]:
            total = self.b.add(total, v if not isinstance(v, int) else self.number(v))
        return total

    @contextmanager
    def loop(self, first: Any, last: Any, step: int = 1) -> Iterator[Any]:
        """The counter, from `first` while it is below `last`."""
        b, function = self.b, self.b.function
        head, body, done = (function.append_basic_block(n) for n in ("head", "body", "done"))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(first, before)
        b.cbranch(b.icmp_signed("<", index, last), body, done)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, self.number(step)), b.block)
        b.branch(head)
        b.position_at_end(done)

    @contextmanager
    def whilst(self, *conditions: Callable[[], Any]) -> Iterator[None]:
        """As long as all conditions hold; one is looked at only where those before it hold."""
        b, function = self.b, self.b.function
        head, done = function.append_basic_block("while"), function.append_basic_block("over")
        b.branch(head)
        b.position_at_end(head)
        for condition in conditions:
            held = function.append_basic_block("held")
            b.cbranch(condition(), held, done)
            b.position_at_end(held)
        yield
        b.branch(head)
        b.position_at_end(done)

    def variable(self, kind: Any) -> Any:
        """Room for one vector; LLVM keeps it in a register."""
        with self.b.goto_entry_block():
            return self.b.alloca(kind)

    def least(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def store_zero(self, *variables: Any) -> None:
        for v in variables:
            self.b.store(self.s.zero(self.s.floats), v)

    def finish(self, y: Any, at: Any, m: Any) -> None:
        """y, lanes of row `m` from byte `at` on, + bias + residual (each where its arg is not 0) → out."""
        s, b, a = self.s, self.b, self.a
        place = b.add(b.mul(m, a["stride"]), at)
        for name, where in (("bias", at), ("residual", place)):
            with_it = self.variable(s.floats)
            b.store(y, with_it)
            with b.if_then(b.icmp_signed("!=", a[name], self.number(0))):
                b.store(b.fadd(y, s.load(a[name], where, s.floats)), with_it)
            y = b.load(with_it)
        s.store(y, a["out"], place)

    def real(self, value: float) -> Any:
        return ir.Constant(F32, value)

    def lanes(self, first: Any, count: Any, body: Callable[[Any], None]) -> None:
        """`body(offset in bytes)` for each vector of `count` floats, a multiple of the lanes."""
        with self.loop(first, count, self.s.rows) as k:
            body(self.times(k, 4))
