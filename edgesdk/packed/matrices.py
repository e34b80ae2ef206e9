"""Matrices of integers in few bytes: distributions by the sizes of rows and columns, the trellis, and N:M patterns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .arrays import pack_array, unpack_array
from .entropy import FEW, LOW, PROB_BITS, PackedError, decode_few, encode_steps, lanes_of, read_varint, varint

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

    @cached_property
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

    @cached_property
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
    best = np.argmax(
        np.round(hist @ _log_shares(first.tobytes(), fall.tobytes(), hist.shape[1]).T, 6), 1
    )  # rounded: the same on any number of threads
    return first[best], fall[best]


@lru_cache(maxsize=256)
def _log_shares(first: bytes, fall: bytes, most: int) -> Any:
    """Natural logarithms of the shares of |k| = 1, 2, … most for pairs (first ratio, fall), each bytes of intp: [pairs, most]."""
    a, b = (LOG_EXPS[np.frombuffer(v, np.intp)][:, None] for v in (first, fall))
    n = np.arange(most)
    logp = np.maximum(n * a + (n * (n - 1) / 2) * b, -60.0)
    return logp - np.log(np.exp(logp).sum(1, keepdims=True))


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
    inner, outer = v >> 1, (v + np.sign(v)) >> 1  # the indices in states 0 and 1, and in 2 and 3
    parities = (inner & 1) + 2 * (outer & 1)
    following = np.array([[after[parity >> (state >> 1) & 1] for parity in range(4)] for state, after in enumerate(TRELLIS)]).ravel()
    state, states = np.zeros(v.shape[1], np.intp), np.empty(v.shape, np.intp)
    for i in range(len(v)):
        states[i] = state
        if i % 16 == 0 and np.any((v[i] & 1 != state >> 1) & (v[i] != 0)):
            return None
        state = following.take(4 * state + parities[i])
    bank = (states >> 1).astype(v.dtype)
    k = np.where(bank == 1, outer, inner)
    return (k, bank) if np.array_equal(2 * k - bank * np.sign(k), v) else None


CLASS_STEPS = ((0.5, 0.5), (1.0, 1.0), (0.0, 0.0), (0.0, 0.5), (0.5, 0.0))


def best_model(q: Any) -> tuple[int, Any, Any, Model, float] | None:
    """What writes q [rows, cols] in the fewest bytes: the value that stands for 0, indices, banks (None: no trellis), the model, and about
    how many bytes it takes. None where matrices are not coded."""
    if q.ndim != 2 or q.size < 128 or q.max() == q.min() or int(q.max()) - int(q.min()) > 4000:
        return None
    best: tuple[int, Any, Any, Model, float] | None = None
    values = {
        middle: q.astype(np.int64) - middle for middle in (1 << (int(q.max()).bit_length() - 1), int(np.bincount(q.ravel()).argmax()))
    }
    found = {middle: turned for middle, v in values.items() if (turned := to_trellis(v)) is not None}
    for middle, (k, bank) in (found or {middle: (v, None) for middle, v in values.items()}).items():
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
    head += (
        b"".join(_pack_classes(a.tobytes()) for a in (model.row, model.col)) + varint(len(used)) + b"".join(varint(int(n)) for n in used)
    )
    return head + shapes.tobytes()


@lru_cache(maxsize=64)
def _pack_classes(classes: bytes) -> bytes:
    return pack_array(np.frombuffer(classes, np.uint8), True)


def _per_step(count: int, cols: int) -> int:
    """Columns of a row that are coded at once: what a trellis needs to know is always decoded before."""
    return min(lanes_of(count), cols)


def _coded_matrix(middle: int, k: Any, bank: Any, model: Model) -> bytes:
    freq = model.freq
    at = model.contexts(), np.zeros_like(k) if bank is None else bank, k + model.most
    f, c = (a[at] for a in (freq, np.cumsum(freq, -1) - freq))
    return _model_bytes(model, middle, bank) + encode_steps(f, c, _per_step(k.size, k.shape[1]))


def _unpack_matrix(data: bytes, rows: int, cols: int) -> Any:
    """Values [rows, cols]. Raises `PackedError`."""
    trellis, at = read_varint(data, 0)
    middle, at = read_varint(data, at)
    most, at = read_varint(data, at)
    row, at = unpack_array(data, at)
    col, at = unpack_array(data, at)
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
    """Decode row by row: the indices, or what they stand for in the trellis. Raises `PackedError`."""
    out, state, following = np.empty(context.shape, np.int64), np.zeros(context.shape[1], np.intp), np.array(TRELLIS)
    symbols = (_FewSymbols if len(x) < FEW else _Symbols)(freq, x, words)
    for i in range(len(out)):
        bank = state >> 1
        out[i] = k = symbols.row(context[i] + bank if trellis else context[i]) - most
        if trellis:
            out[i] = 2 * k - bank * np.sign(k)
            state = following[state, k & 1]
    symbols.end()
    return out


class _Symbols:
    """Coded symbols, row by row; `freq` [tables, symbols]."""

    def __init__(self, freq: Any, x: Any, words: Any) -> None:
        self.slot = np.stack([np.repeat(np.arange(freq.shape[1], dtype=np.int16), n) for n in freq])
        self.freq, self.cum = freq.astype(np.uint64), (np.cumsum(freq, 1) - freq).astype(np.uint64)
        self.x, self.words, self.read = x, np.concatenate([words, np.zeros(len(x), np.uint16)]).astype(np.uint64), 0

    def row(self, tables: Any) -> Any:
        """The next symbols, each with the number of its table."""
        out, mask = np.empty(len(tables), np.int64), np.uint64((1 << PROB_BITS) - 1)
        for start in range(0, len(tables), len(self.x)):
            which = tables[start : start + len(self.x)]
            part = self.x[: len(which)]
            low = part & mask
            symbol = self.slot[which, low.astype(np.intp)]
            part[:] = self.freq[which, symbol] * (part >> np.uint64(PROB_BITS)) + low - self.cum[which, symbol]
            short = part < LOW
            count = int(np.count_nonzero(short))
            if count:
                part[short] = (part[short] << np.uint64(16)) | self.words[self.read : self.read + count]
                self.read += count
            out[start : start + len(which)] = symbol
        return out

    def end(self) -> None:
        """Raises `PackedError` where more was coded."""
        if self.read != len(self.words) - len(self.x) or not bool(np.all(self.x == LOW)):
            raise PackedError("an entropy-coded array is damaged")


class _FewSymbols:
    """The same by Python's integers."""

    def __init__(self, freq: Any, x: Any, words: Any) -> None:
        self.freq, self.cum = freq.tolist(), (np.cumsum(freq, 1) - freq).tolist()
        self.x, self.words, self.read = x.tolist(), words.tolist(), 0

    def row(self, tables: Any) -> Any:
        out, self.read = decode_few(self.x, self.words, self.read, tables.tolist(), self.cum, self.freq)
        return np.array(out, np.int64)

    def end(self) -> None:
        if self.read != len(self.words) or any(x != LOW for x in self.x):
            raise PackedError("an entropy-coded array is damaged")


def _read_varints(data: bytes, at: int) -> tuple[list[int], int]:
    count, at = read_varint(data, at)
    values = []
    for _ in range(count):
        n, at = read_varint(data, at)
        values.append(n)
    return values, at


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
            return varint(m) + varint(middle) + pack_integers(bits, True, False) + pack_integers(left, True, False)
    return None


def _unpack_patterns(data: bytes, rows: int, cols: int) -> Any:
    """Raises `PackedError`."""
    m, at = read_varint(data, 0)
    middle, at = read_varint(data, at)
    bits, at = unpack_integers(data, at)
    left, at = unpack_integers(data, at)
    if m not in (4, 8, 16) or bits.shape != (rows, -(-cols // m)):
        raise PackedError("the patterns of a pruned array are damaged")
    mask = ((bits[..., None].astype(np.uint32) >> np.arange(m, dtype=np.uint32)) & 1).reshape(rows, -1)[:, :cols].astype(bool)
    if int(mask.sum()) != left.size:
        raise PackedError("the patterns of a pruned array are damaged")
    out = np.full((rows, cols), middle, np.int64)
    out[mask] = left.ravel()
    return out


_READERS: dict[int, Callable[[bytes, int, int], Any]] = {5: _unpack_matrix, 6: _unpack_patterns}


def pack_integers(a: Any, entropy: bool, patterns: bool = True) -> bytes:
    """Any array as `pack_array` writes it; matrices of integers also by rANS with a model of rows and columns, or by patterns of every m and
    what they leave (within patterns there are none: each would call for the next)."""
    further = []
    if entropy and a.ndim == 2 and a.size and a.dtype in (np.uint8, np.uint16):
        a = np.ascontiguousarray(a)
        ways = (5, _pack_matrix(a)), (6, _pack_patterns(a) if patterns else None)
        further = [(way, payload) for way, payload in ways if payload is not None]
    return pack_array(a, entropy, further)


def unpack_integers(data: bytes, at: int) -> tuple[Any, int]:
    """What `pack_integers` wrote, and where its bytes end. Raises `PackedError`."""
    return unpack_array(data, at, _READERS)
