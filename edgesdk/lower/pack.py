"""A program whose weights are stored as their codes: few bytes in the bundle and on the wire, expanded byte for byte when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgesdk.lower.inject import is_grid
from edgesdk.packed import Code, decode, pack
from edgesdk.packed.program import Piece, pack_program, to_int8

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

ORDERS = {1: ((0,),), 2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (0, 2, 1)), 4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0), (2, 3, 1, 0))}
"""Orders of axes in which runtimes keep a weight: PyTorch's own, output-first with channels last, and with outputs last."""


def pieces_of(program: bytes, spec: ModelSpec) -> list[Piece]:
    """Where the program holds the weights of `spec.codes`: as float32, as int8 with a scale a row, or as the integers and scales of a grid."""
    from edgesdk.compress.weights import weights_of

    shapes = {name: w.shape for name, w in weights_of(spec).items()}
    found: list[Piece] = []
    taken: list[tuple[int, int]] = []
    for name, code in spec.codes.items():
        if name not in shapes or np.prod(shapes[name]) < 16:
            continue
        for piece in places(program, code, shapes[name]):
            end = piece.offset + piece.size
            if all(end <= start or piece.offset >= stop for start, stop in taken):
                taken.append((piece.offset, end))
                found.append(piece)
    return found


def places(program: bytes, code: Code, shape: tuple[int, ...]) -> Iterator[Piece]:
    """Where a program holds a weight of this shape."""
    if is_grid(code, 4, 32) and np.prod(shape) % 2 == 0:
        for piece in (Piece(0, code, shape, tuple(range(len(shape))), "int4"), Piece(0, code, code.arrays[1].shape, (0, 1), "scales")):
            at = program.find(piece.content()) if piece.size >= 16 else -1
            if at >= 0:
                yield replace(piece, offset=at)
    weight = decode(code)
    contents = [("float32", weight.astype("<f4"), 0)]
    if is_grid(code, 8, 0):
        contents.append(("int8", (code.arrays[0].astype(np.int16) - 128).astype(np.int8), 0))
    scales = (np.abs(weight).max(1) / np.float32(127)).astype("<f4")  # as every converter here takes them, to the last bit
    at = program.find(scales.tobytes()) if scales.all() else -1
    if at >= 0:
        contents.append(("int8-row", to_int8(weight, scales), at))
    for dtype, values, where in contents:
        seen = set()
        for axes in ORDERS.get(len(shape), ()):
            content = np.ascontiguousarray(values.reshape(shape).transpose(axes)).tobytes()
            if content not in seen:
                seen.add(content)
                for offset, patches in _found(program, content, dtype == "int8-row"):
                    yield Piece(offset, code, shape, axes, dtype, where, patches)


def _found(program: bytes, content: bytes, nearly: bool) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Where `content` lies; `nearly`: with up to 1% of its bytes rounded otherwise (offset, patches)."""
    parts = {content[:64], content[len(content) // 2 :][:64]} if nearly else {content}
    for part in parts:
        ahead = content.find(part)
        at = program.find(part)
        hit = False
        while at >= 0:
            there = np.frombuffer(program[at - ahead : at - ahead + len(content)], np.uint8) if at >= ahead else np.zeros(0, np.uint8)
            if len(there) == len(content):
                other = np.flatnonzero(there != np.frombuffer(content, np.uint8))
                if len(other) <= len(content) // 100:
                    hit = True
                    yield at - ahead, tuple((int(i), int(there[i])) for i in other)
            at = program.find(part, at + len(part))
        if hit:
            return


def packed(program: bytes, spec: ModelSpec) -> tuple[bytes, dict[str, int]]:
    """The packed program and its figures in bytes: `packed` (all of it), `codes` (the weights' share), `covered` (the program's bytes they stand for)."""
    pieces = pieces_of(program, spec)
    content = pack_program(program, pieces)
    codes = {id(p.code): len(pack(p.code)) for p in pieces}
    return content, {"packed": len(content), "codes": sum(codes.values()), "covered": sum(p.size for p in pieces)}
