"""Float weights → the grid of least square error, where nobody compressed them before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from edgesdk.packed import Code

from .pack import kept_scales

SHARES = np.linspace(1.1, 0.4, 24, dtype=np.float32)
"""Ranges that are tried, as shares of a group's largest value."""


def nearest(weight: Any, bits: int, group: int, half: bool) -> Code:
    """A float32 matrix [rows, cols] as a symmetric grid, a scale a `group` of columns (0: a row).

    8 bits: the largest value is 127. Fewer: of some ranges that whose codes, on the scale that fits them best, are nearest; the further reaching side may
    get the code that has no negative (a negative scale). `half`: the kernels keep scales in float16, and these are such already.
    """
    rows, cols = weight.shape
    size = cols if group == 0 or group >= cols else group
    parts = np.pad(weight, ((0, 0), (0, -cols % size))).reshape(rows, -1, size).astype(np.float32)
    middle = 1 << (bits - 1)
    if bits == 8:
        scale = np.abs(parts).max(2) / np.float32(middle - 1)
        scale[scale == 0] = 1
    else:
        scale = _searched(parts.reshape(-1, size), SHARES, np.float32(middle)).reshape(parts.shape[:2])
    scale = kept_scales(scale, half and bits != 8)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)  # float16 has no smaller one beside the row's largest
    q = np.clip(np.rint(parts * inverse[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return Code("grid", (rows, cols), (bits, 0 if size == cols else group), (q.reshape(rows, -1)[:, :cols], scale, np.zeros(0, np.uint8)))


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
def _searched(parts: Any, shares: Any, middle: Any) -> Any:
    """Scales of groups [n, size]: codes q of a range fit w best on the scale Σqw / Σq², and lower its square error by (Σqw)² / Σq²."""
    n, size = parts.shape
    scale = np.ones(n, np.float32)
    for i in range(n):
        least, most = parts[i, 0], parts[i, 0]
        for j in range(size):
            least, most = min(least, parts[i, j]), max(most, parts[i, j])
        peak = most if most > -least else least
        if abs(peak) < np.float32(1e-30):
            continue
        best, whole = np.float32(0), np.float32(1) / peak
        for share in shares:
            inverse = -middle / (peak * share)
            both, squares = np.float32(0), np.float32(0)
            for j in range(size):
                q = min(max(np.floor(parts[i, j] * inverse + np.float32(0.5)), -middle), middle - np.float32(1))
                both += q * (parts[i, j] * whole)
                squares += q * q
            if squares > 0 and both * both / squares > best:
                best = both * both / squares
                scale[i] = both / squares * peak
    return scale
