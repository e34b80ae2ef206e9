"""Float weights → codes of 4 bits whose blocks of 32 columns have a step of 8 bits and an offset in sixteenths of it, beside a float16 for 256.

w = d · step · (code - 8 + offset / 16), step from 0 to 255, offset from -127 to 127: 4.56 bits a weight. ggml's Q4_K, which this follows, has
6 bits for each, a minimum in place of the offset that has a float16 of its own, and 4.5 bits. A product takes offsets through the sums of the
inputs' blocks, as it does zeros. The code is a `grid` with zeros that are no codes, which `pack` takes apart again without a loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from edgesdk.packed import Code

from .pack import per_block, rounded_supers
from .panels import BLOCK, OFFSET

STRETCH = np.linspace(-1, 3.5, 10, dtype=np.float32)
"""Ranges that are tried: the block's own ends take this many steps more than 15, and what is beyond the last code is cut."""


def super_blocks(weight: Any, half: bool = True) -> Code:
    """A float32 matrix [rows, cols] in super-blocks, steps and offsets of the least square error that was found. `half`: see `pack`."""
    rows, cols = weight.shape
    blocks = -(-cols // BLOCK)
    parts = np.pad(weight.astype(np.float32), ((0, 0), (0, blocks * BLOCK - cols))).reshape(-1, BLOCK)
    counts = np.full((rows, blocks), BLOCK)
    counts[:, -1] = cols - (blocks - 1) * BLOCK
    step, offset = (a.reshape(rows, -1) for a in _fitted(parts, counts.ravel(), STRETCH))
    d, steps, offsets = rounded_supers(step, offset, half)
    q = _settled(parts, counts.ravel(), per_block(d, blocks).ravel(), steps.ravel(), offsets.ravel(), np.float32(OFFSET))
    codes = q.reshape(rows, -1)[:, :cols]
    return Code("grid", (rows, cols), (4, BLOCK), (codes, steps * per_block(d, blocks), 8 - offsets / OFFSET))


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
def _fitted(parts: Any, counts: Any, stretch: Any) -> Any:
    """Step and offset (in steps) of every block [n, 32], of which the first `counts` count: for each range codes, then the line that fits them
    best, twice; the best of them."""
    n = len(parts)
    steps, offsets = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for i in range(n):
        count = counts[i]
        w = parts[i, :count]
        low, high = np.float32(0), np.float32(0)
        for j in range(count):
            low, high = min(low, w[j]), max(high, w[j])
        span = high - low
        if span < np.float32(1e-30):
            continue
        best = np.float32(np.inf)
        for more in stretch:
            step = span / (np.float32(15) + more)
            offset = (low + high) / 2 / step + np.float32(0.5)  # of code 8, in steps
            for _ in range(2):
                inverse = np.float32(1) / step
                a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for j in range(count):
                    u = w[j] * inverse
                    q = min(max(np.floor(u - offset + np.float32(0.5)), np.float32(-8)), np.float32(7))
                    a += q
                    b += q * q
                    c += u
                    e += q * u
                below = count * b - a * a
                slope = (count * e - a * c) / below if below > 0 else np.float32(0)
                if slope <= np.float32(0.1):
                    break
                offset, step = (c - slope * a) / (count * slope), step * slope
            offset = min(max(offset, np.float32(-127 / 16)), np.float32(127 / 16))
            inverse, lost = np.float32(1) / step, np.float32(0)
            for j in range(count):
                u = w[j] * inverse - offset
                q = min(max(np.floor(u + np.float32(0.5)), np.float32(-8)), np.float32(7))
                lost += (u - q) * (u - q)
            lost *= (step / span) * (step / span)
            if lost < best:
                best, steps[i], offsets[i] = lost, step, offset
    return steps, offsets


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
def _settled(parts: Any, counts: Any, d: Any, steps: Any, offsets: Any, each: Any) -> Any:
    """Codes uint8 [n, 32] of blocks whose steps and offsets are whole numbers now, each the best of itself and its neighbours (written back)."""
    out = np.full(parts.shape, 8, np.uint8)
    for i in range(len(parts)):
        count, first, side = counts[i], steps[i], offsets[i]
        if d[i] == 0:
            continue
        best = np.float32(np.inf)
        for k in range(9):
            step, offset = first + k // 3 - 1, side + k % 3 - 1
            if step < 1 or step > 255 or abs(offset) > 127 or (first == 255 and step != 255):  # d is found by the step of 255
                continue
            inverse, lost = np.float32(1) / (d[i] * step), np.float32(0)
            for j in range(count):
                u = parts[i, j] * inverse - offset / each
                q = min(max(np.floor(u + np.float32(0.5)), np.float32(-8)), np.float32(7))
                lost += (u - q) * (u - q)
            lost *= step * step
            if lost < best:
                best, steps[i], offsets[i] = lost, step, offset
        inverse = np.float32(1) / (d[i] * max(steps[i], np.float32(1)))
        for j in range(count):
            u = parts[i, j] * inverse - offsets[i] / each
            out[i, j] = np.uint8(min(max(np.floor(u + np.float32(0.5)), np.float32(-8)), np.float32(7)) + 8)
    return out
