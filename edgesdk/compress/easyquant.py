"""EasyQuant: data-free rounding with the few outliers kept apart and every range optimised for the rest.

Source: EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs (arXiv:2403.02775). Outliers lie further than `sigma` standard deviations
of their row from 0, at most `outliers` of all weights; they are stored as float16 at their places. The scale s of a row or group then minimises
Σ (w - s·k)², k = round(w / s): a search over clipped ranges, then s = Σ w·k / Σ k² in turn with k until neither moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.gptq import scales
from edgesdk.compress.rtn import RtnConfig, grid_of
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, groups_of


class EasyQuantConfig(Config):
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group: Annotated[int, Field(ge=0)] = 0  # columns that share a scale; 0: a whole row
    outliers: Annotated[float, Field(ge=0, lt=0.01)] = 0.0099  # most of the weights that may be kept apart; 0: none
    sigma: Annotated[float, Field(ge=1, le=20)] = 3.0  # standard deviations from 0 that make an outlier
    optimise: bool = True  # ranges of least error; else by the largest weight that is left


class EasyQuant:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "easyquant"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "EasyQuant (arXiv:2403.02775)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[EasyQuantConfig]] = EasyQuantConfig

    def why_not(self, weight: Weight, config: EasyQuantConfig) -> str | None:
        return None

    def options(self, weight: Weight) -> Sequence[EasyQuantConfig]:
        return [EasyQuantConfig(bits=b, group=g) for b in (2, 3, 4, 8) for g in (0, 64) if g < weight.cols]

    def apply(self, weight: Weight, stats: Stats | None, config: EasyQuantConfig) -> Code:
        matrix, cols = weight.matrix, weight.cols
        group = config.group if groups_of(cols, config.group) > 1 else 0
        apart = outliers(matrix, config.sigma, config.outliers)
        rest = matrix.masked_fill(apart, 0.0)
        middle, levels = 2 ** (config.bits - 1), 2**config.bits
        if config.optimise:
            scale, _ = scales(rest, (~apart).float(), levels, group, True, True)
            scale = _refit(rest, scale, group or cols, middle)
        else:
            scale, _ = grid_of(rest, RtnConfig(bits=config.bits, group=group))
        s = scale.repeat_interleave(group or cols, 1)[:, :cols]
        q = torch.clamp(torch.round(rest / s + middle), 0, levels - 1).to(torch.uint8)
        grid = Code("grid", tuple(matrix.shape), (config.bits, group), (q.numpy(), scale.to(torch.float16).numpy(), np.zeros(0, np.uint8)))
        if not bool(apart.any()):
            return grid
        values = matrix[apart].clamp(-65504, 65504).to(torch.float16).numpy()[None]
        dense = Code("dense", values.shape, (), (values,))
        return Code("sum", grid.shape, (), (), (grid, Code("sparse", grid.shape, (), (apart.to(torch.uint8).numpy(),), (dense,))))


def outliers(matrix: torch.Tensor, sigma: float, most: float) -> torch.Tensor:
    """bool [rows, cols]: further than `sigma` deviations of the row from 0, the furthest ones, less than the share `most`."""
    far = matrix.abs() / matrix.std(1, correction=0, keepdim=True).clamp_min(1e-30)
    mask = far > sigma
    count = int(most * matrix.numel())
    if int(mask.sum()) > count:
        mask = torch.zeros_like(mask)
        if count:
            mask.view(-1)[torch.argsort(far.reshape(-1), descending=True, stable=True)[:count]] = True
    return mask


def _refit(matrix: torch.Tensor, scale: torch.Tensor, width: int, middle: int) -> torch.Tensor:
    """Scales [rows, groups], as float16 holds them, moved to their least-squares place; never to a worse one."""
    w = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % width)).reshape(matrix.shape[0], -1, width)

    def rounded(s: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(w / s[..., None]), -middle, middle - 1)

    best = ((rounded(scale) * scale[..., None] - w) ** 2).sum(-1)
    for _ in range(8):
        k = rounded(scale)
        new = ((w * k).sum(-1) / (k * k).sum(-1).clamp_min(1e-12)).to(torch.float16).float()
        new = torch.where(new.abs() < 6e-8, scale, new)
        cost = ((rounded(new) * new[..., None] - w) ** 2).sum(-1)
        better = cost < best
        if not bool(better.any()):
            break
        scale, best = torch.where(better, new, scale), torch.where(better, cost, best)
    return scale


METHOD = EasyQuant()
