"""Codes of weights → panels, on the machine that builds a program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgesdk.packed import Code, groups_of, spread

from .panels import BLOCK, OFFSET, SUPER, TRITS, Panels, UnfitWeights, aligned

LOST = 0.02
"""Of the weights (root mean square): what may be lost where panels keep them less exactly than they are stored."""


def bits_and_group(code: Code) -> tuple[int, int]:
    """Of a grid of 2, 3, 4 or 8 bits or a table of 2, 3 or 4. Raises `UnfitWeights` for anything else."""
    if code.kind not in ("grid", "table") or len(code.shape) != 2:
        raise UnfitWeights(f"a code of kind {code.kind} and shape {code.shape} is no grid and no table of rows and columns")
    bits, group = code.numbers
    known = (2, 3, 4, 8) if code.kind == "grid" else (2, 3, 4)
    if bits not in known:
        raise UnfitWeights(f"{bits} bits: the kernels read {', '.join(map(str, known))} of a {code.kind}")
    return bits, group


def refuse_unfit(code: Code) -> None:
    """Raises `UnfitWeights` for what the kernels do not read: anything but grids of 2, 3, 4 or 8 bits with whole zeros, those of 4 bits with others
    that super-blocks hold, and tables of 2, 3 or 4 bits that int8 holds."""
    bits, group = bits_and_group(code)
    if group < code.shape[1] and group % BLOCK:
        raise UnfitWeights(f"groups of {group} columns: the kernels read multiples of {BLOCK} and whole rows")
    if code.kind == "table":
        if (lost := _rounded_tables(code)[2]) > LOST:
            raise UnfitWeights(f"a table whose numbers int8 holds with an error of {lost:.1%} of the weights: the kernels take {LOST:.0%}")
        return
    if is_super(code):
        if (lost := _supers(code, True)[4]) > LOST:
            raise UnfitWeights(f"zeros that super-blocks hold with an error of {lost:.1%} of the weights: the kernels take {LOST:.0%}")
        return
    zero = code.arrays[2]
    if zero.size and ((zero != np.rint(zero)).any() or zero.min() < 0 or zero.max() >= 1 << bits):
        raise UnfitWeights("zeros that are no codes: the kernels read whole zeros from 0 to 2^bits - 1")


TRITS_PAY = (16,)
"""Rows of a panel where a product of ternary weights in 1.67 bits takes less time than of 2 bits: those of AVX-512."""


def pack(code: Code, lanes: int, together: int = 1, half: bool = True, trits: bool | None = None) -> Panels:
    """The panels of a code, their number a multiple of `together`; `half`: scales in float16. `trits`: ternary weights in 1.67 bits in place of 2
    (None: where it is faster). Raises `UnfitWeights`."""
    refuse_unfit(code)
    dense = (lanes in TRITS_PAY if trits is None else trits) and is_ternary(code)
    how = _table if code.kind == "table" else _super if is_super(code) else _ternary if dense else _grid
    return how(code, lanes, lanes * together, half)


def _grid(code: Code, lanes: int, unit: int, half: bool) -> Panels:
    """`unit`: what the number of rows is made a multiple of."""
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
    padded = -(-rows // unit) * unit
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


def is_ternary(code: Code) -> bool:
    """Whether a grid's weights are -1, 0 and 1 of their scales: 2 bits, of which one value is never there."""
    if code.kind != "grid" or code.numbers[0] != 2:
        return False
    q, _, zero = code.arrays
    return bool((zero == 1).all() and q.max(initial=0) < 3) if zero.size else q.min(initial=1) > 0


def _ternary(code: Code, lanes: int, unit: int, half: bool) -> Panels:
    """Three weights in 5 bits: those of quad j of three blocks beside each other."""
    p = _grid(code, lanes, unit, half)
    rows, cols = code.shape
    units = -(-p.blocks // TRITS)
    digits = np.ones((len(p.row_scale), units * TRITS * BLOCK), np.uint8)
    digits[:rows, :cols] = code.arrays[0] - (0 if code.arrays[2].size else 1)
    parts = (
        digits.reshape(p.panels, lanes, units, TRITS, BLOCK // 4, 4)
        .transpose(3, 0, 2, 4, 1, 5)
        .reshape(TRITS, p.panels, units, BLOCK // 4, -1)
    )
    c = parts[0] + 3 * parts[1] + 9 * parts[2]  # [panel, unit, 8 quads, bytes]
    low, (a, b, d) = c[:, :, :5], (c[:, :, j] for j in (5, 6, 7))
    above = np.stack([a & 7, a >> 3 | (d >> 3 & 1) << 2, b & 7, b >> 3 | d >> 4 << 2, d & 7], 2)
    every = np.arange(32)
    tables = np.stack([every % 3, every // 3 % 3, every // 9 % 3]) - 1
    return replace(
        p, bits=5, kind="trits", zeros=np.zeros(0, np.int8), codes=aligned(low | above << 5), tables=tables.astype(np.int8)[None]
    )


def _table(code: Code, lanes: int, unit: int, half: bool) -> Panels:
    (bits, group), (q, _, scale) = code.numbers, code.arrays
    rows, cols = code.shape
    group = 0 if group >= cols else group
    numbers, step, _ = _rounded_tables(code)
    scale = np.broadcast_to(scale.astype(np.float32) if scale.size else np.float32(1), (rows, groups_of(cols, group)))
    row_scale = np.abs(scale).max(1)
    row_scale[row_scale == 0] = 1
    padded, width = -(-rows // unit) * unit, -(-cols // BLOCK) * BLOCK
    ints = np.zeros((padded, width), np.uint8)
    ints[: len(q)] = np.abs(numbers[:, : 1 << bits]).argmin(1)[
        :, None
    ]  # columns beyond the last one meet inputs of zero, `sums` counts them
    ints[:rows, :cols] = q
    per, times = (1, 1) if group == 0 else (width // BLOCK, group // BLOCK)
    found = numbers[0][ints[:rows]] if len(numbers) == 1 else numbers.ravel()[ints[:rows] + 16 * np.arange(rows, dtype=np.int32)[:, None]]
    counted = found.reshape(rows, per, -1).sum(2, dtype=np.int32)
    sums = (counted * np.repeat(kept_scales(scale, half) * step, times, 1)[:, :per]).sum(1, dtype=np.float64)
    own = len(numbers) > 1
    tables = np.zeros((padded if own else 1, 16), np.int8)
    tables[: len(numbers)] = numbers
    return Panels(
        rows=rows, cols=cols, bits=bits, group=group, lanes=lanes, codes=laid(ints, bits, lanes),
        scales=_paneled(np.repeat(scale / row_scale[:, None], times, 1)[:, :per], padded, lanes, np.float16 if half else np.float32),
        zeros=np.zeros(0, np.int8), row_scale=_padded(row_scale * step[:, 0], padded), sums=_padded(sums, padded),
        kind="tables" if own else "table",
        tables=aligned(tables.reshape(-1, lanes // 4, 4, 16).transpose(0, 2, 1, 3)).view(np.int8).reshape(-1, 16 * lanes) if own else tables,
    )  # fmt: skip


def _rounded_tables(code: Code) -> tuple[Any, Any, float]:
    """Tables as panels keep them → int8 [1 or rows, 16], the step they count in [1 or rows, 1], the error of that, of the weights (root mean
    square, before their scales). Of the steps that int8 allows the best is taken; entries that no weight has count nothing."""
    bits, (q, table, _) = code.numbers[0], code.arrays
    rows, count = len(table), 1 << bits
    used = np.stack([(q == e).sum(1) for e in range(count)], 1).reshape(rows, -1, count).sum(1)
    values = np.where(used > 0, table[:, :count].astype(np.float64), 0)
    most = np.abs(values).max(1, keepdims=True)
    most[most == 0] = 1
    best, least = most / 127, np.full((rows, 1), np.inf)
    for top in range(127, 79, -1):
        step = most / top
        lost = (used * (np.rint(values / step) * step - values) ** 2).sum(1, keepdims=True)
        best, least = np.where(lost < least, step, best), np.minimum(lost, least)
    best = best.astype(np.float32)
    numbers = np.zeros((rows, 16), np.int8)
    numbers[:, :count] = np.rint(values / best)
    whole = (used * values**2).sum()
    return numbers, best, float(np.sqrt(least.sum() / whole)) if whole else 0.0


def is_super(code: Code) -> bool:
    """Whether a grid is kept as super-blocks: 4 bits, and zeros that are no codes."""
    if code.kind != "grid" or code.numbers[0] != 4 or not code.arrays[2].size:
        return False
    zero = code.arrays[2]
    return bool((zero != np.rint(zero)).any() or zero.min() < 0 or zero.max() > 15)


def _supers(code: Code, half: bool) -> tuple[Any, Any, Any, Any, float]:
    """Codes, d, steps and offsets (`rounded_supers`) of a grid of 4 bits, and the error of that, of the weights (root mean square), as it is
    where all codes are there equally often."""
    (_, group), (q, scale, zero) = code.numbers, code.arrays
    rows, cols = code.shape
    blocks, groups = -(-cols // BLOCK), groups_of(cols, group)
    scale, zero = (np.broadcast_to(a.astype(np.float32) if a.size else np.float32(1), (rows, groups)) for a in (scale, zero))
    turned = scale < 0
    if turned.any():
        q = np.where(spread(turned, cols, group), 15 - q, q)
    times = blocks if groups == 1 else group // BLOCK
    step, zero = (np.repeat(a, times, 1)[:, :blocks] for a in (np.abs(scale), np.where(turned, 15 - zero, zero)))
    d, steps, offsets = rounded_supers(step, 8 - zero, half)
    kept = steps * per_block(d, blocks)
    spreads = 21.25 + (7.5 - zero) ** 2  # of codes from 0 to 15 about their zero
    lost = float(np.square(kept - step).ravel() @ spreads.ravel() + np.square(kept * (8 - offsets / OFFSET - zero)).sum())
    size = float(np.square(step).ravel() @ spreads.ravel())
    return q, d, steps, offsets, (lost / size) ** 0.5 if size else 0.0


def _super(code: Code, lanes: int, unit: int, half: bool) -> Panels:
    q, d, steps, offsets, _ = _supers(code, half)
    (rows, cols), blocks = code.shape, steps.shape[1]
    padded = -(-rows // unit) * unit
    codes = np.full((padded, blocks * BLOCK), 8, np.uint8)
    codes[:rows, :cols] = q
    counted = codes[:rows].reshape(rows, blocks, BLOCK).sum(2) + np.float32(BLOCK) * (offsets / OFFSET - 8)
    row_scale = d.max(1)
    row_scale[row_scale == 0] = 1
    return Panels(
        rows=rows, cols=cols, bits=4, group=BLOCK, lanes=lanes, codes=laid(codes, 4, lanes), kind="super",
        scales=np.concatenate([_paneled(steps, padded, lanes, np.uint8), _paneled(offsets, padded, lanes, np.int8).view(np.uint8)], 2),
        zeros=np.zeros(0, np.int8),
        row_scale=_padded(row_scale, padded), sums=_padded((counted * steps * per_block(d, blocks)).sum(1, dtype=np.float64), padded),
        tables=_paneled(d / row_scale[:, None], padded, lanes, np.float16 if half else np.float32),
    )  # fmt: skip


def rounded_supers(step: Any, offset: Any, half: bool) -> tuple[Any, Any, Any]:
    """Steps (not below 0) and offsets (in steps) of blocks [rows, blocks] → d float32 [rows, super-blocks], whole steps and offsets (float32,
    [rows, blocks]): step ≈ d · steps, offset ≈ offsets / 16. `half`: d is a float16 beside the largest of the row."""
    rows, blocks = step.shape
    d = np.pad(step, ((0, 0), (0, -blocks % SUPER))).reshape(rows, -1, SUPER).max(2) / np.float32(255)
    d = kept_scales(d, half)
    whole = per_block(d, blocks)
    inverse = np.divide(1, whole, out=np.zeros_like(whole), where=whole != 0)
    return d, np.clip(np.rint(step * inverse), 0, 255), np.clip(np.rint(offset * OFFSET), -127, 127)


def per_block(d: Any, blocks: int) -> Any:
    """[rows, super-blocks] → [rows, blocks]."""
    return np.repeat(d, SUPER, 1)[:, :blocks]


def as_kept(code: Code, half: bool = True) -> Code:
    """The code of what panels keep, where that is less exact than what is stored: tables in int8, scales beside them in float16 (with `half`);
    super-blocks."""
    if code.kind == "grid" and is_super(code):
        q, d, steps, offsets, _ = _supers(code, half)
        return Code("grid", code.shape, (4, BLOCK), (q, steps * per_block(d, steps.shape[1]), 8 - offsets / OFFSET))
    if code.kind != "table":
        return code
    numbers, step, _ = _rounded_tables(code)
    q, _, scale = code.arrays
    scale = kept_scales(scale.astype(np.float32), half) if scale.size else scale
    return Code("table", code.shape, code.numbers, (q, (numbers * step)[:, : 1 << code.numbers[0]], scale))


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
