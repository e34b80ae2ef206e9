"""Weights in the forms that are no plain grids, for benchmarks: each rounded as well as its form allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgesdk.kernels.superblocks import super_blocks
from edgesdk.packed import Code


def any4(weights: Any) -> Code:
    """16 values a row of least square error (Lloyd's iterations from quantiles), as the method any4 stores long rows."""
    rows, cols = weights.shape
    ordered = np.sort(weights, 1)
    before = np.concatenate([np.zeros((rows, 1)), np.cumsum(ordered, 1, dtype=np.float64)], 1)
    tables = ordered[:, ((np.arange(16) + 0.5) / 16 * cols).astype(int)]
    q = np.zeros((rows, cols), np.uint8)
    for i in range(rows):
        table = tables[i].astype(np.float64)
        for _ in range(30):
            ends = np.concatenate([[0], np.searchsorted(ordered[i], (table[1:] + table[:-1]) / 2), [cols]])
            count = np.diff(ends)
            table = np.where(count > 0, np.diff(before[i, ends]) / np.maximum(count, 1), table)
        tables[i] = table.astype(np.float16)
        q[i] = np.searchsorted((tables[i, 1:] + tables[i, :-1]) / 2, weights[i])
    return Code("table", (rows, cols), (4, 0), (q, tables.astype(np.float16), np.zeros(0, np.float16)))


def ternary(weights: Any) -> Code:
    """-s, 0 and s, the s of each row that is best for the weights that are not 0."""
    size = -np.sort(-np.abs(weights), 1)
    total = np.cumsum(size, 1, dtype=np.float64)
    kept = np.argmax(total**2 / np.arange(1, size.shape[1] + 1), 1)[:, None]
    scale = (np.take_along_axis(total, kept, 1) / (kept + 1)).astype(np.float16)
    q = np.clip(np.rint(weights / scale.astype(np.float32)), -1, 1) + 1
    return Code("grid", weights.shape, (2, 0), (q.astype(np.uint8), scale, np.ones((1, 1), np.uint8)))


FORMS: dict[str, Callable[[Any], Code]] = {
    "super": super_blocks, "any4": any4, "ternary": ternary,
}  # fmt: skip
