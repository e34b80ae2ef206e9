"""Weights as the kernels read them: panels of a few rows, quads of columns side by side, codes of 8, 4, 3 or 2 bits.

    y[m, n] = xs[m] · (rs[n] · Σ_g scale[n, g] · Σ_k (c[n, k] - zero[n, g]) · q[m, k] - xz[m] · sums[n])      x[m, k] ≈ xs[m] · (q[m, k] - xz[m])

`c` are the weights' codes, or the int8 numbers that they stand for in a table; `q` the inputs rounded to int8 when the kernel is called. Scales
are kept as float16 of at most 1 beside one float32 a row, so that no weight is too small or too large for them. One layout serves every target;
only the rows of a panel differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .library import FLOATS, TABLES, form

BLOCK = 32
"""Columns that are summed in integers before a scale is applied; a group is one or more whole blocks, or the whole row."""


SUPER = 8
"""Blocks of a super-block, which share a float."""
OFFSET = 16
"""Parts of a step that an offset of a block counts in."""
TRITS = 3
"""Blocks whose quads are in one code each of ternary weights."""


LAYOUT = 4
"""Raised by one whenever panels are laid out anew: programs of another number are refused."""


PARTS = ("codes", "scales", "zeros", "row_scale", "sums", "tables")
"""The arrays of `Panels`."""


class UnfitWeights(ValueError):
    """These weights have no form that the kernels read."""


@dataclass(frozen=True)
class Panels:
    """`codes` uint8, a panel after the other; `scales` float16 (of 8 bits, or without `half`: float32) [panels, blocks or 1, lanes]; `zeros` int8 of the same shape, or empty
    where every zero is 2^(bits-1); `row_scale`, `sums` (Σ of the row's weights) float32 [padded rows]. `kind`: see `library.KINDS`. `tables` int8
    [1, 16] of "table", [panels, 4, lanes / 4, 16] of "tables": row 4i + j of a panel at [j, i]. Of "super" `scales` are uint8 steps and int8 offsets
    [panels, blocks, 2 · lanes], and `tables` the float16 (float32 without `half`) of super-blocks [panels, super-blocks, lanes]: `pack.rounded_supers`. Of "trits" `tables`
    are int8 [1, 3, 32]: what a code of 5 bits says of quad j of the first, second and third of `TRITS` blocks."""

    rows: int
    cols: int
    bits: int
    group: int  # 0: the whole row
    lanes: int  # rows of a panel
    codes: Any
    scales: Any
    zeros: Any
    row_scale: Any
    sums: Any
    kind: str = ""
    tables: Any = field(default_factory=lambda: np.zeros(0, np.int8))

    @property
    def form(self) -> str:
        """What the names of their kernels end in."""
        return form(self.bits, self.group != 0, self.zeros.size > 0, self.kind)

    @property
    def value_bits(self) -> int:
        """Bits of what meets the inputs, as `Library.shift_of` takes them."""
        return 8 if self.kind in TABLES else self.bits

    @property
    def panels(self) -> int:
        return len(self.row_scale) // self.lanes

    @property
    def blocks(self) -> int:
        return -(-self.cols // BLOCK)

    @property
    def quads(self) -> int:
        return self.blocks * BLOCK // 4

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weights."""
        return sum(int(getattr(self, part).nbytes) for part in PARTS)


NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class SparsePanels(Panels):
    """Panels without weights that are zero. `pattern` "2of4": `codes` of two of each four columns, then which two they are (`sparse.PATTERNS`).
    "blocks": the blocks of 32 columns that are not all zero, their scales and zeros alike: those of panel p are starts[p] … starts[p + 1] - 1, and
    kept[i] says which block the i-th is; int32."""

    pattern: str = ""
    starts: Any = field(default_factory=lambda: NONE)
    kept: Any = field(default_factory=lambda: NONE)

    @property
    def form(self) -> str:
        return f"{super().form}_{self.pattern}"

    @property
    def value_bits(self) -> int:
        """Weights of n of m are signed whatever their bits are."""
        return super().value_bits if self.starts.size else 8

    @property
    def nbytes(self) -> int:
        return super().nbytes + int(self.starts.nbytes + self.kept.nbytes)


@dataclass(frozen=True)
class FloatPanels(Panels):
    """Weights as they are, `bits` 32 or 16: `codes` [panels, cols, lanes], and `row_scale`, a power of two that keeps float16 from its limits."""

    @property
    def form(self) -> str:
        return str(self.bits)


SIZES = ("rows", "cols", "bits", "group", "lanes", "kind")


def written(p: Panels) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, which JSON holds, and arrays by name: what `read` takes."""
    more = {"pattern": p.pattern} if isinstance(p, SparsePanels) else {}
    parts = (*PARTS, "starts", "kept") if isinstance(p, SparsePanels) else PARTS
    return {name: getattr(p, name) for name in SIZES} | more, {part: getattr(p, part) for part in parts}


def read(sizes: dict[str, Any], array: Callable[[str], Any]) -> Panels:
    """Panels of these sizes, whose arrays `array` gives by name."""
    arrays = {part: array(part) for part in PARTS}
    if "pattern" in sizes:
        return SparsePanels(**sizes, **arrays, starts=array("starts"), kept=array("kept"))
    return (FloatPanels if str(sizes["bits"]) in FLOATS else Panels)(**sizes, **arrays)


def aligned(array: Any, boundary: int = 64) -> Any:
    """A flat copy of an array's bytes at an address that vectors are loaded from fastest."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    room = np.empty(flat.size + boundary, np.uint8)
    start = -room.ctypes.data % boundary
    out = room[start : start + flat.size]
    out[:] = flat
    return out
