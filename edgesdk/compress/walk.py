"""Compiled loops of entropy-constrained rounding: columns one after the other, each taking the points of least error + λ · bits.

Arrays are [cols, rows] (a column is contiguous), float32; indices are as `packed.matrices.Model` counts them. A point is an integer number of steps: in plain
rounding the index itself; on the trellis 2k in its states 0 and 1, and 2k - sign(k) in 2 and 3 (trellis-coded quantization: Marcellin and Fischer
1990; with zero in both halves as in Versatile Video Coding's dependent quantization). The trellis runs down each column, so that what is fed
back to the columns that are left is known as soon as a column is done.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from edgesdk.compress.compiled import compiled
from edgesdk.packed.matrices import TRELLIS

FOLLOWING = np.array(TRELLIS, np.int64)


_fast = partial(compiled, fastmath={"reassoc", "contract"})


@_fast
def _plain(target: Any, step: Any, weight: Any, context: Any, bits: Any, price: float, kept: Any, out: Any) -> None:
    """One column: out [rows] = points of least weight · (target - point · step)² + price · bits[context, |k|]."""
    most = bits.shape[1] - 1
    for r in range(len(target)):
        if kept.size and not kept[r]:
            out[r] = 0
            continue
        x = abs(target[r] / step[r])
        near = min(int(x + 0.5), most)
        best = near
        if price > 0 and near:
            scale, c, least = weight[r] * step[r] * step[r], context[r], np.inf
            for k in (near, near - 1, 0):
                cost = scale * (x - k) * (x - k) + price * bits[c, k]
                if cost < least:
                    best, least = k, cost
        out[r] = best if target[r] >= 0 else -best


@_fast
def _trellis(
    target: Any, step: Any, weight: Any, context: Any, bits: Any, price: float, kept: Any, out: Any, back: Any, following: Any
) -> None:
    """The same over all paths of the trellis (Viterbi); contexts count banks too: bits[context + bank, |k|]. `back` int32 [rows, 4, 2] is scratch."""
    rows, most = len(target), bits.shape[1] - 1
    path, fresh = np.full(4, np.inf), np.empty(4)
    path[0] = 0
    costs, points = np.empty((2, 2)), np.zeros((2, 2), np.int64)
    for r in range(rows):
        x = abs(target[r] / step[r])
        scale, c = weight[r] * step[r] * step[r], context[r]
        only = kept.size > 0 and not kept[r]
        for bank in range(2):
            for parity in range(2):
                first = (2 - bank) * parity if bank == 0 else 3 - 2 * parity  # the least |point| of this kind, but for zero
                m = max(int((x - first) * 0.25), 0) if x >= first else 0
                least, best = np.inf, 0
                for v in (first + 4 * m, first + 4 * m + 4, first):
                    k = (v + bank * (v > 0)) >> 1
                    if k <= most:
                        cost = scale * (x - v) * (x - v) + price * bits[c + bank, k]
                        if cost < least:
                            least, best = cost, v
                if parity == 0 and first:
                    cost = scale * x * x + price * bits[c + bank, 0]
                    if cost < least:
                        least, best = cost, 0
                if only:
                    least, best = (0.0, 0) if parity == 0 else (np.inf, 0)
                costs[bank, parity], points[bank, parity] = least, best
        fresh[:] = np.inf
        for s in range(4):
            for parity in range(2):
                total, t = path[s] + costs[s >> 1, parity], following[s, parity]
                if total < fresh[t]:
                    fresh[t] = total
                    back[r, t, 0], back[r, t, 1] = s, points[s >> 1, parity]
        path[:] = fresh
    s = int(np.argmin(path))
    for r in range(rows - 1, -1, -1):
        v = back[r, s, 1]
        out[r] = v if target[r] >= 0 else -v
        s = back[r, s, 0]


@_fast
def first_walk(
    w: Any, u: Any, step: Any, rowstep: Any, rowweight: Any, row: Any, col: Any, bits: Any, price: float, trellis: bool, kept: Any
) -> Any:
    """Every column of w [cols, rows] once; those to come take up the error by u [cols, cols] (H⁻¹ = uᵀ·u, upper). Changes w; int32 [cols, rows]."""
    cols, rows = w.shape
    out, back = np.zeros((cols, rows), np.int32), np.zeros((rows, 4, 2), np.int32)
    banks = 2 if trellis else 1
    for j in range(cols):
        d, weight, context = rowstep * step[j], rowweight / (u[j, j] * u[j, j]), (row + col[j]) * banks
        mask = kept[j] if kept.size else kept.reshape(-1)
        if trellis:
            _trellis(w[j], d, weight, context, bits, price, mask, out[j], back, FOLLOWING)
        else:
            _plain(w[j], d, weight, context, bits, price, mask, out[j])
        error = (w[j] - out[j] * d) / u[j, j]
        for i in range(j + 1, cols):
            if u[j, i] != 0:
                w[i] -= error * u[j, i]
    return out


@_fast
def next_walk(
    h: Any,
    slope: Any,
    out: Any,
    step: Any,
    rowstep: Any,
    rowweight: Any,
    row: Any,
    col: Any,
    bits: Any,
    price: float,
    trellis: bool,
    kept: Any,
) -> None:
    """Every column again, given all others; changes out, and slope = h @ (out's values - w). h [cols, cols]."""
    cols, rows = out.shape
    back = np.zeros((rows, 4, 2), np.int32)
    banks = 2 if trellis else 1
    made = np.empty(rows, np.int32)
    for j in range(cols):
        d, weight, context = rowstep * step[j], rowweight * h[j, j], (row + col[j]) * banks
        mask = kept[j] if kept.size else kept.reshape(-1)
        target = out[j] * d - slope[j] / h[j, j]
        if trellis:
            _trellis(target, d, weight, context, bits, price, mask, made, back, FOLLOWING)
        else:
            _plain(target, d, weight, context, bits, price, mask, made)
        moved = (made - out[j]) * d
        out[j] = made
        for i in range(cols):
            slope[i] += h[i, j] * moved
