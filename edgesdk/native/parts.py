"""What a native program's methods are made of, while they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesdk.kernels.panels import Panels
from edgesdk.kernels.tape import Rounded, Rows, Tape


@dataclass(frozen=True)
class Weights:
    """Matrices that take the same inputs, and where each begins."""

    panels: Panels
    bias: Any
    first: int
    rows: int
    name: str


class Taken:
    """Rows as products take them: rounded when they are first asked for, by `first` if something comes before it."""

    def __init__(self, tape: Tape, rows: Rows, first: Callable[[int], Rounded] | None = None) -> None:
        self.tape, self.rows, self._first = tape, rows, first
        self._by: dict[int, Rounded] = {}
        self._turned: Rows | None = None

    def floats(self) -> Rows:
        """The rows themselves, behind what comes before them."""
        if self._first is not None:
            self.rounded(0)
        return self.rows

    def turned(self) -> Rows:
        """The rows as columns."""
        if self._turned is None:
            self._turned = self.tape.turn(self.floats())
        return self._turned

    def rounded(self, shift: int) -> Rounded:
        if shift not in self._by:
            first, self._first = self._first, None
            self._by[shift] = first(shift) if first is not None else self.tape.round(self.rows, shift)
        return self._by[shift]


@dataclass(frozen=True)
class Part:
    """Keys and values: arrays made here, or the numbers of inputs."""

    keys: Any
    values: Any
    tokens: int
    scales: tuple[str, str] | None = None  # of int8 keys and values


@dataclass(frozen=True)
class Reshaped:
    rows: Rows
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.rows.array, np.float32).reshape(self.shape)


def window(stack: dict[str, Any], layer: int) -> int:
    return int(stack["windows"][layer]) if stack["windows"] else 0


def wide(table: Any, out: Rows) -> Any:
    """A table whose rows are as long as those of `out`."""
    width = out.stride // 4
    return table if table.shape[1] == width else np.ascontiguousarray(np.pad(table, ((0, 0), (0, width - table.shape[1]))))
