"""Ternary weights: -s, 0 or s, at about 1.58 bits a weight (five in a byte at a fixed rate), without any training.

Sources: BitNet b1.58 (arXiv:2402.17764), where s is the mean of |w| over the tensor and w becomes round(w / s) within ±1; BitNet b1.58 Reloaded
(arXiv:2407.09527), which takes the median; `search`: the s of the least squared error, in closed form. With the k largest |w| kept, the best s
is their mean and the error falls by (Σ|w|)² / k, so the best k is found from one sorted list (as in Ternary Weight Networks, arXiv:1605.04711,
which approximates it). `ternary-qat` trains such weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, groups_of

Fit = Literal["search", "mean", "median"]


class TernaryConfig(Config):
    fit: Fit = "search"
    per: Literal["tensor", "row"] = "row"  # what shares a scale, where `group` is 0
    group: Annotated[int, Field(ge=0)] = 0  # columns that share a scale


def ternary_scale(matrix: torch.Tensor, config: TernaryConfig) -> torch.Tensor:
    """Scales [rows, groups], or [1, 1] for the whole tensor, float32 as float16 holds them."""
    rows, cols = matrix.shape
    group = config.group if groups_of(cols, config.group) > 1 else 0
    if group:
        pad = torch.nn.functional.pad(matrix, (0, -cols % group), value=torch.nan).reshape(rows, -1, group)
    else:
        pad = matrix.reshape(1, 1, -1) if config.per == "tensor" else matrix[:, None]
    size = pad.abs()
    if config.fit == "mean":
        scale = size.nanmean(-1)
    elif config.fit == "median":
        scale = size.nanmedian(-1).values
    else:
        scale = best_scale(size.nan_to_num(0.0))
    return scale.clamp(6e-8, 65504).to(torch.float16).float()


def best_scale(size: torch.Tensor) -> torch.Tensor:
    """The scale s of the least Σ(|w| - s·[|w| is kept])² over the last dimension, for the best choice of what is kept."""
    falling = size.sort(-1, descending=True).values.double()
    total = falling.cumsum(-1)
    count = torch.arange(1, size.shape[-1] + 1, dtype=torch.float64)
    k = (total**2 / count).argmax(-1, keepdim=True)
    return (total.gather(-1, k) / (k + 1)).squeeze(-1).float()


def ternary_code(matrix: torch.Tensor, scale: torch.Tensor, group: int = 0) -> Code:
    """The grid code of the nearest of -s, 0 and s. `scale` [rows, groups] or [1, 1]; digits are stored as 0, 1 and 2."""
    cols = matrix.shape[1]
    group = group if groups_of(cols, group) > 1 else 0
    s = scale.repeat_interleave(group, 1)[:, :cols] if group else scale
    q = torch.clamp(torch.round(matrix / s), -1, 1) + 1
    arrays = (q.to(torch.uint8).numpy(), scale.to(torch.float16).numpy(), np.ones((1, 1), np.uint8))
    return Code("grid", tuple(matrix.shape), (2, group), arrays)


class Ternary:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "ternary"
    family: ClassVar[Family] = "codebook"
    source: ClassVar[str] = "BitNet b1.58 (arXiv:2402.17764), its median scale (arXiv:2407.09527); ours: the scale of least error"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[TernaryConfig]] = TernaryConfig

    def why_not(self, weight: Weight, config: TernaryConfig) -> str | None:
        return None

    def options(self, weight: Weight) -> Sequence[TernaryConfig]:
        return [TernaryConfig(group=g) for g in (0, 32) if g < weight.cols]

    def apply(self, weight: Weight, stats: Stats | None, config: TernaryConfig) -> Code:
        return ternary_code(weight.matrix, ternary_scale(weight.matrix, config), config.group)


METHOD = Ternary()
