"""Weights that are zero left out of panels: n of every m columns, or whole blocks. On the machine that builds a program."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from edgesdk.packed import Code, places, spread

from .pack import laid, pack
from .panels import BLOCK, Panels, SparsePanels, UnfitWeights, aligned

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


def of_pattern(code: Code, pattern: str, lanes: int, together: int = 1, half: bool = True, dense: Panels | None = None) -> SparsePanels:
    """A symmetric grid of 8 or 4 bits of which at most n of every m columns are not zero. `dense`: what `pack` makes of it, if that is known.

    In panels: for every `unit` of blocks the codes that stay, four a row and vector, then their places. Raises `UnfitWeights`.
    """
    n, m = PATTERNS[pattern]
    p = pack(code, lanes, together, half) if dense is None else dense
    if p.bits not in BITS or p.zeros.size or not pays(p.bits, pattern):
        raise UnfitWeights(
            f"{p.bits} bits{', zeros of their own' * bool(p.zeros.size)}: {pattern} is for {' and '.join(map(str, BITS))} where it saves bytes"
        )
    groups = _centred(code, len(p.row_scale), BLOCK * unit(p.bits, n, m)).reshape(len(p.row_scale), -1, m)
    used = groups != 0
    if used.sum(2).max() > n:
        raise UnfitWeights(f"{int(used.sum(2).max())} of {m} columns are not zero: {pattern} holds {n}")
    which = np.argsort(~used, axis=2, kind="stable")[..., :n]
    values = np.take_along_axis(groups, which, 2) + (0 if p.bits == 8 else 1 << (p.bits - 1))
    flat = (len(p.row_scale), -1)
    units = -(-p.blocks // unit(p.bits, n, m))
    parts = [
        laid(v, b, lanes).reshape(p.panels, units, -1) for v, b in ((values.reshape(flat), p.bits), (which.reshape(flat), place_bits(m)))
    ]
    scales = p.scales
    if p.group and units * unit(p.bits, n, m) > p.blocks:
        scales = np.pad(scales, ((0, 0), (0, units * unit(p.bits, n, m) - p.blocks), (0, 0)))
    return _with(p, pattern=pattern, codes=aligned(np.concatenate(parts, 2)), scales=scales)


def of_blocks(code: Code, lanes: int, together: int = 1, half: bool = True, dense: Panels | None = None) -> SparsePanels:
    """A grid without the blocks, a panel's rows by 32 columns, that are all zero. Raises `UnfitWeights`."""
    p = pack(code, lanes, together, half) if dense is None else dense
    used = (_centred(code, len(p.row_scale), BLOCK).reshape(p.panels, lanes, -1, BLOCK) != 0).any((1, 3))
    panel, kept = np.nonzero(used)
    starts = np.concatenate([[0], np.cumsum(used.sum(1))]).astype(np.int32)
    more: dict[str, Any] = {"codes": aligned(p.codes.reshape(p.panels, p.blocks, -1)[panel, kept])}
    if p.group:
        more |= {name: getattr(p, name)[panel, kept] for name in ("scales", "zeros") if getattr(p, name).size}
    return _with(p, pattern=BLOCKS, starts=starts, kept=kept.astype(np.int32), **more)


def smallest(code: Code, lanes: int, together: int = 1, half: bool = True) -> Panels:
    """A grid's panels in the form that takes the fewest bytes: whole, n of m, or without empty blocks. Raises `UnfitWeights`."""
    p = pack(code, lanes, together, half)
    if code.kind != "grid":
        return p
    values, found = _centred(code, code.shape[0], BLOCK), [p]
    if not values.all():
        if p.bits in BITS and not p.zeros.size:
            for pattern, (n, m) in PATTERNS.items():
                if pays(p.bits, pattern) and (values.reshape(code.shape[0], -1, m) != 0).sum(2).max() <= n:
                    found.append(of_pattern(code, pattern, lanes, together, half, p))
        found.append(of_blocks(code, lanes, together, half, p))
    return min(found, key=lambda panels: panels.nbytes)


def as_grid(code: Code) -> Code:
    """A grid with weights of zero in place of what a masked or sparse code of a grid leaves out; any other code as it is."""
    if code.kind not in ("masked", "sparse") or code.parts[0].kind != "grid":
        return code
    inner = code.parts[0]
    (q, scale, zero), offset = inner.arrays, _offsets(inner)
    if code.kind == "masked":
        return Code("grid", code.shape, inner.numbers, (np.where(code.arrays[0] != 0, q, offset).astype(q.dtype), scale, zero))
    if scale.size > 1 or zero.size:
        return code
    values = np.full(code.shape, offset, q.dtype)
    values[places(code)] = q.ravel()
    return Code(
        "grid", code.shape, (inner.numbers[0], 0), (values, np.broadcast_to(scale.reshape(-1, 1), (code.shape[0], scale.size)), zero)
    )


def _centred(code: Code, padded: int, multiple: int) -> Any:
    """Codes less their zeros, int16 [padded, cols padded to a multiple]; zero beyond the last row and column."""
    out = np.zeros((padded, -(-code.shape[1] // multiple) * multiple), np.int16)
    out[: code.shape[0], : code.shape[1]] = code.arrays[0].astype(np.int16) - _offsets(code)
    return out


def _offsets(code: Code) -> Any:
    (bits, group), zero = code.numbers, code.arrays[2]
    return spread(zero.astype(np.int16), code.shape[1], group) if zero.size else np.int16(1 << (bits - 1))


def _with(p: Panels, **changed: Any) -> SparsePanels:
    return SparsePanels(**({f.name: getattr(p, f.name) for f in fields(Panels)} | changed))
