"""Low rank where it costs least: singular values in the space of a layer's own inputs. The weight method `svd` stores the two factors.

A layer's squared output error is tr(D · gram · Dᵀ) for a change D of its weight. With gram + damping = L·Lᵀ it is the plain squared size of
D·L, so the best rank-r weight is W_r = [W·L]_r · L⁻¹, [·]_r being the first r singular vectors (activation-aware SVD: ASVD, arXiv:2312.05821;
whitening by Cholesky: SVD-LLM, arXiv:2403.07378). Rows may be weighted by how much the model's outputs depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, pack

DAMP = 0.01
"""Added to the gram's diagonal, as a share of its mean: directions that the calibration inputs never took still count a little."""


@dataclass(frozen=True)
class Space:
    """Where errors are measured: ‖row · D · root‖². `row` float64 [rows] or None (all 1); `root` float64 [cols, cols], lower, or None."""

    root: torch.Tensor | None = None
    row: torch.Tensor | None = None

    def into(self, matrix: torch.Tensor) -> torch.Tensor:
        """row · matrix · root, float64."""
        m = matrix.double() if self.root is None else matrix.double() @ self.root
        return m if self.row is None else m * self.row[:, None]

    def right_back(self, matrix: torch.Tensor) -> torch.Tensor:
        """matrix · root⁻¹ for a matrix [any, cols]."""
        if self.root is None:
            return matrix
        solved: torch.Tensor = torch.linalg.solve_triangular(self.root, matrix, upper=False, left=False)
        return solved


def space_of(stats: Stats | None, *, centred: bool = False, rows: torch.Tensor | None = None, damp: float = DAMP) -> Space:
    """The space of one weight without groups. `centred`: the mean input does not count (where a bias can take it up).
    `rows`: the weight of each row's squared error."""
    row = None if rows is None else rows.double().clamp_min(1e-12 * float(rows.max().clamp_min(1e-30))).sqrt()
    if stats is None:
        return Space(None, row)
    gram = stats.gram[0].double()
    if centred:
        gram = gram - torch.outer(stats.mean.double(), stats.mean.double())
    size = float(gram.diagonal().mean())
    if size <= 0:  # the inputs never moved
        return Space(None, row)
    gram = (gram + gram.T) / 2
    while True:
        root, failed = torch.linalg.cholesky_ex(gram + damp * size * torch.eye(len(gram), dtype=torch.float64))
        if not int(failed):
            return Space(root, row)
        damp = max(10 * damp, 1e-8)


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix in a space, and what its factors are made of."""

    left: torch.Tensor  # [rows, k]
    values: torch.Tensor  # [k], falling
    right: torch.Tensor  # [k, cols]
    space: Space

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, rank] and [rank, cols], float64, balanced: their product is the best of that rank."""
        share = self.values[:rank].sqrt()
        left = self.left[:, :rank] * share
        if self.space.row is not None:
            left = left / self.space.row[:, None]
        return left, self.space.right_back(self.right[:rank] * share[:, None])

    def lost(self) -> torch.Tensor:
        """[k + 1]: the squared error of rank 0, 1, … k."""
        squares = (self.values**2).flip(0).cumsum(0).flip(0)
        return torch.cat([squares, squares.new_zeros(1)])

    def rank_for(self, energy: float) -> int:
        """The least rank (at least 1) that keeps this share of the energy."""
        lost = self.lost()
        return max(1, int((lost > (1 - energy) * lost[0]).sum()))


def spectrum_of(matrix: torch.Tensor, space: Space) -> Spectrum:
    """Of a float matrix [rows, cols]."""
    left, values, right = torch.linalg.svd(space.into(matrix), full_matrices=False)
    return Spectrum(left, values, right, space)


def even_rank(rows: int, cols: int) -> int:
    """The greatest rank whose two factors are smaller than the matrix: rank · (rows + cols) < rows · cols."""
    return (rows * cols - 1) // (rows + cols)


def integers(matrix: torch.Tensor, bits: int, scale: torch.Tensor) -> torch.Tensor:
    """The nearest of -2^(b-1)+1 … 2^(b-1)-1 times `scale`, as those integers (float64)."""
    top = 2 ** (bits - 1) - 1
    return torch.clamp(torch.round(matrix / scale), -top, top)


def factor_code(left: torch.Tensor, right: torch.Tensor, space: Space, bits: int) -> Code:
    """A `lowrank` code of two factors; `bits` 16: as float16, else as integers, the left one without scales.

    The columns of the left factor are stretched to the whole range of integers (the right factor's rows take that up, one float16 scale each).
    The right factor is fitted again to the rounded left one, by least squares in `space`, before it is rounded itself.
    """
    rows, rank, cols = left.shape[0], left.shape[1], right.shape[1]
    if bits == 16:
        parts = [Code("dense", tuple(f.shape), (), (f.to(torch.float16).numpy(),)) for f in (left, right)]
        return Code("lowrank", (rows, cols), (), (), tuple(parts))
    top, middle = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    stretch = left.abs().amax(0).clamp_min(1e-30) / top
    q = integers(left, bits, stretch)
    basis = q if space.row is None else q * space.row[:, None]
    wanted = left @ right if space.row is None else (left @ right) * space.row[:, None]
    refit = torch.linalg.lstsq(basis, wanted, driver="gelsd").solution
    scale = (refit.abs().amax(1, keepdim=True) / top).clamp(6e-8, 65504).to(torch.float16).double()
    p = integers(refit, bits, scale)
    first = Code("grid", (rows, rank), (bits, 0), ((q + middle).to(torch.uint8).numpy(), np.zeros(0, np.float16), np.zeros(0, np.uint8)))
    second = Code(
        "grid", (rank, cols), (bits, 0), ((p + middle).to(torch.uint8).numpy(), scale.to(torch.float16).numpy(), np.zeros(0, np.uint8))
    )
    return Code("lowrank", (rows, cols), (), (), (first, second))


def factor_bytes(rows: int, cols: int, rank: int, bits: int) -> int:
    """About what `factor_code` stores at fixed rate."""
    return -(-rank * (rows + cols) * bits // 8) + (0 if bits == 16 else 2 * rank) + 40


class SvdConfig(Config):
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None  # share of the outputs' energy that is kept
    size: Annotated[float, Field(gt=0, lt=1)] | None = None  # share of the weight's numbers that is kept
    bits: Literal[4, 6, 8, 16] = 8  # of the factors; 16: float16
    data: bool = True  # weigh by the calibration inputs

    @model_validator(mode="after")
    def _one(self) -> SvdConfig:
        if sum(v is not None for v in (self.rank, self.energy, self.size)) > 1:
            raise ValueError("give one of rank, energy and size")
        return self

    def rank_of(self, rows: int, cols: int, spectrum: Spectrum) -> int:
        """The rank that the settings mean for one weight; 0.99 of the energy where they say nothing."""
        if self.rank is not None:
            return min(self.rank, rows, cols)
        if self.size is not None:
            return max(1, min(int(self.size * rows * cols / (rows + cols)), rows, cols))
        return spectrum.rank_for(self.energy if self.energy is not None else 0.99)


class Svd:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "svd"
    family: ClassVar[Family] = "low-rank"
    source: ClassVar[str] = "ASVD (arXiv:2312.05821), SVD-LLM (arXiv:2403.07378): whitened by the Cholesky factor of the inputs' gram"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[SvdConfig]] = SvdConfig

    def why_not(self, weight: Weight, config: SvdConfig) -> str | None:
        if weight.groups > 1:
            return "its channels are in groups"
        if even_rank(weight.rows, weight.cols) < 1:
            return f"two factors of {weight.rows}x{weight.cols} are never smaller than it"
        if config.rank is not None and config.rank > even_rank(weight.rows, weight.cols):
            return f"rank {config.rank} is not smaller than {weight.rows}x{weight.cols} (up to {even_rank(weight.rows, weight.cols)} is)"
        return None

    def options(self, weight: Weight) -> Sequence[SvdConfig]:
        return [SvdConfig(size=s, bits=b) for b in (4, 8) for s in (0.25, 0.5, 0.75) if even_rank(weight.rows, weight.cols) >= 1]

    def apply(self, weight: Weight, stats: Stats | None, config: SvdConfig) -> Code:
        space = space_of(stats if config.data else None)
        spectrum = spectrum_of(weight.matrix, space)
        rank = min(config.rank_of(weight.rows, weight.cols, spectrum), max(1, even_rank(weight.rows, weight.cols)))
        return factor_code(*spectrum.factors(rank), space, config.bits)


METHOD = Svd()


def stored(code: Code) -> int:
    """Bytes of a code."""
    return len(pack(code))
