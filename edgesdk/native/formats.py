"""Precisions of single units on our own kernels, by name: native-int4-g32 is 4 bits with a scale every 32 columns, native-int8 8 bits with one a row.

A weight that is compressed to such a grid runs as it is stored (its groups may be any multiple of 32, its zeros its own); others are rounded.
native-table4 is for what is stored as numbers in tables, which nothing is rounded to.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgesdk.packed import Code
    from edgesdk.plan.types import Precision

ROUNDED: tuple[Precision, ...] = ("native-int8", "native-int4-g32")
"""What weights that nobody compressed may be rounded to."""
_NAME = re.compile(r"native-(?:int|table)([2348])(-g32)?")
_LIKE = {"native-int8": "int8-dynamic"}


def bits_and_group(precision: str) -> tuple[int, int] | None:
    """Bits, and columns of a group (0: a row); None for a precision of a runtime's own."""
    found = _NAME.fullmatch(precision)
    return (int(found[1]), 32 if found[2] else 0) if found else None


def is_native(precision: str) -> bool:
    return bits_and_group(precision) is not None


def stored_bytes(rows: int, cols: int, precision: str) -> int:
    """Bytes of a weight's codes and scales as panels hold them, and of its two sums a row."""
    found = bits_and_group(precision)
    assert found is not None
    (bits, group), width = found, -(-cols // 32) * 32
    scale = 4 if bits == 8 else 2 + 2 / 8 * (group == 32 and bits == 4)  # super-blocks have a float16 for eight blocks
    return round(rows * (width * bits // 8 + scale * (width // 32 if group else 1) + 8))


def name_of(code: Code) -> str | None:
    """The precision that a compressed weight has on our kernels as it is stored; None where they do not read it."""
    from edgesdk.kernels.pack import refuse_unfit
    from edgesdk.kernels.panels import UnfitWeights

    try:
        refuse_unfit(code)
    except UnfitWeights:
        return None
    bits, group = code.numbers
    return f"native-{'table' if code.kind == 'table' else 'int'}{bits}" + ("-g32" if group and group < code.shape[1] else "")


def like(precision: str) -> str:
    """The runtimes' own precision whose harm stands for this one's: the same grid, or one that is further off."""
    found = bits_and_group(precision)
    if found is None:
        return precision
    return _LIKE.get(precision, "int8-dynamic" if found[0] == 8 else "int4-g32")
