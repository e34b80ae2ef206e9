"""Weights in few bytes: how compressed weights are written, counted and read back.

These files stand alone (standard library and numpy; Python 3.9 and later): they are sent to the device as they are, beside runner.py, and expand
packed programs there. A `Code` is a small tree; `pack` writes it, `unpack` reads it, `decode` computes the weights. What `pack` returns is what is
counted. Below it: `matrices`, `arrays`, `entropy`; above it: `program` (whole programs), `difference` (programs as differences to others).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .entropy import PackedError, read_varint, varint
from .matrices import pack_integers, unpack_integers

KINDS = ("dense", "grid", "table", "vector", "sparse", "lowrank", "sum", "scaled", "hadamard", "pick", "stack", "base", "masked")


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

    @cached_property
    def packed(self) -> bytes:
        """What `pack` gives: a code is written once, for the report, the facts and the build. Its arrays are not to change."""
        return _written(self, True)


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


def pack(code: Code, entropy: bool = True) -> bytes:
    """The bytes of a code: all that is stored for it. Without `entropy` every integer has a fixed number of bits (what a kernel can index)."""
    return code.packed if entropy else _written(code, False)


def _written(code: Code, entropy: bool) -> bytes:
    head = bytes([KINDS.index(code.kind), len(code.shape), len(code.numbers), len(code.arrays)]) + varint(len(code.parts))
    head += b"".join(varint(n) for n in (*code.shape, *code.numbers))
    return head + b"".join(pack_integers(a, entropy) for a in code.arrays) + b"".join(pack(p, entropy) for p in code.parts)


def unpack(data: bytes) -> Code:
    """The code, which keeps `data` as what it is written as. Raises `PackedError`."""
    try:
        code, at = _unpack_code(data, 0, 0)
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise PackedError(f"packed weights are damaged: {error}") from None
    if at != len(data):
        raise PackedError("bytes are left over behind packed weights")
    code.__dict__["packed"] = bytes(data)
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
        array, at = unpack_integers(data, at)
        found.append(array)
    for _ in range(parts):
        part, at = _unpack_code(data, at, depth + 1)
        inner.append(part)
    return Code(kind, tuple(values[:ndim]), tuple(values[ndim:]), tuple(found), tuple(inner)), at
