"""Weights that stay floats as panels. On the machine that builds a program."""

from __future__ import annotations

from typing import Any

import numpy as np

from .panels import FloatPanels, aligned

NONE = np.zeros(0, np.float32)


def pack_floats(weight: Any, bits: int, lanes: int, together: int = 1) -> FloatPanels:
    """A float32 matrix [rows, cols] in 32 or 16 bits. A row's float16 values are multiples of a power of two, so that none is too large or small."""
    rows, cols = weight.shape
    padded = -(-rows // (lanes * together)) * lanes * together
    values = np.zeros((padded, cols), np.float32)
    values[:rows] = weight
    row_scale = np.ones(padded, np.float32)
    if bits == 16:
        most = np.abs(values).max(1, initial=0)
        row_scale = np.exp2(np.clip(np.floor(np.log2(np.where(most > 0, most, 1))) - 14, -120, 120)).astype(np.float32)
        values = (values / row_scale[:, None]).astype(np.float16)
    codes = aligned(values.reshape(-1, lanes, cols).transpose(0, 2, 1))
    return FloatPanels(
        rows=rows, cols=cols, bits=bits, group=0, lanes=lanes, codes=codes, scales=NONE, zeros=NONE, row_scale=row_scale, sums=NONE
    )  # fmt: skip


def unpacked(p: FloatPanels) -> Any:
    """The weights that panels hold, float32 [rows, cols]."""
    values = (
        p.codes.view(np.float16 if p.bits == 16 else np.float32).reshape(p.panels, p.cols, p.lanes).transpose(0, 2, 1).reshape(-1, p.cols)
    )
    return (values.astype(np.float32) * p.row_scale[:, None])[: p.rows]
