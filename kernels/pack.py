"""Codes of weights → panels, on the machine that builds a program."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesdk.packed import Code, groups_of, spread

from .panels import BLOCK, Panels, UnfitWeights, aligned


def refuse_unfit(code: Code) -> None:
    """Raises `UnfitWeights` for what the kernels do not read: anything but grids of 2, 3, 4 or 8 bits with whole zeros."""
    if code.kind != "grid" or len(code.shape) != 2:
        raise UnfitWeights(f"a code of kind {code.kind} and shape {code.shape} is no grid of rows and columns")
    (bits, group), zero = code.numbers, code.arrays[2]
    if bits not in (2, 3, 4, 8):
        raise UnfitWeights(f"{bits} bits: the kernels read 2, 3, 4 and 8")
    if group < code.shape[1] and group % BLOCK:
        raise UnfitWeights(f"groups of {group} columns: the kernels read multiples of {BLOCK} and whole rows")
    if zero.size and ((zero != np.rint(zero)).any() or zero.min() < 0 or zero.max() >= 1 << bits):
        raise UnfitWeights("zeros that are no codes: the kernels read whole zeros from 0 to 2^bits - 1")


def pack(code: Code, lanes: int, together: int = 1, half: bool = True) -> Panels:
    """The panels of a `grid` code of 2, 3, 4 or 8 bits, their number a multiple of `together`; `half`: scales in float16. Raises `UnfitWeights`."""
    refuse_unfit(code)
    (bits, group), (q, scale, zero) = code.numbers, code.arrays
    rows, cols = code.shape
    group = 0 if group >= cols else group
    groups = groups_of(cols, group)
    scale = np.broadcast_to(scale.astype(np.float32) if scale.size else np.float32(1), (rows, groups))
    middle = 1 << (bits - 1)
    offset = np.broadcast_to(zero.astype(np.float32) if zero.size else np.float32(middle), (rows, groups))
    kept = kept_scales(scale, half and bits != 8)  # as products read them: they take off just what the inputs' zero added
    values = (q.astype(np.float32) - spread(offset, cols, group)) * spread(kept, cols, group)
    row_scale = np.abs(scale).max(1)
    row_scale[row_scale == 0] = 1
    relative = scale / row_scale[:, None]
    asymmetric = bool((offset != middle).any())
    padded = -(-rows // (lanes * together)) * lanes * together
    width = -(-cols // BLOCK) * BLOCK
    ints = np.full((padded, width), middle, np.int16)
    ints[:rows] = spread(offset, width, group)  # columns beyond the last one weigh nothing
    ints[:rows, :cols] = q
    if bits == 8:
        ints -= 128
        offset = offset - 128
        asymmetric = bool((offset != 0).any())
    per = 1 if group == 0 else width // BLOCK
    times = 1 if group == 0 else group // BLOCK
    scales = _paneled(np.repeat(relative, times, 1)[:, :per], padded, lanes, np.float16 if half and bits != 8 else np.float32)
    return Panels(
        rows=rows, cols=cols, bits=bits, group=group, lanes=lanes,
        codes=laid(ints, bits, lanes),
        scales=scales,
        zeros=_paneled(np.repeat(offset, times, 1)[:, :per], padded, lanes, np.int8) if asymmetric else np.zeros(0, np.int8),
        row_scale=_padded(row_scale, padded), sums=_padded(values.sum(1, dtype=np.float64), padded),
    )  # fmt: skip


def kept_scales(scale: Any, half: bool) -> Any:
    """Scales float32 [rows, groups] as panels keep them: in float16 beside the largest of the row."""
    if not half:
        return scale
    row = np.abs(scale).max(1, keepdims=True)
    row[row == 0] = 1
    return (scale / row).astype(np.float16).astype(np.float32) * row


def _padded(values: Any, size: int) -> Any:
    out = np.zeros(size, np.float32)
    out[: len(values)] = values
    return out


def _paneled(values: Any, padded: int, lanes: int, dtype: Any) -> Any:
    rows, per = values.shape
    out = np.zeros((padded, per), dtype)
    out[:rows] = values
    return np.ascontiguousarray(out.reshape(-1, lanes, per).transpose(0, 2, 1))


def laid(ints: Any, bits: int, lanes: int) -> Any:
    """Codes [padded rows, width] → bytes, as `Simd.quads` reads them."""
    rows, width = ints.shape
    quads = (ints & 0xFF).astype(np.uint8).reshape(rows // lanes, lanes, width // 4, 4).transpose(0, 2, 1, 3)  # [panel, quad, row, 4]
    quads = np.ascontiguousarray(quads).reshape(rows // lanes, width // 4, lanes * 4)
    if bits == 8:
        return aligned(quads)
    if bits == 3:
        eights = quads.reshape(*quads.shape[:1], -1, 8, lanes * 4)
        low = _joined((eights & 3).reshape(*eights.shape[:2], 2, 4, lanes * 4), 2)
        high = _joined(eights >> 2, 1)[:, :, None]
        return aligned(np.concatenate([low, high], 2))
    return aligned(_joined(quads.reshape(quads.shape[0], -1, 8 // bits, lanes * 4), bits))


def _joined(parts: Any, bits: int) -> Any:
    """[…, n, bytes] of small codes → […, bytes]: code i of a byte stands `bits · i` up."""
    out = np.zeros((*parts.shape[:-2], parts.shape[-1]), np.uint8)
    for i in range(parts.shape[-2]):
        out |= parts[..., i, :] << (bits * i)
    return out
