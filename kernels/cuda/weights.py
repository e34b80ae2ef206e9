"""Codes of weights → tiles, on the machine that builds a program."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesdk.kernels.pack import bits_and_group
from edgesdk.kernels.panels import UnfitWeights
from edgesdk.packed import Code, groups_of

from .tiles import STEP, TILE, WIDTH, Tiles


def pack(code: Code) -> Tiles:
    """The tiles of a `grid` of 2, 3, 4 or 8 bits or a `table` of 2, 3 or 4, its groups whole rows or powers of two from 32. Raises `UnfitWeights`."""
    bits, group = bits_and_group(code)
    rows, cols = code.shape
    group = 0 if group >= cols else group
    if group and (group < 32 or group & (group - 1)):
        raise UnfitWeights(f"groups of {group} columns: the kernels read powers of two from 32 and whole rows")
    q, scale = code.arrays[0], code.arrays[1 if code.kind == "grid" else 2].astype(np.float32)
    scale = np.broadcast_to(scale if scale.size else np.float32(1), (rows, groups_of(cols, group)))
    largest = np.abs(scale).max(1)
    largest[largest == 0] = 1
    padded, width = -(-rows // TILE) * TILE, -(-cols // max(WIDTH, STEP[bits])) * max(WIDTH, STEP[bits])
    offset, zeros = _zeros(code, rows, cols, group)
    tables, row_scale = _tables(code, largest, padded)
    ints = np.zeros((padded, width), np.uint8)  # columns beyond the last are read with x = 0, rows beyond the last are not written
    ints[:rows, :cols] = q
    codes, high = _arranged(ints, bits)
    per = 1 if group == 0 else -(-width // group)
    return Tiles(
        rows=rows, cols=cols, bits=bits, group=group, codes=codes, high=high,
        scales=_paired(scale / largest[:, None], padded, per, np.float16) if group else np.zeros(0, np.float16),
        zeros=_paired(offset, padded, per, np.uint8) if zeros else np.zeros(0, np.uint8),
        tables=tables, row_scale=row_scale,
    )  # fmt: skip


def _zeros(code: Code, rows: int, cols: int, group: int) -> tuple[Any, bool]:
    """The zero of every group [rows, groups], and whether they are any but the middle."""
    bits = code.numbers[0]
    middle = 1 << (bits - 1)
    zero = code.arrays[2].astype(np.float32) if code.kind == "grid" and code.arrays[2].size else np.float32(middle)
    offset = np.broadcast_to(zero, (rows, groups_of(cols, group)))
    if (offset != np.rint(offset)).any() or offset.min() < 0 or offset.max() >= 1 << bits:
        raise UnfitWeights("zeros that are no codes: the kernels read whole zeros from 0 to 2^bits - 1")
    return offset, bool((offset != middle).any())


def _tables(code: Code, largest: Any, padded: int) -> tuple[Any, Any]:
    """Tables of at most 1 in float16, and the scale of every row that gives them their size back."""
    row_scale = np.zeros(padded, np.float32)
    row_scale[: len(largest)] = largest
    if code.kind == "grid":
        return np.zeros(0, np.float16), row_scale
    table = code.arrays[1].astype(np.float32)
    size = np.abs(table).max(1)
    size[size == 0] = 1
    tables = np.zeros((1 if len(table) == 1 else padded, 16), np.float16)
    tables[: len(table), : table.shape[1]] = table / size[:, None]
    row_scale[: len(largest)] *= size
    return tables, row_scale


def _paired(values: Any, padded: int, per: int, dtype: Any) -> Any:
    """[rows, groups] → [tiles, groups, 8, 2]: rows g and g + 8 side by side; groups beyond the last hold 0."""
    out = np.zeros((padded, per), dtype)
    out[: len(values), : values.shape[1]] = values
    return np.ascontiguousarray(out.reshape(-1, 2, 8, per).transpose(0, 3, 2, 1))


def _arranged(ints: Any, bits: int) -> tuple[Any, Any]:
    """Codes [padded rows, width] → the planes of low and of high bits. A column is (step, 32-block, t, half of eight, half of four, second)."""
    rows, width = ints.shape
    step = STEP[bits]
    parts = ints.reshape(
        rows // TILE, 2, 8, width // step, step // 32, 4, 2, 2, 2
    )  # tile, row half, g, step, block, t, half 8, half 4, second
    pairs = parts.transpose(0, 3, 2, 5, 4, 6, 7, 1, 8).reshape(rows // TILE, width // step, 32, step // 4, 2).astype(np.uint32)
    if bits != 3:
        return _words(pairs, bits), np.zeros(0, np.uint32)
    return _words(pairs & 3, 2), _words(pairs >> 2, 1)


def _words(pairs: Any, bits: int) -> Any:
    """[…, pairs, 2] → […, words]: pair i of a word at bit bits · i and 16 + bits · i."""
    per = 16 // bits
    grouped = pairs.reshape(*pairs.shape[:-2], -1, per, 2)
    out = np.zeros(grouped.shape[:-2], np.uint32)
    for i in range(per):
        out |= grouped[..., i, 0] << np.uint32(bits * i) | grouped[..., i, 1] << np.uint32(16 + bits * i)
    return out
