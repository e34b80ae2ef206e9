"""Arrays in few bytes: a tag, the shape, and what is shortest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .entropy import PackedError, pack_bytes, rans_decode, rans_encode, read_varint, unpack_bytes, varint

DTYPES = ("uint8", "uint16", "uint32", "int8", "float16", "float32")
NONE: Mapping[int, Callable[[bytes, int, int], Any]] = {}


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


def pack_array(a: Any, entropy: bool, further: Sequence[tuple[int, bytes]] = ()) -> bytes:
    """tag, shape, length, payload. Integers: fixed bits, five ternary digits a byte, or rANS; floats: as they are, or rANS of each byte plane.
    `further`: other ways (tag, payload) to write this array; the shortest is taken."""
    a = np.ascontiguousarray(a)
    raw = a.astype(a.dtype.newbyteorder("<")).tobytes()
    ways: list[tuple[int, bytes]] = [(0, raw)]
    if a.dtype.kind == "u" and a.size:
        bits = _bits_of(a)
        ways.append((1, bytes([bits]) + _pack_bits(a, bits)))
        if bits == 2 and a.max() < 3:
            ways.append((2, _pack_base3(a)))
        if entropy and a.dtype != np.uint32:
            coded = rans_encode(a.ravel(), min(len(payload) for _, payload in (*ways, *further)))
            ways += [(3, coded)] if coded is not None else []
            if a.dtype == np.uint16 and a.size > 64:
                ways.append((4, pack_bytes(raw, 2)))
    elif entropy and a.size > 64:
        ways.append((4, pack_bytes(raw, a.dtype.itemsize)))
    way, payload = min([*ways, *further], key=lambda w: len(w[1]))
    head = bytes([DTYPES.index(a.dtype.name) * 8 + way, a.ndim]) + b"".join(varint(n) for n in a.shape)
    return head + varint(len(payload)) + payload


def unpack_array(data: bytes, at: int, further: Mapping[int, Callable[[bytes, int, int], Any]] = NONE) -> tuple[Any, int]:
    """The array and where its bytes end. `further`: readers of other ways by tag, of (payload, rows, cols). Raises `PackedError`."""
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
    elif way in further and len(shape) == 2:
        flat = further[way](payload, *shape).ravel()
    else:
        raw = unpack_bytes(payload) if way == 4 else payload
        if len(raw) != count * dtype.itemsize:
            raise PackedError("an array of packed weights has the wrong length")
        flat = np.frombuffer(raw, dtype.newbyteorder("<"))
    return flat.astype(dtype).reshape(shape), at + length
