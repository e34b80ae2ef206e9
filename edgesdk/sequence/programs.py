"""A bundle's programs by what they are for: which one serves a length and a batch, and how often each ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .card import Card, SequenceError

Run = Callable[[str, Sequence[Any]], Sequence[Any]]
"""`run(method, arrays) → arrays`: a runner, a torch module, anything that answers."""


class Halt(Exception):
    """No further program is to be run: `reason` is "cancelled" or "max-time"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Programs:
    """The methods of `card` behind `run`. Before each call `watch()` may raise `Halt`."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self._run = card, run
        self.zeros: Callable[[Any, Any], Any] = getattr(
            getattr(run, "__self__", None), "zeros", np.zeros
        )  # a runner's own memory for caches
        self.watch: Callable[[], None] = lambda: None
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def role(self, role: str, rows: int | None = None, **exact: int) -> dict[str, dict[str, Any]]:
        """The methods of a role that have the sizes `exact`; with `rows`, of the batch that serves them best."""
        found = {n: m for n, m in self.card.methods.items() if m["role"] == role and all(m[k] == v for k, v in exact.items())}
        if rows is None or not found:
            return found
        batches = sorted({m["batch"] for m in found.values()})
        batch = next((b for b in batches if b >= rows), batches[-1])
        return {n: m for n, m in found.items() if m["batch"] == batch}

    def need(self, role: str, rows: int) -> dict[str, dict[str, Any]]:
        """The same, which must not be empty. Raises `SequenceError`."""
        found = self.role(role, rows)
        if not found:
            raise SequenceError(f"the bundle (layout {self.card.layout}) has no program with the role '{role}'", "build it again")
        return found

    def placed(self, array: Any) -> Any:
        """An array that programs read again and again, where its runner wants it."""
        if self.zeros is np.zeros:
            return array
        there = self.zeros(np.shape(array), np.asarray(array).dtype)
        there[...] = array
        return there

    def call(self, name: str, arrays: Sequence[Any]) -> list[Any]:
        """One call of one method. Raises `Halt` when it is time to end."""
        self.watch()
        start = time.perf_counter()
        out = list(self._run(name, arrays))
        self.calls[name] = self.calls.get(name, 0) + 1
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return out

    def call_rows(self, name: str, arrays: Sequence[Any]) -> list[Any]:
        """Arrays of any number of rows through a method of a fixed batch; missing rows are filled with the last one."""
        rows, batch = len(arrays[0]), self.card.methods[name]["batch"]
        parts = []
        for first in range(0, rows, batch):
            at = np.minimum(np.arange(first, first + batch), rows - 1)
            parts.append(self.call(name, arrays if rows == batch else [np.ascontiguousarray(a[at]) for a in arrays]))
        if len(parts) == 1:
            return [np.asarray(a)[:rows] for a in parts[0]]
        return [np.concatenate([p[i] for p in parts])[:rows] for i in range(len(parts[0]))]


def smallest(methods: dict[str, dict[str, Any]], size: str, length: int) -> str | None:
    """The method whose `size` is the smallest that holds `length`, or None."""
    fit = [(m[size], n) for n, m in methods.items() if m[size] >= length]
    return min(fit)[1] if fit else None


def largest(methods: dict[str, dict[str, Any]], size: str) -> int:
    return max((int(m[size]) for m in methods.values()), default=0)


def nearest(methods: dict[str, dict[str, Any]], size: str, length: int) -> str:
    """The same, or the largest one where none holds it."""
    return smallest(methods, size, length) or max((m[size], n) for n, m in methods.items())[1]
