"""Whole programs with their weights packed."""

from __future__ import annotations

import hashlib
import io
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import Code, decode, pack, unpack
from .entropy import CHUNK, PackedError, pack_bytes, read_number, unpack_chunks, varint

MAGIC = b"EDGEPACK"
PIECES = {"float32": 4, "float16": 2, "int8": 1, "int8-row": 1, "int4": 0.5, "scales": 2}  # how a program holds a weight → bytes an element
EMPTY = Code("base", ())


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
        if piece.offset < end or program[piece.offset : piece.offset + piece.size] != piece.content(
            scales_of(program, piece, piece.scales)
        ):
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


def scales_of(data: Any, piece: Piece, at: int) -> Any:
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
    for _ in range(read_number(read)):
        length = read_number(read)
        codes.append(read(length))
        if len(codes[-1]) < length:
            raise PackedError("a packed program ends too early")
    pieces, offset = [], 0
    for _ in range(read_number(read)):
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
    offset, number, head = read_number(read), read_number(read), read(2)
    if len(head) < 2 or head[0] >= len(PIECES) or number >= codes:
        raise PackedError("a packed program ends too early")
    dtype, ndim = list(PIECES)[head[0]], head[1]
    values = [read_number(read) for _ in range(2 * ndim + 2)]
    position, patches = 0, []
    for _ in range(values[-1]):
        position += read_number(read)
        patches.append((position, read(1)[0]))
    shape, axes = tuple(values[:ndim]), tuple(values[ndim : 2 * ndim])
    return Piece(offset, EMPTY, shape, axes, dtype, values[-2], tuple(patches)), number
