"""Round to nearest: every weight to the nearest point of its channel's or group's grid. Needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, groups_of


class RtnConfig(Config):
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group: Annotated[int, Field(ge=0)] = 32  # columns that share a scale; 0: a whole row
    symmetric: bool = True


def grid_of(matrix: torch.Tensor, config: RtnConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [rows, groups], float32, as they are stored: scales with the 8 significant bits that float16 and bfloat16 (in which
    XNNPACK keeps the scales of int4 groups) both hold. Symmetric grids reach from
    -2^(b-1)+1 to 2^(b-1)-1; their zero is the middle, 2^(b-1)."""
    cols, top = matrix.shape[1], 2**config.bits - 1
    group = config.group or cols
    padded = torch.nn.functional.pad(matrix, (0, -cols % group)).reshape(matrix.shape[0], -1, group)
    middle = 2 ** (config.bits - 1)
    if config.symmetric:
        scale = padded.abs().amax(-1) / (middle - 1)
        zero = torch.full_like(scale, middle)
    else:
        low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
        scale = (high - low) / top
        zero = torch.round(-low / scale.clamp_min(1e-12)).clamp(0, top)
    return stored_scale(scale), zero


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale rounded to 8 significant bits within float16's range, float32."""
    return scale.clamp(6e-8, 6e4).to(torch.bfloat16).to(torch.float16).float()


def to_code(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, config: RtnConfig) -> Code:
    """The grid code of integers [rows, cols] with scales and zero points [rows, groups] (None: symmetric)."""
    zeros = np.zeros(0, np.uint8) if zero is None else zero.to(torch.uint8).numpy()
    arrays = (q.to(torch.uint8).numpy(), scale.to(torch.float16).numpy(), zeros)
    return Code("grid", tuple(q.shape), (config.bits, config.group if groups_of(q.shape[1], config.group) > 1 else 0), arrays)


class Rtn:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "rtn"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "round to nearest, per channel or group (the common baseline)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[RtnConfig]] = RtnConfig

    def why_not(self, weight: Weight, config: RtnConfig) -> str | None:
        return None

    def options(self, weight: Weight) -> Sequence[RtnConfig]:
        return [RtnConfig(bits=b, group=g) for b in (2, 3, 4, 8) for g in (0, 32) if g < weight.cols]

    def apply(self, weight: Weight, stats: Stats | None, config: RtnConfig) -> Code:
        scale, zero = grid_of(weight.matrix, config)
        group = config.group or weight.cols
        s, z = (t.repeat_interleave(group, 1)[:, : weight.cols] for t in (scale, zero))
        q = torch.clamp(torch.round(weight.matrix / s + z), 1 if config.symmetric else 0, 2**config.bits - 1)
        return to_code(q, scale, None if config.symmetric else zero, config)


METHOD = Rtn()
