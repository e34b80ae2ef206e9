"""Programs as differences to other ones, and programs as files hold them."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import pack, unpack
from .entropy import PackedError, pack_bytes, read_number, read_varint, unpack_chunks, varint
from .program import PIECES, Piece, expand_program, is_packed, scales_of

DIFFERENCE = b"EDGEDIFF"


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
        content = piece.content(scales_of(scales, piece, piece.scales), place.values(base, piece))
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
        pieces = [_read_difference(read) for _ in range(read_number(read))]
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
    offset, there, scales, scales_there, length, dtype, ndim = (read_number(read) for _ in range(7))
    if dtype >= len(PIECES) or list(PIECES)[dtype] not in ("float32", "float16", "int8-row"):
        raise PackedError("a difference to a program is of another kind")
    shape, axes = (tuple(read_number(read) for _ in range(ndim)) for _ in range(2))
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
