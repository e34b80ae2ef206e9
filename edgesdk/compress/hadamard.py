"""Rotated weights: columns are turned by random signs and a Hadamard transform, rounded there, and turned back when they are decoded.

Source: incoherence processing, QuIP# (arXiv:2402.04396) and QuaRot (arXiv:2404.00456). With W = Q·H (H orthonormal) the inputs that Q meets are x·Hᵀ, so
its second-order rounding uses H·G·Hᵀ, G the mean of x·xᵀ. Outliers of a row are spread over its block and few levels reach further.
A program holds W, so nothing is added at run time; for rotated activations see `flatten`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.gptq import METHOD as GPTQ
from edgesdk.compress.gptq import GptqConfig
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.errors import InputError
from edgesdk.packed import Code, rotate


class HadamardConfig(Config):
    bits: Annotated[float, Field(ge=1.5, le=8)] = 4.0  # as in gptq
    group: Annotated[int, Field(ge=0)] = 0
    rate: Annotated[float, Field(ge=0, le=12)] = 0.0  # stored bits a weight in place of bits and group
    block: Annotated[int, Field(ge=0, le=4096)] = 0  # columns that are turned together, a power of two; 0: as many as divide the row
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Hadamard:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "hadamard"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "QuIP# (arXiv:2402.04396), QuaRot (arXiv:2404.00456), with GPTQ rounding"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[HadamardConfig]] = HadamardConfig

    def why_not(self, weight: Weight, config: HadamardConfig) -> str | None:
        block = config.block or largest_block(weight.cols)
        if block < 2 or block & (block - 1) or weight.cols % block:
            return f"its {weight.cols} columns are not whole blocks of {config.block or 'a power of two'}"
        return None

    def options(self, weight: Weight) -> Sequence[HadamardConfig]:
        if self.why_not(weight, HadamardConfig()):
            return []
        return [HadamardConfig(bits=b) for b in (2, 3, 4)] + [HadamardConfig(rate=r) for r in (2, 3, 4)]

    def apply(self, weight: Weight, stats: Stats | None, config: HadamardConfig) -> Code:
        if weight.kept is not None and not bool(weight.kept.all()):
            raise InputError(
                f"{weight.name} was pruned, and turned weights are not sparse", "leave hadamard or the pruning out of the recipe"
            )
        block = config.block or largest_block(weight.cols)
        turned = replace(weight, matrix=_back(weight.matrix, config.seed, block), original=None, coded=None)
        if stats is not None:
            gram = torch.stack([_back(_back(g, config.seed, block).T, config.seed, block) for g in stats.gram.float()]).double()
            stats = replace(stats, gram=(gram + gram.transpose(1, 2)) / 2)
        inner = GPTQ.apply(turned, stats, GptqConfig(bits=config.bits, group=config.group, rate=config.rate))
        return Code("hadamard", inner.shape, (config.seed, block), (), (inner,))


def largest_block(cols: int) -> int:
    """The largest power of two that divides the columns, at most 4096."""
    return min(cols & -cols, 4096)


def _back(matrix: torch.Tensor, seed: int, block: int) -> torch.Tensor:
    return torch.from_numpy(rotate(matrix.contiguous().numpy(), seed, block, back=True))


METHOD = Hadamard()
