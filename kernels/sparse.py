"""Weights that are zero left out of panels: n of every m columns, or whole blocks. On the machine that builds a program."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from edgesdk.packed import Code, decode, places, spread

from .floats import pack_floats
from .pack import TRITS_PAY, is_super, is_ternary, laid, pack
from .panels import BLOCK, Panels, SparsePanels, UnfitWeights, aligned
from .patterns import BITS, BLOCKS, PATTERNS, pays, place_bits, unit

WORTH = 0.8
"""Share of blocks below which they alone are kept: over many rows of inputs a block then takes a third longer."""
FEW = 64
"""Rows that tell most matrices without a pattern."""


def of_pattern(code: Code, pattern: str, lanes: int, together: int = 1, half: bool = True) -> SparsePanels:
    """A symmetric grid of 8 or 4 bits of which at most n of every m columns are not zero.

    In panels: for every `unit` of blocks the codes that stay, four a row and vector, then their places. Raises `UnfitWeights`.
    """
    n, m = PATTERNS[pattern]
    p = pack(code, lanes, together, half, trits=False)
    if p.bits not in BITS or p.zeros.size or not pays(p.bits, pattern):
        raise UnfitWeights(
            f"{p.bits} bits{', zeros of their own' * bool(p.zeros.size)}: {pattern} is for {' and '.join(map(str, BITS))} where it saves bytes"
        )
    groups = _centred(code, len(p.row_scale), BLOCK * unit(p.bits, n, m)).reshape(len(p.row_scale), -1, m)
    used = groups != 0
    if used.sum(2).max() > n:
        raise UnfitWeights(f"{int(used.sum(2).max())} of {m} columns are not zero: {pattern} holds {n}")
    which = _first_places(m)[np.packbits(used, 2, "little").view(f"u{m // 8 or 1}")[..., 0], :n]
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


def of_blocks(code: Code, lanes: int, together: int = 1, half: bool = True) -> SparsePanels:
    """A grid without the blocks, a panel's rows by 32 columns, that are all zero. Raises `UnfitWeights`."""
    p = pack(code, lanes, together, half, trits=False)
    used = (_centred(code, len(p.row_scale), BLOCK).reshape(p.panels, lanes, -1, BLOCK) != 0).any((1, 3))
    panel, kept = np.nonzero(used)
    starts = np.concatenate([[0], np.cumsum(used.sum(1))]).astype(np.int32)
    more: dict[str, Any] = {"codes": aligned(p.codes.reshape(p.panels, p.blocks, -1)[panel, kept])}
    if p.group:
        more |= {name: getattr(p, name)[panel, kept] for name in ("scales", "zeros") if getattr(p, name).size}
    return _with(p, pattern=BLOCKS, starts=starts, kept=kept.astype(np.int32), **more)


def pattern_of(code: Code, lanes: int) -> str:
    """The pattern in which a code takes the fewest bytes; "" for all weights as they are."""
    if code.kind != "grid" or is_super(code):
        return ""
    values = _centred(code, code.shape[0], BLOCK)
    used = values != 0
    if used[:, : code.shape[1]].all():
        return ""
    bits, group = code.numbers
    scale = 0 if group == 0 or group >= code.shape[1] else (16 if bits != 8 else 32) / BLOCK
    sizes = {"": (5 / 3 if lanes in TRITS_PAY and is_ternary(code) else bits) + scale}
    symmetric = not code.arrays[2].size or bool((code.arrays[2] == 1 << (bits - 1)).all())
    for pattern, (n, m) in PATTERNS.items() if bits in BITS and symmetric else ():
        if pays(bits, pattern) and all(part.reshape(len(part), -1, m).sum(2).max() <= n for part in (used[:FEW], used)):
            sizes[pattern] = n * (bits + place_bits(m)) / m + scale
    kept = np.add.reduceat(used.reshape(len(used), -1, BLOCK).any(2), np.arange(0, len(used), lanes)) > 0
    if kept.mean() < WORTH:
        sizes[BLOCKS] = float(kept.mean()) * (bits + scale + 32 / (BLOCK * lanes))
    return min(sizes, key=lambda pattern: sizes[pattern])


def packed(code: Code, pattern: str, lanes: int, together: int = 1, half: bool = True) -> Panels:
    """The panels of a code in a pattern of `pattern_of`; a dense code stays floats, of as many bits as its number says. Raises `UnfitWeights`."""
    if code.kind == "dense":
        return pack_floats(decode(code), code.numbers[0] if half else 32, lanes, together)
    if pattern == BLOCKS:
        return of_blocks(code, lanes, together, half)
    return of_pattern(code, pattern, lanes, together, half) if pattern else pack(code, lanes, together, half)


def as_grid(code: Code) -> Code:
    """A grid with weights of zero in place of what a masked or sparse code of a grid leaves out, alone or in a sum; any other code as it is."""
    if code.kind == "sum":
        return replace(code, parts=(as_grid(code.parts[0]), *code.parts[1:]))
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


@lru_cache
def _first_places(m: int) -> Any:
    """Of each mask of m bits the places of those that are set, then the others: int64 [2^m, m]."""
    bits = np.arange(1 << m)[:, None] >> np.arange(m) & 1
    return np.argsort(1 - bits, 1, kind="stable")


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
