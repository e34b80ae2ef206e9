"""Weights as the GPU kernels read them: tiles of 16 rows in the order of tensor cores' operands, 16 bytes a lane (`weights.cuh` says which is which).

Scales are float16 of at most 1 beside one float32 a row, as in `panels`; zeros are bytes; codes of a `table` are looked up in 16 float16 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TILE = 16
"""Rows of a tile."""
STEP = {2: 128, 3: 128, 4: 64, 8: 32}
"""Bits of a code → columns of a step: 16 bytes a lane (of 3 bits: 24)."""
WIDTH = 64
"""Columns are filled up to whole steps and to a multiple of this, which x meets with zeros."""


PARTS = ("codes", "high", "scales", "zeros", "tables", "row_scale")
LAYOUT = 1
"""Raised by one whenever tiles are laid out anew: programs of another number are refused."""


@dataclass(frozen=True)
class Tiles:
    """`codes` uint32 [tiles, steps, 32 lanes, 4]; `high` (3 bits) uint32 [tiles, steps, 32, 2]; `scales` float16 and `zeros` uint8
    [tiles, groups, 8, 2] (rows g and g + 8; empty where there are none); `tables` float16 [1 or padded rows, 16], or empty; `row_scale`
    float32 [padded rows]."""

    rows: int
    cols: int
    bits: int
    group: int  # columns; 0: the whole row
    codes: Any
    high: Any
    scales: Any
    zeros: Any
    tables: Any
    row_scale: Any

    @property
    def tiles(self) -> int:
        return int(self.codes.shape[0])

    @property
    def steps(self) -> int:
        return int(self.codes.shape[1])

    @property
    def groups(self) -> int:
        return 1 if self.group == 0 else -(-self.steps * STEP[self.bits] // self.group)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weights."""
        return sum(int(getattr(self, part).nbytes) for part in PARTS)
