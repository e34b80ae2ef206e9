"""Keys and values in a few bits: a grid for most entries, the outliers apart, and a low-rank part of what the grid lost.

GEAR (arXiv 2403.05527): X ≈ grid(X - S - A·B) + A·B + S, where S holds the largest and smallest entries of each vector and A·B are leading
directions, by power iteration. The paper takes them from what the grid lost; here grid and directions are fitted to each other in turn,
from X itself on, and the best round is kept (as LoftQ does for weights, arXiv 2310.08659). Keys share a grid by channel and values by token, as the paper's KIVI-like grid does
(arXiv 2402.02750), in groups of `group` entries. Standard library and numpy; Python 3.9 and later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDS = 3


@dataclass(frozen=True)
class Packed:
    """One array [rows, heads, tokens, size] in few bits. `nbytes` counts every array in here."""

    shape: tuple[int, int, int, int]
    bits: int
    by_channel: bool
    group: int
    codes: Any  # uint8, two 4-bit codes a byte, or four of 2 bits
    low: Any  # float16, the value of code 0 of each group
    step: Any  # float16
    at: Any  # int32, flat places of outliers
    value: Any  # float16, what stands there
    left: Any  # float16 [rows, heads, tokens, rank]
    right: Any  # float16 [rows, heads, rank, size]

    @property
    def nbytes(self) -> int:
        return int(sum(a.nbytes for a in (self.codes, self.low, self.step, self.at, self.value, self.left, self.right)))

    def expand(self) -> Any:
        """float32 [rows, heads, tokens, size]."""
        rows, heads, tokens, size = self.shape
        if not rows * heads * tokens * size:
            return np.zeros(self.shape, np.float32)
        grid = _unpack(self.codes, self.bits).astype(np.float32)
        vector = tokens if self.by_channel else size
        padded = -(-vector // self.group) * self.group
        grid = grid[: rows * heads * (size if self.by_channel else tokens) * padded].reshape(-1, self.group)
        grid = (grid * self.step.astype(np.float32)[:, None] + self.low.astype(np.float32)[:, None]).reshape(rows, heads, -1, padded)
        out = grid[..., :vector]
        out = np.ascontiguousarray(out.swapaxes(2, 3) if self.by_channel else out)
        if self.left.shape[-1]:
            out += self.left.astype(np.float32) @ self.right.astype(np.float32)
        out.reshape(-1)[self.at] = self.value
        return out


def pack(array: Any, *, bits: int = 4, rank: int = 2, outliers: float = 0.01, by_channel: bool = False, group: int = 64) -> Packed:
    """`array` float32 [rows, heads, tokens, size] in `bits` (2, 4 or 8) a value.

    `outliers`: the share of entries kept apart, half of them the largest and half the smallest of each vector. `rank` 0: no low-rank part.
    Raises `ValueError` for other numbers of bits and for values that are not finite.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits: 2, 4 or 8")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError("keys or values that are not finite")
    rows, heads, tokens, size = array.shape
    rank, group = min(rank, tokens, size), max(1, min(group, tokens if by_channel else size))
    left, right = np.zeros((rows, heads, tokens, 0), np.float16), np.zeros((rows, heads, 0, size), np.float16)
    if not rank:
        return _grid(array, array, outliers, bits, by_channel, group, left, right)
    best, least, start = None, np.inf, array
    for _ in range(ROUNDS):
        left, right = (a.astype(np.float16) for a in low_rank(start, rank))
        smooth = left.astype(np.float32) @ right.astype(np.float32)
        found = _grid(array, array - smooth, outliers, bits, by_channel, group, left, right)
        lost = array - found.expand()
        if (error := float(np.square(lost).sum())) < least:
            best, least = found, error
        start = lost + smooth
    assert best is not None
    return best


def _grid(array: Any, rest: Any, outliers: float, bits: int, by_channel: bool, group: int, left: Any, right: Any) -> Packed:
    """`rest` on its grids beside the given low-rank part; where its outliers are, `array` itself is kept."""
    vectors = rest.swapaxes(2, 3) if by_channel else rest
    away = _outliers(vectors, outliers)
    at = np.flatnonzero(away.swapaxes(2, 3) if by_channel else away).astype(np.int32)
    length = vectors.shape[-1]
    padded = np.full((*vectors.shape[:3], -(-length // group) * group), np.nan, np.float32)
    padded[..., :length] = np.where(away, np.nan, vectors)
    groups = padded.reshape(-1, group)
    low, high = _span(groups)
    low16 = low.astype(np.float16)
    step = np.maximum((high - low16.astype(np.float32)) / (2**bits - 1), 1e-8).astype(np.float16)
    step = np.where(step == 0, np.float16(6e-8), step)
    scaled = (np.where(np.isnan(groups), low[:, None], groups) - low16.astype(np.float32)[:, None]) / step.astype(np.float32)[:, None]
    codes = _pack(np.clip(np.rint(scaled), 0, 2**bits - 1).astype(np.uint8).reshape(-1), bits)
    return Packed(array.shape, bits, by_channel, group, codes, low16, step, at, array.reshape(-1)[at].astype(np.float16), left, right)


def low_rank(residual: Any, rank: int, rounds: int = 3) -> tuple[Any, Any]:
    """A [..., tokens, rank] and B [..., rank, size] of the leading directions of `residual` [..., tokens, size], by power iteration
    from fixed starts."""
    start = np.random.default_rng(0).standard_normal((*residual.shape[:-2], residual.shape[-1], rank)).astype(np.float32)
    basis = np.linalg.qr(residual @ start)[0]
    for _ in range(rounds):
        basis = np.linalg.qr(residual @ np.linalg.qr(residual.swapaxes(-1, -2) @ basis)[0])[0]
    return basis, basis.swapaxes(-1, -2) @ residual


def _span(groups: Any) -> tuple[Any, Any]:
    """The least and largest of each group, 0 where all of it lies apart."""
    low = np.where(np.isnan(groups), np.inf, groups).min(1)
    high = np.where(np.isnan(groups), -np.inf, groups).max(1)
    return np.where(np.isfinite(low), low, 0).astype(np.float32), np.where(np.isfinite(high), high, 0).astype(np.float32)


def _outliers(vectors: Any, share: float) -> Any:
    """bool: half of `share` of each vector's entries from each end."""
    length = vectors.shape[-1]
    each = round(share * length / 2)
    apart = np.zeros(vectors.shape, bool)
    if each:
        order = np.argsort(vectors, -1, kind="stable")
        np.put_along_axis(apart, order[..., :each], True, -1)
        np.put_along_axis(apart, order[..., -each:], True, -1)
    return apart


def _pack(codes: Any, bits: int) -> Any:
    """Codes of `bits` bits, the first in the low bits of a byte."""
    per = 8 // bits
    whole = np.zeros(-(-len(codes) // per) * per, np.uint8)
    whole[: len(codes)] = codes
    out = np.zeros(len(whole) // per, np.uint8)
    for i in range(per):
        out |= whole[i::per] << (i * bits)
    return out


def _unpack(packed: Any, bits: int) -> Any:
    per = 8 // bits
    out = np.empty(len(packed) * per, np.uint8)
    for i in range(per):
        out[i::per] = (packed >> (i * bits)) & (2**bits - 1)
    return out
