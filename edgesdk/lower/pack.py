"""A program whose weights are stored as their codes: few bytes in the bundle and on the wire, expanded byte for byte when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.packed import Code, Piece, decode, pack, pack_program

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

ORDERS = {1: ((0,),), 2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (0, 2, 1)), 4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0), (2, 3, 1, 0))}
"""Orders of axes in which runtimes keep a weight: PyTorch's own, output-first with channels last, and with outputs last."""


def pieces_of(program: bytes, spec: ModelSpec) -> list[Piece]:
    """Where the program holds the weights of `spec.codes`, as float32 or as the integers of an 8-bit grid."""
    from edgesdk.compress.weights import weights_of

    shapes = {name: w.shape for name, w in weights_of(spec).items()}
    found: list[Piece] = []
    taken: list[tuple[int, int]] = []
    for name, code in spec.codes.items():
        if name not in shapes or np.prod(shapes[name]) < 16:
            continue
        for piece in _places(program, code, shapes[name]):
            end = piece.offset + len(piece.content())
            if all(end <= start or piece.offset >= stop for start, stop in taken):
                taken.append((piece.offset, end))
                found.append(piece)
    return found


def _places(program: bytes, code: Code, shape: tuple[int, ...]) -> Iterator[Piece]:
    for dtype, values in _contents(code):
        seen = set()
        for axes in ORDERS.get(len(shape), ()):
            content = np.ascontiguousarray(values.reshape(shape).transpose(axes)).tobytes()
            if content in seen:
                continue
            seen.add(content)
            at = program.find(content)
            while at >= 0:
                yield Piece(at, code, shape, axes, dtype)
                at = program.find(content, at + len(content))


def _contents(code: Code) -> Iterator[tuple[str, Any]]:
    yield "float32", decode(code).astype("<f4")
    if code.kind == "grid" and code.numbers[0] == 8 and not code.arrays[2].size:
        yield "int8", (code.arrays[0].astype(np.int16) - 128).astype(np.int8)


def packed(program: bytes, spec: ModelSpec) -> tuple[bytes, dict[str, int]]:
    """The packed program and its figures in bytes: `packed` (all of it), `codes` (the weights' share), `covered` (float bytes they stand for)."""
    pieces = pieces_of(program, spec)
    content = pack_program(program, pieces)
    codes = {id(p.code): len(pack(p.code)) for p in pieces}
    return content, {"packed": len(content), "codes": sum(codes.values()), "covered": sum(len(p.content()) for p in pieces)}
