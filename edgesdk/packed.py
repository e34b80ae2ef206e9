"""Weights in few bytes: how compressed weights and whole programs are written, counted and read back.

This file stands alone (standard library and numpy; Python 3.9 and later): it is sent to the device as it is, and expands a packed program there.
A `Code` is a small tree; `pack` writes it, `unpack` reads it, `decode` computes the weights. What `pack` returns is what is counted.

Entropy coding is range asymmetric numeral systems (rANS: Duda 2013, arXiv:1311.2540), interleaved over lanes so that numpy steps through all at once.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

PROB_BITS = 14
LOW = 1 << 16  # rANS states stay in [2^16, 2^32)
CHUNK = 1 << 22
KINDS = ("dense", "grid", "table", "vector", "sparse", "lowrank", "sum", "scaled", "hadamard", "pick", "stack", "base", "masked")
DTYPES = ("uint8", "uint16", "uint32", "int8", "float16", "float32")
PIECES = {"float32": 4, "float16": 2, "int8": 1, "int8-row": 1, "int4": 0.5, "scales": 2}  # how a program holds a weight → bytes an element
MAGIC, DIFFERENCE = b"EDGEPACK", b"EDGEDIFF"


class PackedError(Exception):
    """What is read is no packed weight or program, or it was damaged."""


@dataclass(frozen=True)
class Code:
    """How an array is stored. `shape` is what it decodes to (weights: [rows, cols], float32).

    kind      numbers            arrays                                             decodes to
    dense     -                  values (float32 or float16; uint16: bfloat16)      the values
    grid      bits, group        q [rows, cols]; scale [rows, groups]; zero (same)  (q - zero) · scale; without zero 2^(bits-1)
    table     bits, group        q [rows, cols]; table [1 or rows, 2^bits]; scale   table[row, q] · scale
    vector    length, group      q [rows, cols/length]; codebook [k, length]; scale codebook[q] · scale
    sparse    -                  mask [rows, cols] of 0 and 1, or none: parts[1]    parts[0] (row by row) where the mask is 1, else 0
    lowrank   -                  -                                                  parts[0] @ parts[1]
    sum       -                  -                                                  the sum of its parts
    scaled    -                  row [rows] or []; col [cols] or []                 row · parts[0] · col
    hadamard  seed, block        -                                                  parts[0] @ H, H of random signs and Hadamard blocks
    pick      axis               order                                              parts[0] with that axis in the order of the original
    stack     axis               -                                                  its parts side by side
    base      -                  -                                                  what `decode` is given as the base
    masked    -                  mask [rows, cols] of 0 and 1                       parts[0] where the mask is 1, else 0
    A group of 0 is a whole row; the last group of a row may be shorter. A scale of no elements is 1.
    """

    kind: str
    shape: tuple[int, ...]
    numbers: tuple[int, ...] = ()
    arrays: tuple[Any, ...] = ()
    parts: tuple[Code, ...] = ()


def groups_of(cols: int, group: int) -> int:
    return 1 if group <= 0 else -(-cols // group)


def spread(values: Any, cols: int, group: int) -> Any:
    """A value a group [rows, groups] → a value a column [rows, cols]."""
    if values.shape[1] == 1:
        return values
    return np.repeat(values, group, axis=1)[:, :cols]


# ---- decoding


def _dense(c: Code, base: Any) -> Any:
    values = c.arrays[0]
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32).reshape(c.shape)


def _grid(c: Code, base: Any) -> Any:
    (bits, group), (q, scale, zero) = c.numbers, c.arrays
    cols = c.shape[1]
    offset = spread(zero.astype(np.float32), cols, group) if zero.size else np.float32(1 << (bits - 1))
    return (q.astype(np.float32) - offset) * (spread(scale.astype(np.float32), cols, group) if scale.size else np.float32(1))


def _table(c: Code, base: Any) -> Any:
    (_, group), (q, table, scale) = c.numbers, c.arrays
    values = table.astype(np.float32)
    w = values[0][q] if len(values) == 1 else np.take_along_axis(values, q.astype(np.intp), axis=1)
    return w * spread(scale.astype(np.float32), c.shape[1], group) if scale.size else w


def _vector(c: Code, base: Any) -> Any:
    (_, group), (q, codebook, scale) = c.numbers, c.arrays
    w = codebook.astype(np.float32)[q].reshape(c.shape[0], -1)[:, : c.shape[1]]
    return w * spread(scale.astype(np.float32), c.shape[1], group) if scale.size else w


def _sparse(c: Code, base: Any) -> Any:
    out = np.zeros(c.shape, np.float32)
    out[places(c)] = decode(c.parts[0], base).ravel()
    return out


def places(c: Code) -> Any:
    """The mask of a sparse code, bool [rows, cols]."""
    return (c.arrays[0] if c.arrays else decode(c.parts[1])).astype(bool)


def _sum(c: Code, base: Any) -> Any:
    total = decode(c.parts[0], base).astype(np.float32)
    for part in c.parts[1:]:
        total = total + decode(part, base)
    return total


def _scaled(c: Code, base: Any) -> Any:
    row, col = (a.astype(np.float32) for a in c.arrays)
    w = decode(c.parts[0], base)
    w = w * row[:, None] if row.size else w
    return w * col[None] if col.size else w


def rotate(w: Any, seed: int, block: int, back: bool = False) -> Any:
    """w @ H (or, `back`, w @ H^T): random signs, then an orthonormal Hadamard transform of every `block` columns (a power of two)."""
    signs = np.random.RandomState(seed).randint(0, 2, w.shape[1]).astype(np.float32) * 2 - 1
    x = (w if back else w * signs).reshape(w.shape[0], -1, block).astype(np.float32)
    step = 1
    while step < block:
        x = x.reshape(w.shape[0], -1, 2, step)
        x = np.concatenate([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], -1)
        step *= 2
    x = x.reshape(w.shape) / np.float32(block**0.5)
    return x * signs if back else x


def _pick(c: Code, base: Any) -> Any:
    w, (axis,) = decode(c.parts[0], base), c.numbers
    out = np.empty_like(w)
    if axis:
        out[:, c.arrays[0]] = w
    else:
        out[c.arrays[0]] = w
    return out


def _base(c: Code, base: Any) -> Any:
    if base is None:
        raise PackedError("these weights are a difference to a base that is not given")
    return np.asarray(base, np.float32).reshape(c.shape)


_DECODERS: dict[str, Callable[[Code, Any], Any]] = {
    "dense": _dense, "grid": _grid, "table": _table, "vector": _vector, "sparse": _sparse, "sum": _sum, "scaled": _scaled, "pick": _pick, "base": _base,
    "lowrank": lambda c, base: decode(c.parts[0], base) @ decode(c.parts[1], base),
    "hadamard": lambda c, base: rotate(decode(c.parts[0], base), c.numbers[0], c.numbers[1]),
    "stack": lambda c, base: np.concatenate([decode(p, base) for p in c.parts], c.numbers[0]),
    "masked": lambda c, base: decode(c.parts[0], base) * (c.arrays[0] != 0),
}  # fmt: skip


def decode(code: Code, base: Any = None) -> Any:
    """The array, float32. `base`: the weights that a difference is added to. Raises `PackedError`."""
    out = _DECODERS[code.kind](code, base)
    if out.shape != tuple(code.shape):
        raise PackedError(f"{code.kind}: decodes to {out.shape}, {tuple(code.shape)} was promised")
    return out


# ---- entropy coding


def _frequencies(symbols: Any) -> Any:
    """Counts of the symbols 0…max, scaled to a sum of 2^14, none that occurs below 1."""
    counts = np.bincount(symbols)
    total = 1 << PROB_BITS
    if np.count_nonzero(counts) > total // 2:
        return None
    scaled = np.maximum((counts * (total / counts.sum())).astype(np.int64), counts > 0)
    while scaled.sum() != total:  # the commonest symbols pay or get the rest
        order = np.argsort(-scaled)
        for i in order[: max(1, min(len(order), abs(int(scaled.sum()) - total)))]:
            if scaled.sum() == total:
                break
            scaled[i] += 1 if scaled.sum() < total else -1 if scaled[i] > 1 else 0
    return scaled


def _lanes(count: int) -> int:
    return max(1, min(1024, count // 2048))


def rans_encode(symbols: Any) -> bytes | None:
    """Unsigned integers (1-D, below 2^16) → bytes near their entropy, with their table; None where that cannot be smaller."""
    count = len(symbols)
    freq = _frequencies(symbols) if count else None
    if freq is None:
        return None
    cum, lanes = np.concatenate([[0], np.cumsum(freq)[:-1]]), _lanes(count)
    steps = -(-count // lanes)
    padded = np.full(steps * lanes, int(np.argmax(freq)), np.int64)
    padded[:count] = symbols
    f, c = (a[padded].astype(np.uint64).reshape(steps, lanes) for a in (freq, cum))
    x, words = np.full(lanes, LOW, np.uint64), []
    up, down = np.uint64(PROB_BITS), np.uint64(16)
    for t in range(steps - 1, -1, -1):
        full = x >= (f[t] << np.uint64(32 - PROB_BITS))
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x[full] >>= down
        x = ((x // f[t]) << up) + x % f[t] + c[t]
    used = np.flatnonzero(freq)
    table = varint(len(used)) + b"".join(varint(int(d)) for d in np.diff(used, prepend=0)) + b"".join(varint(int(n)) for n in freq[used])
    body = x.astype("<u4").tobytes() + np.concatenate(words[::-1]).tobytes()
    return table + body


def rans_decode(data: bytes, count: int) -> Any:
    """The `count` symbols (uint16). Raises `PackedError` when the bytes are not whole."""
    n, at = read_varint(data, 0)
    pairs = []
    for _ in range(2 * n):
        value, at = read_varint(data, at)
        pairs.append(value)
    symbols = np.cumsum(pairs[:n])
    freq = np.array(pairs[n:], np.int64)
    if n == 0 or freq.sum() != 1 << PROB_BITS:
        raise PackedError("the table of an entropy-coded array is damaged")
    cum = np.concatenate([[0], np.cumsum(freq)[:-1]])
    f = np.repeat(freq, freq).astype(np.uint32)  # of every slot
    b = (np.arange(1 << PROB_BITS) - np.repeat(cum, freq)).astype(np.uint32)
    lanes = _lanes(count)
    steps = -(-count // lanes)
    if len(data) < at + 4 * lanes or (len(data) - at) % 2:
        raise PackedError("an entropy-coded array is cut off")
    x = np.frombuffer(data, "<u4", lanes, at).astype(np.uint32)
    words = np.concatenate([np.frombuffer(data, "<u2", -1, at + 4 * lanes), np.zeros(lanes, np.uint16)]).astype(np.uint32)
    slots, part, read = np.empty((steps, lanes), np.uint16), np.empty(lanes, np.uint32), 0
    mask, up, down = np.uint32((1 << PROB_BITS) - 1), np.uint32(PROB_BITS), np.uint32(16)
    for t in range(steps):
        low = x & mask
        slots[t] = low
        x >>= up
        x *= f.take(low, out=part, mode="clip")
        x += b.take(low, out=part, mode="clip")
        short = np.flatnonzero(x < LOW)
        k = len(short)
        if k:
            x[short] = (x[short] << down) | words[read : read + k]
            read += k
    if read != len(words) - lanes or not bool(np.all(x == LOW)):
        raise PackedError("an entropy-coded array is damaged")
    return np.repeat(symbols, freq).astype(np.uint16)[slots.ravel()[:count]]


# ---- entropy coding of matrices


EXPS = (*(math.floor((1 << 30) * math.exp(-(2.0 ** (3 - i / 4))) + 0.5) for i in range(64)), 1 << 30)
"""e^(-2^(3-i/4)) in 30 bits; the last is 1. (No entry is so near to a half that another platform's `exp` could round it otherwise.)"""
TRELLIS = ((0, 2), (2, 0), (1, 3), (3, 1))
"""State and parity → next state. In states 0 and 1 an index k stands for 2k steps, in 2 and 3 for 2k - sign(k)."""


@dataclass(frozen=True)
class Model:
    """How likely the indices k [rows, cols] are: rows and columns are classed by how large their indices are (half octaves), and every sum of a
    row's and a column's class has its own two-sided distribution: a share of zeros, a first ratio and how the ratios fall."""

    row: Any  # [rows] uint8
    col: Any  # [cols] uint8
    most: int  # the largest |k|
    shapes: Any  # uint8 [contexts, banks, 3]: zeros (in 1/256), first ratio, fall (both of EXPS)

    @property
    def freq(self) -> Any:
        """int64 [contexts, banks, 2·most+1], each of a sum of 2^14."""
        zeros, first, fall = (self.shapes[..., i].astype(np.int64) for i in range(3))
        table = np.array(EXPS, np.int64)
        g = np.empty((*zeros.shape, self.most), np.int64)
        value, ratio = np.full(zeros.shape, 1 << 30, np.int64), table[first]
        for k in range(self.most):
            g[..., k] = value
            value, ratio = (value * ratio) >> 30, (ratio * table[fall]) >> 30
        total = 1 << PROB_BITS
        none = np.maximum(((2 * zeros + 1) * total) >> 9, 1)
        half = np.maximum((total - none) // 2 - self.most, 0)
        side = 1 + g * half[..., None] // np.maximum(g.sum(-1), 1)[..., None] if self.most else g
        none = total - 2 * side.sum(-1)
        return np.concatenate([side[..., ::-1], none[..., None], side], -1)

    @property
    def bits(self) -> Any:
        """What an index costs by its |k|, sign and all: float64 [contexts, banks, most+1]."""
        return PROB_BITS - np.log2(self.freq[..., self.most :])

    def contexts(self) -> Any:
        return self.row.astype(np.intp)[:, None] + self.col[None]


def _effects(k: Any) -> tuple[Any, Any]:
    """log2 of how large the indices of every row and column are, row and column effects apart."""
    size = np.abs(k).astype(np.float32) + np.float32(0.02)
    mean, rows, cols = size.mean(), np.zeros(k.shape[0], np.float32), np.zeros(k.shape[1], np.float32)
    for _ in range(5):
        rows = np.log2(size @ 2**-cols / (mean * k.shape[1]))
        cols = np.log2(2**-rows @ size / (mean * k.shape[0]))
    return rows, cols


def _classes(effects: tuple[Any, Any], steps: tuple[float, float]) -> tuple[Any, Any]:
    """Classes of rows and columns: their effects in steps; a step of 0: one class."""
    both = [
        np.clip(np.round(v / step), -12, 12).astype(np.int64) if step else np.zeros(len(v), np.int64) for v, step in zip(effects, steps)
    ]
    return (both[0] - both[0].min()).astype(np.uint8), (both[1] - both[1].min()).astype(np.uint8)


LOG_EXPS = np.log(np.maximum(np.array(EXPS, np.float64), 1e-3) / (1 << 30))


def _likely(hist: Any, first: Any, fall: Any) -> tuple[Any, Any]:
    """Of pairs (first ratio, fall) the likeliest one for each row of counts [n, most] of |k| = 1, 2, …"""
    n = np.arange(hist.shape[1])
    logp = np.maximum(n * LOG_EXPS[first][:, None] + (n * (n - 1) / 2) * LOG_EXPS[fall][:, None], -60.0)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    best = np.argmax(np.round(hist @ logp.T, 6), 1)  # rounded: the same whatever number of threads adds it up
    return first[best], fall[best]


def _shapes(hist: Any) -> tuple[Any, Any]:
    """The same among all pairs: a coarse search, then a fine one around each."""
    first, fall = (v.ravel() for v in np.meshgrid(np.arange(0, len(EXPS), 4), np.arange(16, len(EXPS), 4), indexing="ij"))
    first, fall = _likely(hist, first, fall)
    near = np.arange(-3, 4)
    for a, b in sorted(set(zip(first.tolist(), fall.tolist()))):
        here = (first == a) & (fall == b)
        pairs = (v.ravel() for v in np.meshgrid(np.clip(a + near, 0, len(EXPS) - 1), np.clip(b + near, 16, len(EXPS) - 1), indexing="ij"))
        first[here], fall[here] = _likely(hist[here], *pairs)
    return first, fall


def model_of(
    k: Any, bank: Any = None, steps: tuple[float, float] = (0.5, 0.5), effects: tuple[Any, Any] | None = None
) -> tuple[Model, float]:
    """The distributions that suit indices k [rows, cols], and the bits they need; `bank` [rows, cols]: 0 or 1, which of two distributions of
    its context; `steps`: how fine the classes of rows and columns are, in octaves (0: one class)."""
    row, col = _classes(effects or _effects(k), steps)
    most, banks = int(np.abs(k).max()), 1 if bank is None else 2
    where = (row.astype(np.int64)[:, None] + col[None]) * banks + (0 if bank is None else bank)
    count = (int(row.max()) + int(col.max()) + 1) * banks
    hist = np.bincount((where * (most + 1) + np.abs(k)).ravel(), minlength=count * (most + 1)).reshape(count, most + 1).astype(np.float64)
    shapes = np.zeros((count, 3), np.uint8)
    total = hist.sum(1)
    shapes[:, 0] = np.clip(256 * (hist[:, 0] + 0.3) / (total + 0.6), 0, 255)
    if most > 1:
        shapes[:, 1], shapes[:, 2] = _shapes(hist[:, 1:])
    model = Model(row, col, most, shapes.reshape(-1, banks, 3))
    return model, float((hist * model.bits.reshape(count, most + 1)).sum())


def to_trellis(v: Any) -> tuple[Any, Any] | None:
    """(indices, banks) of values [rows, cols] that every column walks the trellis with, top to bottom; None where one does not."""
    k, bank = np.empty_like(v), np.empty_like(v)
    state, following = np.zeros(v.shape[1], np.intp), np.array(TRELLIS)
    for i in range(len(v)):
        bank[i] = state >> 1
        k[i] = np.where(bank[i] == 1, v[i] + np.sign(v[i]), v[i]) >> 1
        if np.any(2 * k[i] - bank[i] * np.sign(k[i]) != v[i]):
            return None
        state = following[state, k[i] & 1]
    return k, bank


CLASS_STEPS = ((0.5, 0.5), (1.0, 1.0), (0.0, 0.0), (0.0, 0.5), (0.5, 0.0))


def best_model(q: Any) -> tuple[int, Any, Any, Model, float] | None:
    """What writes q [rows, cols] in the fewest bytes: the value that stands for 0, indices, banks (None: no trellis), the model, and about
    how many bytes it takes. None where matrices are not coded."""
    if q.ndim != 2 or q.size < 128 or q.max() == q.min() or int(q.max()) - int(q.min()) > 4000:
        return None
    best: tuple[int, Any, Any, Model, float] | None = None
    for middle in {1 << (int(q.max()).bit_length() - 1), int(np.bincount(q.ravel()).argmax())}:
        v = q.astype(np.int64) - middle
        turned = to_trellis(v)
        k, bank = turned or (v, None)
        effects = _effects(k)
        for steps in CLASS_STEPS if int(np.abs(k).max()) < 100 else CLASS_STEPS[1:3]:
            model, bits = model_of(k, bank, steps, effects)
            size = len(_model_bytes(model, 0, bank)) + bits / 8 + 2 * _per_step(q.size, q.shape[1])
            if best is None or size < best[4]:
                best = middle, k, bank, model, size
    return best


def _pack_matrix(q: Any) -> bytes | None:
    """rANS with the distributions of a `Model`: whether it is a trellis, the value that stands for 0, the model, the words. None where it does not apply."""
    found = best_model(q)
    return None if found is None else _coded_matrix(*found[:4])


def _model_bytes(model: Model, middle: int, bank: Any) -> bytes:
    used = np.unique(np.unique(model.row.astype(np.int64))[:, None] + np.unique(model.col))
    shapes = np.stack([model.shapes[used].reshape(-1, 3)[:, i] for i in range(3)])
    head = varint(0 if bank is None else 1) + varint(middle) + varint(model.most)
    head += b"".join(_pack_array(a, True) for a in (model.row, model.col)) + varint(len(used)) + b"".join(varint(int(n)) for n in used)
    return head + shapes.tobytes()


def _per_step(count: int, cols: int) -> int:
    """Columns of a row that are coded at once: what a trellis needs to know is always decoded before."""
    return min(_lanes(count), cols)


def _coded_matrix(middle: int, k: Any, bank: Any, model: Model) -> bytes:
    freq = model.freq
    at = model.contexts(), np.zeros_like(k) if bank is None else bank, k + model.most
    f, c = (a[at].astype(np.uint64) for a in (freq, np.cumsum(freq, -1) - freq))
    rows, cols = k.shape
    lanes = _per_step(k.size, cols)
    x, words = np.full(lanes, LOW, np.uint64), []
    for i in range(rows - 1, -1, -1):
        for start in range((cols - 1) // lanes * lanes, -1, -lanes):
            fi, ci = f[i, start : start + lanes], c[i, start : start + lanes]
            part = x[: len(fi)]
            full = part >= (fi << np.uint64(32 - PROB_BITS))
            words.append((part[full] & np.uint64(0xFFFF)).astype("<u2"))
            part[full] >>= np.uint64(16)
            part[:] = ((part // fi) << np.uint64(PROB_BITS)) + part % fi + ci
    return _model_bytes(model, middle, bank) + x.astype("<u4").tobytes() + np.concatenate(words[::-1]).tobytes()


def _unpack_matrix(data: bytes, rows: int, cols: int) -> Any:
    """Values [rows, cols]. Raises `PackedError`."""
    trellis, at = read_varint(data, 0)
    middle, at = read_varint(data, at)
    most, at = read_varint(data, at)
    row, at = _unpack_array(data, at)
    col, at = _unpack_array(data, at)
    used, at = _read_varints(data, at)
    size, lanes, banks = 3 * len(used) * (trellis + 1), _per_step(rows * cols, cols), trellis + 1
    if (
        row.shape != (rows,)
        or col.shape != (cols,)
        or trellis > 1
        or most > 4000
        or len(data) < at + size + 4 * lanes
        or (len(data) - at - size) % 2
    ):
        raise PackedError("an entropy-coded array is damaged")
    shapes = np.zeros((int(row.max()) + int(col.max()) + 1, banks, 3), np.uint8)
    shapes[used] = np.moveaxis(np.frombuffer(data, np.uint8, size, at).reshape(3, len(used), banks), 0, 2)
    if shapes.size and (shapes[..., 1:] >= len(EXPS)).any():
        raise PackedError("the model of an entropy-coded array is damaged")
    model = Model(row, col, most, shapes)
    freq = model.freq.reshape(-1, 2 * most + 1)
    if (freq < 1).any():
        raise PackedError("the model of an entropy-coded array is damaged")
    x = np.frombuffer(data, "<u4", lanes, at + size).astype(np.uint64)
    words = np.frombuffer(data, "<u2", -1, at + size + 4 * lanes)
    return _walk(model.contexts() * banks, freq, most, trellis == 1, x, words) + middle


def _walk(context: Any, freq: Any, most: int, trellis: bool, x: Any, words: Any) -> Any:
    """Decode row by row: the indices, or what they stand for in the trellis."""
    rows, cols = context.shape
    slot = np.stack([np.repeat(np.arange(freq.shape[1], dtype=np.int16), n) for n in freq])
    f, c = freq.astype(np.uint64), (np.cumsum(freq, 1) - freq).astype(np.uint64)
    words, read = np.concatenate([words, np.zeros(len(x), np.uint16)]).astype(np.uint64), 0
    out, state, following = np.empty((rows, cols), np.int64), np.zeros(cols, np.intp), np.array(TRELLIS)
    mask = np.uint64((1 << PROB_BITS) - 1)
    for i in range(rows):
        if trellis:
            context[i] += state >> 1
        for start in range(0, cols, len(x)):
            which = context[i, start : start + len(x)]
            part = x[: len(which)]
            low = part & mask
            symbol = slot[which, low.astype(np.intp)]
            part[:] = f[which, symbol] * (part >> np.uint64(PROB_BITS)) + low - c[which, symbol]
            short = part < LOW
            count = int(np.count_nonzero(short))
            if count:
                part[short] = (part[short] << np.uint64(16)) | words[read : read + count]
                read += count
            out[i, start : start + len(x)] = symbol
        out[i] -= most
        if trellis:
            bank, k = state >> 1, out[i].copy()
            out[i] = 2 * k - bank * np.sign(k)
            state = following[state, k & 1]
    if read != len(words) - len(x) or not bool(np.all(x == LOW)):
        raise PackedError("an entropy-coded array is damaged")
    return out


def _read_varints(data: bytes, at: int) -> tuple[list[int], int]:
    count, at = read_varint(data, at)
    values = []
    for _ in range(count):
        n, at = read_varint(data, at)
        values.append(n)
    return values, at


# ---- writing and reading


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    n = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise PackedError("packed weights end too early")
        byte = data[at]
        at += 1
        n |= (byte & 127) << shift
        if byte < 128:
            return n, at
        shift += 7


def _bits_of(q: Any) -> int:
    return max(1, int(q.max()).bit_length()) if q.size else 1


def _pack_bits(q: Any, bits: int) -> bytes:
    wide = ((q.ravel().astype(np.uint32)[:, None] >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8)
    return np.packbits(wide.ravel(), bitorder="little").tobytes()


def _unpack_bits(data: bytes, bits: int, count: int) -> Any:
    flat = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits]
    if flat.size < count * bits:
        raise PackedError("packed weights end too early")
    return (flat.reshape(count, bits).astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(1)


def _pack_base3(q: Any) -> bytes:
    """Five ternary digits a byte."""
    flat = np.concatenate([q.ravel(), np.zeros(-q.size % 5, q.dtype)]).reshape(-1, 5).astype(np.uint16)
    return bytes((flat * np.array([1, 3, 9, 27, 81], np.uint16)).sum(1).astype(np.uint8).tobytes())


def _unpack_base3(data: bytes, count: int) -> Any:
    flat = np.frombuffer(data, np.uint8)[:, None] // np.array([1, 3, 9, 27, 81], np.uint8) % 3
    return flat.ravel()[:count]


def _pack_patterns(q: Any) -> bytes | None:
    """N:M pruned integers [rows, cols]: m, the value of what is pruned, which of every m are not (as bits), their values. None where no m fits."""
    if q.ndim != 2 or q.size < 128:
        return None
    middle = int(np.bincount(q.ravel()).argmax())
    for m in (4, 8, 16):
        if m > q.shape[1] // 2:
            return None
        groups = np.pad(q, ((0, 0), (0, -q.shape[1] % m)), constant_values=middle).reshape(q.shape[0], -1, m) != middle
        most = int(groups.sum(2).max())
        if 0 < most < m:
            bits = (groups.astype(np.uint32) << np.arange(m, dtype=np.uint32)).sum(2).astype(np.uint8 if m <= 8 else np.uint16)
            mask = q != middle
            left = q[mask].reshape(len(q) if len(set(mask.sum(1).tolist())) == 1 else 1, -1)
            return varint(m) + varint(middle) + _pack_array(bits, True, False) + _pack_array(left, True, False)
    return None


def _unpack_patterns(data: bytes, rows: int, cols: int) -> Any:
    """Raises `PackedError`."""
    m, at = read_varint(data, 0)
    middle, at = read_varint(data, at)
    bits, at = _unpack_array(data, at)
    left, at = _unpack_array(data, at)
    if m not in (4, 8, 16) or bits.shape != (rows, -(-cols // m)):
        raise PackedError("the patterns of a pruned array are damaged")
    mask = ((bits[..., None].astype(np.uint32) >> np.arange(m, dtype=np.uint32)) & 1).reshape(rows, -1)[:, :cols].astype(bool)
    if int(mask.sum()) != left.size:
        raise PackedError("the patterns of a pruned array are damaged")
    out = np.full((rows, cols), middle, np.int64)
    out[mask] = left.ravel()
    return out


def _pack_array(a: Any, entropy: bool, patterns: bool = True) -> bytes:
    """tag, shape, length, payload. Integers: fixed bits, five ternary digits a byte, rANS, rANS with a model of rows and columns, or
    patterns of every m and what they leave; floats: as they are, or rANS of each byte plane."""
    a = np.ascontiguousarray(a)
    raw = a.astype(a.dtype.newbyteorder("<")).tobytes()
    ways: list[tuple[int, bytes]] = [(0, raw)]
    if a.dtype.kind == "u" and a.size:
        bits = _bits_of(a)
        ways.append((1, bytes([bits]) + _pack_bits(a, bits)))
        if bits == 2 and a.max() < 3:
            ways.append((2, _pack_base3(a)))
        if entropy and a.dtype != np.uint32:
            coded = rans_encode(a.ravel())
            ways += [(3, coded)] if coded is not None else []
            modelled = _pack_matrix(a)
            ways += [(5, modelled)] if modelled is not None else []
            patterned = _pack_patterns(a) if patterns else None  # within patterns there are none: each would call for the next
            ways += [(6, patterned)] if patterned is not None else []
            if a.dtype == np.uint16 and a.size > 64:
                ways.append((4, pack_bytes(raw, 2)))
    elif entropy and a.size > 64:
        ways.append((4, pack_bytes(raw, a.dtype.itemsize)))
    way, payload = min(ways, key=lambda w: len(w[1]))
    head = bytes([DTYPES.index(a.dtype.name) * 8 + way, a.ndim]) + b"".join(varint(n) for n in a.shape)
    return head + varint(len(payload)) + payload


def _unpack_array(data: bytes, at: int) -> tuple[Any, int]:
    if at + 2 > len(data) or data[at] // 8 >= len(DTYPES):
        raise PackedError("packed weights end too early, or are of another kind")
    dtype, way, ndim = np.dtype(DTYPES[data[at] // 8]), data[at] % 8, data[at + 1]
    shape, at = [], at + 2
    for _ in range(ndim):
        n, at = read_varint(data, at)
        shape.append(n)
    length, at = read_varint(data, at)
    payload, count = data[at : at + length], int(np.prod(shape, dtype=np.int64))
    if len(payload) < length or count > 1 << 34:
        raise PackedError("packed weights end too early")
    if way == 1:
        flat = _unpack_bits(payload[1:], payload[0], count)
    elif way == 2:
        flat = _unpack_base3(payload, count)
    elif way == 3:
        flat = rans_decode(payload, count)
    elif way == 5 and len(shape) == 2:
        flat = _unpack_matrix(payload, *shape).ravel()
    elif way == 6 and len(shape) == 2:
        flat = _unpack_patterns(payload, *shape).ravel()
    else:
        raw = unpack_bytes(payload) if way == 4 else payload
        if len(raw) != count * dtype.itemsize:
            raise PackedError("an array of packed weights has the wrong length")
        flat = np.frombuffer(raw, dtype.newbyteorder("<"))
    return flat.astype(dtype).reshape(shape), at + length


def pack(code: Code, entropy: bool = True) -> bytes:
    """The bytes of a code: all that is stored for it. Without `entropy` every integer has a fixed number of bits (what a kernel can index)."""
    head = bytes([KINDS.index(code.kind), len(code.shape), len(code.numbers), len(code.arrays)]) + varint(len(code.parts))
    head += b"".join(varint(n) for n in (*code.shape, *code.numbers))
    return head + b"".join(_pack_array(a, entropy) for a in code.arrays) + b"".join(pack(p, entropy) for p in code.parts)


def unpack(data: bytes) -> Code:
    """Raises `PackedError`."""
    try:
        code, at = _unpack_code(data, 0, 0)
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise PackedError(f"packed weights are damaged: {error}") from None
    if at != len(data):
        raise PackedError("bytes are left over behind packed weights")
    return code


def _unpack_code(data: bytes, at: int, depth: int) -> tuple[Code, int]:
    if at + 4 > len(data) or data[at] >= len(KINDS) or depth > 16:
        raise PackedError("these are no packed weights")
    kind, ndim, numbers, arrays = KINDS[data[at]], data[at + 1], data[at + 2], data[at + 3]
    parts, at = read_varint(data, at + 4)
    values, found, inner = [], [], []
    for _ in range(ndim + numbers):
        n, at = read_varint(data, at)
        values.append(n)
    for _ in range(arrays):
        array, at = _unpack_array(data, at)
        found.append(array)
    for _ in range(parts):
        part, at = _unpack_code(data, at, depth + 1)
        inner.append(part)
    return Code(kind, tuple(values[:ndim]), tuple(values[ndim:]), tuple(found), tuple(inner)), at


# ---- bytes and programs


def pack_bytes(raw: bytes, width: int = 1) -> bytes:
    """Any bytes, losslessly. `width`: of the numbers that they are, 1 where they are none."""
    return b"".join(pack_chunks(io.BytesIO(raw).read, len(raw), width))


def pack_chunks(read: Callable[[int], bytes], total: int, width: int = 1) -> Iterator[bytes]:
    """What `pack_bytes` gives, piece by piece: `read(n)` is asked for the `total` bytes in chunks of 4 MiB. Each is stored by the best of raw,
    zlib, and rANS of every byte plane: of bytes, of numbers, of numbers turned left by a bit (which puts the whole exponent of a float32 or
    bfloat16 into one plane, and the sign beside the mantissa; ZipNN, arXiv:2411.05239, DFloat11, arXiv:2504.11651)."""
    yield varint(total)
    done = 0
    while done < total:
        chunk = read(min(CHUNK, total - done))
        if not chunk:
            raise PackedError("the bytes to pack end too early")
        done += len(chunk)
        ways = [b"\0" + chunk, b"\1" + zlib.compress(chunk, 9)]
        splits = {}
        for planes in sorted({1, width}):
            if planes <= 8 and len(chunk) % planes == 0 and len(chunk) >= 64 * planes:
                splits[1 + planes] = np.frombuffer(chunk, np.uint8).reshape(-1, planes).T
                if planes in (2, 4):
                    turned = _turned(np.frombuffer(chunk, f"<u{planes}"), 1)
                    splits[16 + planes] = turned.view(np.uint8).reshape(-1, planes).T
        if splits:
            way = min(splits, key=lambda w: sum(min(_entropy(p), 8.0) * p.size for p in splits[w]))
            ways.append(bytes([way]) + _pack_planes(splits[way]))
        best = min(ways, key=len)
        yield varint(len(best)) + best


def _turned(numbers: Any, left: int) -> Any:
    """Unsigned numbers with their bits turned left, little-endian."""
    bits = 8 * numbers.dtype.itemsize
    return ((numbers << left) | (numbers >> (bits - left))).astype(numbers.dtype)


def _entropy(plane: Any) -> float:
    """Bits a byte."""
    counts = np.bincount(plane)
    share = counts[counts > 0] / plane.size
    return float(-(share * np.log2(share)).sum())


def _pack_planes(planes: Any) -> bytes:
    """Each plane after its coded length; 0: as it is."""
    out = []
    for plane in planes:
        coded = rans_encode(plane) if _entropy(plane) < 7.98 else None
        out.append(varint(len(coded)) + coded if coded is not None and len(coded) < plane.size else varint(0) + plane.tobytes())
    return b"".join(out)


def unpack_bytes(data: bytes) -> bytes:
    """Raises `PackedError`."""
    return b"".join(unpack_chunks(io.BytesIO(data).read))


def unpack_chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What was packed, in chunks of at most 4 MiB; `read(n)` gives the packed bytes. Needs memory for a few chunks. Raises `PackedError`."""
    total, done = _read_number(read), 0
    while done < total:
        length, size = _read_number(read), min(CHUNK, total - done)
        body = read(length) if length <= 2 * CHUNK else b""
        if len(body) < length or not body:
            raise PackedError("packed bytes end too early")
        if body[0] == 0:
            chunk = body[1:]
        elif body[0] == 1:
            try:
                chunk = zlib.decompressobj().decompress(body[1:], size)
            except zlib.error as error:
                raise PackedError(f"packed bytes are damaged: {error}") from None
        elif body[0] > 16:
            width = body[0] - 16
            if width not in (2, 4):
                raise PackedError("packed bytes are of another kind")
            chunk = _turned(np.frombuffer(_unpack_planes(body[1:], width, size), f"<u{width}"), 8 * width - 1).tobytes()
        else:
            chunk = _unpack_planes(body[1:], body[0] - 1, size)
        if len(chunk) != size:
            raise PackedError("packed bytes have the wrong length")
        done += size
        yield chunk


def _read_number(read: Callable[[int], bytes]) -> int:
    """A varint from a stream."""
    n = shift = 0
    while True:
        byte = read(1)
        if not byte or shift > 63:
            raise PackedError("packed bytes end too early")
        n |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return n
        shift += 7


def _unpack_planes(body: bytes, planes: int, size: int) -> bytes:
    rows, at = np.empty((size // planes, planes), np.uint8), 0
    for i in range(planes):
        length, at = read_varint(body, at)
        taken = length or len(rows)
        part = body[at : at + taken]
        if len(part) < taken:
            raise PackedError("packed bytes end too early")
        rows[:, i] = rans_decode(part, len(rows)) if length else np.frombuffer(part, np.uint8)
        at += taken
    return rows.tobytes()


@dataclass(frozen=True)
class Piece:
    """One weight inside a program: at `offset`, `code` decoded, reshaped, its axes in the order `axes`, written as `dtype`.

    dtype "float32" or "float16": the decoded values; "int8": the integers of a grid, their middle taken off; "int8-row": the decoded values as
    int8 with one float32 scale a row, which the program holds at `scales`; "int4": the integers of a 4-bit grid, two in a byte, the first one low;
    "scales": the scales of a grid as bfloat16. `patches` are (position, byte) where the program differs by rounding.
    """

    offset: int
    code: Code
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str = "float32"
    scales: int = 0
    patches: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of it in the program."""
        return int(math.prod(self.shape) * PIECES[self.dtype])

    def content(self, scales: Any = None, base: Any = None) -> bytes:
        if self.dtype == "int8":
            values = (self.code.arrays[0].astype(np.int16) - (1 << (self.code.numbers[0] - 1))).astype(np.int8)
        elif self.dtype == "int4":
            flat = self.code.arrays[0].reshape(-1)
            return bytes(flat[0::2] | (flat[1::2] << 4))
        elif self.dtype == "scales":
            values = (self.code.arrays[1].astype("<f4").view("<u4") >> 16).astype("<u2")
        else:
            values = decode(self.code, base)
            values = to_int8(values, scales) if self.dtype == "int8-row" else values.astype(np.dtype(self.dtype).newbyteorder("<"))
        content = bytearray(np.ascontiguousarray(values.reshape(self.shape).transpose(self.axes)).tobytes())
        for position, value in self.patches:
            content[position] = value
        return bytes(content)


def to_int8(values: Any, scales: Any) -> Any:
    """[rows, cols] as int8 with a float32 scale a row: round(values / scale) within ±127."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.clip(np.rint(values / scales[:, None]), -127, 127)).astype(np.int8)


def pack_program(program: bytes, pieces: list[Piece]) -> bytes:
    """A program with its weights in few bytes; a code that several pieces share is stored once. `expand_program` gives back exactly these bytes;
    raises `PackedError` if a piece would not."""
    pieces = sorted(pieces, key=lambda p: p.offset)
    codes = list({id(p.code): p.code for p in pieces}.values())
    places = {id(code): i for i, code in enumerate(codes)}
    written = [pack(code) for code in codes]
    head = [varint(len(codes)), *(varint(len(w)) + w for w in written), varint(len(pieces))]
    rest, end = [], 0
    for piece in pieces:
        if piece.offset < end or program[piece.offset : piece.offset + piece.size] != piece.content(_scales(program, piece, piece.scales)):
            raise PackedError(f"the program does not hold this weight at byte {piece.offset}")
        head.append(varint(piece.offset) + varint(places[id(piece.code)]) + bytes([list(PIECES).index(piece.dtype), len(piece.shape)]))
        patches, last = b"", 0
        for position, value in piece.patches:
            patches, last = patches + varint(position - last) + bytes([value]), position
        head.append(b"".join(varint(n) for n in (*piece.shape, *piece.axes, piece.scales, len(piece.patches))) + patches)
        rest.append(program[end : piece.offset])
        end = piece.offset + piece.size
    rest.append(program[end:])
    content = b"".join(head) + pack_bytes(b"".join(rest), 4)
    out = MAGIC + hashlib.sha256(program).digest() + struct.pack("<Q", len(program)) + content
    if expand_program(out) != program:
        raise PackedError("the scales of a weight lie in another weight")
    return out


def _scales(data: Any, piece: Piece, at: int) -> Any:
    """The scales of an "int8-row" piece, one a row, at `at` of `data`."""
    if piece.dtype != "int8-row":
        return None
    return np.frombuffer(data, "<f4", piece.shape[0], at)


def is_packed(data: bytes) -> bool:
    return data[: len(MAGIC)] == MAGIC


def expand_program(data: bytes) -> bytes:
    """The program, byte for byte. Raises `PackedError` when anything is damaged."""
    out = io.BytesIO()
    expand_to(io.BytesIO(data).read, out)
    return out.getvalue()


def expand_to(read: Callable[[int], bytes], target: Any) -> None:
    """Write the program to `target`, a binary file open for reading and writing, from a stream that `read(n)` reads.

    Needs memory for the codes as they are packed, one weight and a few chunks. Raises `PackedError`; `target` then holds nothing of use.
    """
    head = read(48)
    if not is_packed(head) or len(head) < 48:
        raise PackedError("this is no packed program")
    try:
        size = _expand(read, target, struct.unpack_from("<Q", head, 40)[0])
        target.seek(0)
        total = hashlib.sha256()
        for chunk in iter(lambda: target.read(CHUNK), b""):
            total.update(chunk)
    except (ValueError, IndexError, OverflowError, MemoryError, TypeError) as error:
        raise PackedError(f"a packed program is damaged: {error}") from None
    if size != struct.unpack_from("<Q", head, 40)[0] or total.digest() != head[8:40]:
        raise PackedError("a packed program expands to other bytes than it was made of")


def _expand(read: Callable[[int], bytes], target: Any, size: int) -> int:
    """The bytes that were written, of the `size` that were promised."""
    codes = []
    for _ in range(_read_number(read)):
        length = _read_number(read)
        codes.append(read(length))
        if len(codes[-1]) < length:
            raise PackedError("a packed program ends too early")
    pieces, offset = [], 0
    for _ in range(_read_number(read)):
        piece, number = _read_piece(read, len(codes))
        if piece.offset < offset or piece.offset + piece.size > size:
            raise PackedError("the weights of a packed program overlap, or lie behind its end")
        pieces.append((piece, number))
        offset = piece.offset + piece.size
    rest = _Rest(unpack_chunks(read))
    offset, late, last = 0, [], (-1, EMPTY)
    for piece, number in pieces:
        rest.copy(target, piece.offset - offset)
        if piece.dtype == "int8-row":  # its scales may come after it
            late.append((piece, number))
            target.write(bytes(piece.size))
        else:
            last = last if last[0] == number else (number, unpack(codes[number]))
            target.write(replace(piece, code=last[1]).content())
        offset = piece.offset + piece.size
    offset += rest.copy(target, None)
    for piece, number in late:
        target.seek(piece.scales)
        scales = np.frombuffer(target.read(4 * piece.shape[0]), "<f4", piece.shape[0])
        target.seek(piece.offset)
        target.write(replace(piece, code=unpack(codes[number])).content(scales))
    return offset


EMPTY = Code("base", ())


class _Rest:
    """The bytes between the weights, from chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.have = chunks, memoryview(b"")

    def copy(self, target: Any, count: int | None) -> int:
        """Write the next `count` bytes, or all that are left."""
        done = 0
        while count is None or done < count:
            if not self.have:
                self.have = memoryview(next(self.chunks, b""))
                if not self.have:
                    break
            taken = self.have[: None if count is None else count - done]
            target.write(taken)
            self.have = self.have[len(taken) :]
            done += len(taken)
        if count is not None and done < count:
            raise PackedError("a packed program ends too early")
        return done


def _read_piece(read: Callable[[int], bytes], codes: int) -> tuple[Piece, int]:
    """A piece without its code, and the number of that."""
    offset, number, head = _read_number(read), _read_number(read), read(2)
    if len(head) < 2 or head[0] >= len(PIECES) or number >= codes:
        raise PackedError("a packed program ends too early")
    dtype, ndim = list(PIECES)[head[0]], head[1]
    values = [_read_number(read) for _ in range(2 * ndim + 2)]
    position, patches = 0, []
    for _ in range(values[-1]):
        position += _read_number(read)
        patches.append((position, read(1)[0]))
    shape, axes = tuple(values[:ndim]), tuple(values[ndim : 2 * ndim])
    return Piece(offset, EMPTY, shape, axes, dtype, values[-2], tuple(patches)), number


# ---- programs as differences


@dataclass(frozen=True)
class Place:
    """Where the base program holds the weight that a piece differs from: its offset there, and that of its scales ("int8-row")."""

    offset: int
    scales: int = 0

    def values(self, base: bytes, piece: Piece) -> Any:
        """float32, of the shape that the piece's code decodes to."""
        dtype = np.int8 if piece.dtype == "int8-row" else np.dtype(piece.dtype).newbyteorder("<")
        flat = np.frombuffer(base, dtype, math.prod(piece.shape), self.offset).reshape([piece.shape[a] for a in piece.axes])
        values = flat.transpose(np.argsort(piece.axes)).reshape(piece.code.shape).astype(np.float32)
        return values * np.frombuffer(base, "<f4", piece.shape[0], self.scales)[:, None] if piece.dtype == "int8-row" else values


def _foretold(base: bytes, size: int, pieces: list[tuple[Piece, Place]], scales: Any) -> Any:
    """What the base and the pieces say of a program, uint8 [size]; `scales`: the program, where the scales of "int8-row" pieces are right."""
    out = np.zeros(size, np.uint8)
    known = np.frombuffer(base, np.uint8)[:size]
    out[: len(known)] = known
    for piece, place in pieces:
        content = piece.content(_scales(scales, piece, piece.scales), place.values(base, piece))
        out[piece.offset : piece.offset + piece.size] = np.frombuffer(content, np.uint8)
    return out


def pack_difference(program: bytes, base: bytes, base_name: str, pieces: list[tuple[Piece, Place]]) -> bytes:
    """A program as its difference to another one, which lies under `base_name` in the same folder: what the base's bytes and `pieces` (codes that
    may hold "base", their "float32", "float16" or "int8-row" places in both programs) do not foretell is stored byte by byte, packed.
    `expand_difference` gives back exactly `program`. Raises `PackedError` if it would not."""
    pieces = sorted(pieces, key=lambda p: p[0].offset)
    head = [varint(len(base_name.encode())), base_name.encode(), varint(len(pieces))]
    for piece, place in pieces:
        written = pack(piece.code)
        numbers = (piece.offset, place.offset, piece.scales, place.scales, len(written), list(PIECES).index(piece.dtype), len(piece.shape))
        head.append(b"".join(varint(n) for n in (*numbers, *piece.shape, *piece.axes)) + written)
    missing = np.frombuffer(program, np.uint8) - _foretold(base, len(program), pieces, program)
    digests = hashlib.sha256(program).digest() + hashlib.sha256(base).digest()
    out = DIFFERENCE + digests + struct.pack("<Q", len(program)) + b"".join(head) + pack_bytes(missing.tobytes())
    if expand_difference(out, base) != program:
        raise PackedError("the scales of a weight lie in another weight")
    return out


def base_of(data: bytes) -> str:
    """The name of the base program that a difference wants beside it. Raises `PackedError`."""
    length, at = read_varint(data, 80)
    name = data[at : at + length].decode("utf-8", "replace")
    if data[:8] != DIFFERENCE or not name or len(name) < length or any(c in name for c in "/\\"):
        raise PackedError("this is no difference to a program")
    return name


def expand_difference(data: bytes, base: bytes) -> bytes:
    """The program, byte for byte. Raises `PackedError` when anything is damaged or the base is another one."""
    if data[:8] != DIFFERENCE or len(data) < 80:
        raise PackedError("this is no difference to a program")
    if hashlib.sha256(base).digest() != data[40:72]:
        raise PackedError("this is a difference to another base program")
    (size,) = struct.unpack_from("<Q", data, 72)
    length, at = read_varint(data, 80)
    read = io.BytesIO(data[at + length :]).read
    try:
        pieces = [_read_difference(read) for _ in range(_read_number(read))]
        missing = np.frombuffer(b"".join(unpack_chunks(read)), np.uint8)
        if len(missing) != size:
            raise PackedError("a difference to a program ends too early")
        plain = missing + _foretold(base, size, [], b"")
        out = (missing + _foretold(base, size, pieces, plain)).tobytes()
    except (ValueError, IndexError, OverflowError, MemoryError, TypeError) as error:
        raise PackedError(f"a difference to a program is damaged: {error}") from None
    if hashlib.sha256(out).digest() != data[8:40]:
        raise PackedError("a difference to a program expands to other bytes than it was made of")
    return bytes(out)


def _read_difference(read: Callable[[int], bytes]) -> tuple[Piece, Place]:
    offset, there, scales, scales_there, length, dtype, ndim = (_read_number(read) for _ in range(7))
    if dtype >= len(PIECES) or list(PIECES)[dtype] not in ("float32", "float16", "int8-row"):
        raise PackedError("a difference to a program is of another kind")
    shape, axes = (tuple(_read_number(read) for _ in range(ndim)) for _ in range(2))
    return Piece(offset, unpack(read(length)), shape, axes, list(PIECES)[dtype], scales), Place(there, scales_there)


def load_program(path: str) -> bytes:
    """The program in a file, which holds it as it is, packed, or as a difference to a program beside it. Raises `PackedError` and `OSError`."""
    with open(path, "rb") as file:
        data = file.read()
    if is_packed(data):
        return expand_program(data)
    if data[: len(DIFFERENCE)] != DIFFERENCE:
        return data
    other = os.path.join(os.path.dirname(path), base_of(data))
    if os.path.abspath(other) == os.path.abspath(path):
        raise PackedError("a difference to a program names itself as its base")
    return expand_difference(data, load_program(other))
