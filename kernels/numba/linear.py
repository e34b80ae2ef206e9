"""A linear layer on panels: inputs rounded row by row, then products by the kernels of `products`, with threads over groups of panels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from edgesdk.kernels.panels import BLOCK, pack
from edgesdk.packed import Code

from .compiled import loaded, object_code
from .products import ARGS, halves, product_module, wide
from .rounding import rounding_module
from .simd import ROWS
from .steps import run

THREAD_BYTES = 1 << 17
"""Bytes of weights that are worth a thread of their own."""


@lru_cache(maxsize=64)
def product(target: str, bits: int, per_block: bool, zeros: bool) -> dict[str, int]:
    """The addresses of `gemv` and `gemm` for one form of weights, compiled for this process."""
    return loaded(object_code(product_module(target, bits, per_block, zeros), target), ["gemv", "gemm"], target)


@lru_cache(maxsize=8)
def rounding(target: str) -> int:
    return loaded(object_code(rounding_module(target), target), ["round"], target)["round"]


class Linear:
    """y [M, rows] float32 = x [M, cols] float32 · Wᵀ (+ bias [rows]) (+ residual [M, rows]), weights as `code` gives them.

    Inputs are rounded to 8 bits, a row at a time with a zero of its own. Raises `panels.UnfitWeights`.
    """

    def __init__(self, code: Code, target: str, bias: Any = None, threads: int = 1) -> None:
        self.target, self.threads = target, threads
        self.panels = pack(code, ROWS[target], wide(target), halves(target))
        p = self.panels
        self.width = p.panels * p.lanes
        self.kernels = product(target, p.bits, p.group != 0, p.zeros.size > 0)
        self.bias = None
        if bias is not None:
            self.bias = np.zeros(self.width, np.float32)
            self.bias[: p.rows] = bias
        self.shift = 128 if p.bits == 8 and target.startswith("x86") else 0
        self._room: dict[int, tuple[Any, ...]] = {}

    def __call__(self, x: Any, residual: Any = None) -> Any:
        p, rows = self.panels, len(x)
        if rows not in self._room:
            self._room = {rows: self._prepare(rows)}
        steps, taken, args, out, extra, *_ = self._room[rows]
        taken[:, : p.cols] = x
        if residual is not None:
            extra[:, : p.rows] = residual
        args[ARGS.index("residual")] = 0 if residual is None else extra.ctypes.data
        run(steps, self.threads)
        return out[:, : p.rows].copy()

    def _prepare(self, rows: int) -> tuple[Any, ...]:
        p = self.panels
        q = np.zeros((p.blocks, rows, BLOCK), np.uint8)
        q_sums, q_scale, q_zero = np.zeros((p.blocks, rows), np.int32), np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        out, extra = np.zeros((rows, self.width), np.float32), np.zeros((rows, self.width), np.float32)
        taken = np.zeros((rows, p.blocks * BLOCK), np.float32)
        numbers = (p.blocks, 4 * p.blocks * BLOCK, rows, self.shift)
        around = np.array([taken.ctypes.data, *numbers, *(a.ctypes.data for a in (q, q_sums, q_scale, q_zero))], np.int64)
        a: dict[str, Any] = {"q": q, "q_sums": q_sums, "q_scale": q_scale, "q_zero": q_zero, "out": out, "bias": self.bias}
        a |= {n: getattr(p, n) for n in ("codes", "scales", "zeros", "row_scale", "sums")}
        sizes = {"m": rows, "blocks": p.blocks, "stride": 4 * self.width, "residual": 0}
        sizes |= {
            "panel_bytes": p.codes.nbytes // p.panels,
            "scale_bytes": p.scales[0].nbytes,
            "zero_bytes": p.zeros[0].nbytes if p.zeros.size else 0,
        }
        args = np.array([sizes[n] if n in sizes else 0 if a[n] is None else a[n].ctypes.data for n in ARGS], np.int64)
        together = wide(self.target)
        count, each = (
            (p.panels, p.nbytes // p.panels) if rows == 1 else (p.panels // together, p.nbytes // p.panels * together * min(rows, 16))
        )
        steps = np.array(
            [
                [rounding(self.target), around.ctypes.data, rows, max(1, 65536 // p.cols)],
                [self.kernels["gemv" if rows == 1 else "gemm"], args.ctypes.data, count, max(1, THREAD_BYTES // each)],
            ],
            np.int64,
        )
        return steps, taken, args, out, extra, around, q, q_sums, q_scale, q_zero
