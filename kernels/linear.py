"""A linear layer on panels: inputs rounded row by row, then gemv for one row and gemm for more."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesdk.packed import Code

from .library import LINEAR_ARGS, library
from .pack import pack
from .tape import Rows, Tape


class Linear:
    """y [M, rows] float32 = x [M, cols] float32 · Wᵀ (+ bias [rows]) (+ residual [M, rows]), weights as `code` gives them.

    Inputs are rounded to 8 bits, a row at a time with a zero of its own. Raises `panels.UnfitWeights`.
    """

    def __init__(self, code: Code, target: str, bias: Any = None, threads: int = 1) -> None:
        self.library, self.threads = library(target), threads
        self.panels = pack(code, self.library.lanes, self.library.together, self.library.half)
        self.bias = None
        if bias is not None:
            self.bias = np.zeros(len(self.panels.row_scale), np.float32)
            self.bias[: self.panels.rows] = bias
        self._rows = 0

    def __call__(self, x: Any, residual: Any = None) -> Any:
        if len(x) != self._rows:
            self._prepare(len(x))
        self._x.array[:] = x
        self._args[LINEAR_ARGS.index("residual")] = 0 if residual is None else self._residual.address
        if residual is not None:
            self._residual.array[:] = residual
        self.tape.run()
        return self._out.array.copy()

    def _prepare(self, rows: int) -> None:
        p, self._rows = self.panels, rows
        self.tape = Tape(self.library, self.threads)
        self._x: Rows = self.tape.room(rows, p.cols)
        self._out, self._residual = (self.tape.room(rows, p.rows) for _ in range(2))
        rounded = self.tape.round(self._x, self.library.shift_of(p.value_bits))
        self._args = self.tape.linear(p, rounded, self._out, bias=self.bias)
