"""FineQuant: weight-only rounding whose groups are small only where the weights need it. Needs no data.

Source: FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs (arXiv:2308.09723), whose heuristic shrinks the group of a
whole matrix until its ranges fit. Here every tile of a matrix (64 rows, 128 columns) chooses: halving a group is taken where it lowers the
squared error by more than the same bits would if all weights had them (an error of D over n weights falls by 2·ln 2·D/n a bit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.gptq import scales
from edgesdk.compress.rtn import RtnConfig, grid_of
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, decode, pack

BAND, STRIP = 64, 128  # rows and columns of a tile


class FineQuantConfig(Config):
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    smallest: Annotated[int, Field(ge=8, le=128)] = 8  # columns of the smallest group that may be chosen
    symmetric: bool = True
    search: bool = True  # scales of least squared error; else by the largest weight


class FineQuant:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "finequant"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "FineQuant (arXiv:2308.09723), a group size for every tile of a matrix"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[FineQuantConfig]] = FineQuantConfig

    def why_not(self, weight: Weight, config: FineQuantConfig) -> str | None:
        return None

    def options(self, weight: Weight) -> Sequence[FineQuantConfig]:
        return [FineQuantConfig(bits=b) for b in (2, 3, 4, 8)]

    def apply(self, weight: Weight, stats: Stats | None, config: FineQuantConfig) -> Code:
        groups = [0] + [g for g in (128, 64, 32, 16, 8) if config.smallest <= g < weight.cols]
        made = {g: _rounded(weight.matrix, g, config) for g in groups}
        uniform = [_joined(weight.matrix, made, np.full(_tiles(weight.matrix), i), groups, config) for i in range(len(groups))]
        if len(groups) == 1:
            return uniform[0]
        best = min(uniform, key=lambda code: _cost(weight, code))
        return min(
            (best, _joined(weight.matrix, made, _choose(weight.matrix, made, groups), groups, config)), key=lambda code: _cost(weight, code)
        )


Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Integers [rows, cols], scales and zero points [rows, groups], squared errors [rows, cols]."""


def _rounded(matrix: torch.Tensor, group: int, config: FineQuantConfig) -> Made:
    levels = 2**config.bits
    if config.search:
        scale, zero = scales(matrix, torch.ones_like(matrix), levels, group, config.symmetric, True)
    else:
        scale, zero = grid_of(matrix, RtnConfig(bits=config.bits, group=group, symmetric=config.symmetric))
    s, z = (t.repeat_interleave(group or matrix.shape[1], 1)[:, : matrix.shape[1]] for t in (scale, zero))
    q = torch.clamp(torch.round(matrix / s + z), 0, levels - 1)
    return q, scale, zero, ((q - z) * s - matrix) ** 2


def _tiles(matrix: torch.Tensor) -> tuple[int, int]:
    return -(-matrix.shape[0] // BAND), -(-matrix.shape[1] // STRIP)


def _choose(matrix: torch.Tensor, made: dict[int, Made], groups: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Which of `groups` [bands, strips] by least error + price · bits of scales; the price follows from the error that is left."""
    bands, strips = _tiles(matrix)
    rows = [min(BAND, matrix.shape[0] - BAND * i) for i in range(bands)]
    cols = [min(STRIP, matrix.shape[1] - STRIP * i) for i in range(strips)]
    errors, bits = np.zeros((len(groups), bands, strips)), np.zeros((len(groups), bands, strips))
    for g, group in enumerate(groups):
        for i in range(bands):
            for j in range(strips):
                errors[g, i, j] = float(made[group][3][BAND * i : BAND * (i + 1), STRIP * j : STRIP * (j + 1)].sum())
                share = cols[j] / matrix.shape[1] if not group else math.ceil(cols[j] / group)
                bits[g, i, j] = 16 * rows[i] * share
    chosen = np.zeros((bands, strips), np.int64)
    for _ in range(5):
        left = np.take_along_axis(errors, chosen[None], 0).sum()
        chosen = np.argmin(errors + 2 * math.log(2) * left / matrix.numel() * bits, 0)
    return chosen


def _joined(
    matrix: torch.Tensor,
    made: dict[int, Made],
    chosen: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    groups: list[int],
    config: FineQuantConfig,
) -> Code:
    """Neighbours of equal choice are one grid. Whole-row scales stay those of the row where all of a band has them."""
    bands = []
    for start, end in _runs([tuple(r) for r in chosen.tolist()]):
        rows, parts = slice(BAND * start, min(BAND * end, matrix.shape[0])), []
        for left, right in _runs(chosen[start].tolist()):
            cols, group = slice(STRIP * left, min(STRIP * right, matrix.shape[1])), groups[chosen[start, left]]
            q, scale, zero, _ = made[group]
            width = cols.stop - cols.start
            at = slice(cols.start // group, -(-cols.stop // group)) if group else slice(0, 1)
            arrays = [q[rows, cols].to(torch.uint8).numpy(), scale[rows, at].to(torch.float16).numpy(), np.zeros(0, np.uint8)]
            if not config.symmetric:
                arrays[2] = zero[rows, at].to(torch.uint8).numpy()
            shape = (rows.stop - rows.start, width)
            parts.append(Code("grid", shape, (config.bits, group if group < width else 0), tuple(arrays)))
        bands.append(parts[0] if len(parts) == 1 else Code("stack", (rows.stop - rows.start, matrix.shape[1]), (1,), (), tuple(parts)))
    return bands[0] if len(bands) == 1 else Code("stack", tuple(matrix.shape), (0,), (), tuple(bands))


def _runs(values: list[object]) -> list[tuple[int, int]]:
    """(start, end) of equal neighbours."""
    starts = [i for i in range(len(values)) if not i or values[i] != values[i - 1]]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def _cost(weight: Weight, code: Code) -> float:
    """Bits a weight at which an error is worth another: half its log2, and the stored bits."""
    error = float(((torch.from_numpy(decode(code)) - weight.matrix) ** 2).sum())
    return math.log2(max(error, 1e-300)) / 2 + 8 * len(pack(code)) / weight.matrix.numel()


METHOD = FineQuant()
