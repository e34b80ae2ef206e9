"""Which weights of panels are left out where they are zero: n of every m columns, or whole blocks. Numbers that kernels and packing have in common."""

from __future__ import annotations

from .panels import BLOCK

PATTERNS = {"1of4": (1, 4), "2of4": (2, 4), "4of16": (4, 16), "8of16": (8, 16)}
"""Name → so many of every so many columns are stored, each with its place among them in 2 bits (of 4) or 4 (of 16)."""
BLOCKS = "blocks"
"""The pattern of panels whose blocks of nothing but zeros are left out."""
BITS = (8, 4)
"""Of weights that are stored n of m: fewer would save nothing beside the places."""


def place_bits(m: int) -> int:
    return m.bit_length() - 1


def pays(bits: int, pattern: str) -> bool:
    """Whether a pattern takes fewer bytes than all weights of so many bits."""
    if pattern == BLOCKS:
        return True
    n, m = PATTERNS[pattern]
    return n * (bits + place_bits(m)) < bits * m


def unit(bits: int, n: int, m: int) -> int:
    """Blocks that are stored as one: as many as fill a vector of places."""
    vectors = BLOCK * n // m // 4  # of a block
    return max(1, 8 // place_bits(m) // vectors, 8 // bits // vectors)
