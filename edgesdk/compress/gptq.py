"""GPTQ: columns are rounded one after the other, and those to come take up the error of those that are done.

Source: GPTQ, Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar and others, arXiv:2210.17323).
With H the mean of x·xᵀ over calibration inputs, the squared output error of a row is e·H·eᵀ. Let H⁻¹ = Uᵀ·U with U upper triangular.
Rounding column j by r then costs (r / U_jj)² when every later column k moves by -r · U_jk / U_jj.
Kept of the original: damping, the order by H's diagonal. Changed: scales are searched by the error weighted with H's diagonal and do not
move while columns are rounded (so the order may cross groups), further sweeps revisit every column, levels need not be a power of two.
With `rate` the grids have no bounds and no groups: points are chosen by error and stored bits (see `rate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.rate import best_at
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.errors import InputError
from edgesdk.packed import Code, groups_of

Round = Callable[[int, torch.Tensor], torch.Tensor]


class GptqConfig(Config):
    bits: Annotated[float, Field(ge=1.5, le=8)] = 4.0  # a weight: log2 of the levels
    group: Annotated[int, Field(ge=0)] = 32  # columns that share a scale; 0: a whole row
    symmetric: bool = True
    order: bool = True  # columns with the largest inputs first
    damp: Annotated[float, Field(gt=0, le=1)] = 0.01  # added to H's diagonal, as a share of its mean
    search: bool = True  # scales by weighted error; else by the largest weight
    sweeps: Annotated[int, Field(ge=0, le=20)] = 2  # visits of every column after the first
    rate: Annotated[float, Field(ge=0, le=12)] = 0.0  # stored bits a weight, everything counted, in place of bits and group; 0: a grid
    trellis: bool = True  # with rate: points of a trellis


class Problem:
    """Weights [groups, rows, cols] with the H of their inputs [groups, cols, cols], columns in the order they are rounded in."""

    def __init__(self, weight: Weight, gram: torch.Tensor | None, damp: float, order: bool = True) -> None:
        count = 1 if gram is None else len(gram)
        if gram is not None and gram.shape[-1] != weight.cols:
            raise InputError(f"{weight.name}: statistics of {gram.shape[-1]} inputs for {weight.cols} columns", "take them of this model")
        self.w = weight.matrix.reshape(count, -1, weight.cols).float()
        h = torch.eye(weight.cols, dtype=torch.float64)[None] if gram is None else gram.double().clone()
        diagonal = h.diagonal(dim1=1, dim2=2)
        diagonal += (damp * diagonal.mean(1, keepdim=True)).clamp_min(1e-10)
        self.perm = torch.argsort(diagonal, dim=1, descending=True, stable=True) if order else torch.arange(weight.cols).expand(count, -1)
        self.w = self.to_order(self.w)
        h = h.gather(1, self.perm[:, :, None].expand_as(h)).gather(2, self.perm[:, None, :].expand_as(h))
        self.u = upper(h)  # float64
        self.h = h

    def to_order(self, x: torch.Tensor) -> torch.Tensor:
        """[groups, rows, cols] or [groups, 1, cols] from the model's order of columns."""
        return x.gather(2, self.perm[:, None, :].expand(x.shape))

    def from_order(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).scatter_(2, self.perm[:, None, :].expand(x.shape), x)

    def error(self, decoded: torch.Tensor) -> float:
        """Σ e·H·eᵀ of weights in this order."""
        e = (decoded - self.w).double()
        return float(((e @ self.h) * e).sum())


def upper(h: torch.Tensor) -> torch.Tensor:
    """U with h⁻¹ = Uᵀ·U, float64 [groups, cols, cols]; more damping where h is not positive definite."""
    for _ in range(12):
        factor, info = torch.linalg.cholesky_ex(h.flip(1, 2))
        if not bool(info.any()):
            eye = torch.eye(h.shape[1], dtype=h.dtype).expand_as(h)
            solved: torch.Tensor = torch.linalg.solve_triangular(factor.flip(1, 2), eye, upper=True)
            return solved
        h.diagonal(dim1=1, dim2=2).mul_(1.1)
    raise InputError("the statistics of a weight's inputs are not positive definite", "use other calibration data or a larger damp")


def first_pass(problem: Problem, rounded: Round, block: int = 64) -> torch.Tensor:
    """Every column once, in order; `rounded(j, target [groups, rows]) → [groups, rows]`. Returns the decoded weights, in this order."""
    w, u = problem.w.clone(), problem.u.float()
    out = torch.empty_like(w)
    for start in range(0, w.shape[2], block):
        end = min(start + block, w.shape[2])
        errors = torch.zeros(*w.shape[:2], end - start)
        for j in range(start, end):
            out[:, :, j] = rounded(j, w[:, :, j])
            errors[:, :, j - start] = (w[:, :, j] - out[:, :, j]) / u[:, None, j, j]
            w[:, :, j + 1 : end] -= errors[:, :, j - start, None] * u[:, j, None, j + 1 : end]
        w[:, :, end:] -= errors @ u[:, start:end, end:]
    return out


def next_pass(problem: Problem, out: torch.Tensor, rounded: Round) -> None:
    """Every column again, best for what the others are now, in place: no step adds to the error where `rounded` takes the nearest."""
    h = problem.h.float()
    slope = (out - problem.w) @ h
    for j in range(out.shape[2]):
        new = rounded(j, out[:, :, j] - slope[:, :, j] / h[:, None, j, j])
        moved = new - out[:, :, j]
        if bool(moved.any()):
            slope += moved[:, :, None] * h[:, j, None, :]
            out[:, :, j] = new


class Gptq:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "gptq"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "GPTQ (arXiv:2210.17323)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[GptqConfig]] = GptqConfig

    def why_not(self, weight: Weight, config: GptqConfig) -> str | None:
        return None

    def options(self, weight: Weight) -> Sequence[GptqConfig]:
        grids = [GptqConfig(bits=b, group=g) for b in (2, 2.5, 3, 4, 8) for g in (0, 32) if g < weight.cols]
        return grids + [GptqConfig(rate=r) for r in (1.5, 2, 2.5, 3, 4, 6)]

    def apply(self, weight: Weight, stats: Stats | None, config: GptqConfig) -> Code:
        if not config.rate:
            return fixed(weight, stats, config)
        problem = Problem(weight, None if stats is None else stats.gram, config.damp, config.order)
        return best_at(problem, config.rate, trellis=config.trellis, sweeps=min(config.sweeps, 1) if stats else 0, kept=weight.kept).code


def fixed(weight: Weight, stats: Stats | None, config: GptqConfig) -> Code:
    """A grid of 2^bits levels; embeddings, which have no inputs, are rounded to nearest on searched scales."""
    problem = Problem(weight, None if stats is None else stats.gram, config.damp, config.order)
    levels = max(2, math.floor(2**config.bits + 1e-9))
    group = config.group if groups_of(weight.cols, config.group) > 1 else 0
    importance = (problem.from_order(problem.h.diagonal(dim1=1, dim2=2).float()[:, None])).expand_as(problem.w).reshape(weight.matrix.shape)
    scale, zero = scales(weight.matrix, importance, levels, group, config.symmetric, config.search)
    shape = problem.w.shape
    s, z = (problem.to_order(t.repeat_interleave(group or weight.cols, 1)[:, : weight.cols].reshape(shape)) for t in (scale, zero))

    kept = None if weight.kept is None else problem.to_order(weight.kept.reshape(shape))

    def rounded(j: int, target: torch.Tensor) -> torch.Tensor:
        k = torch.clamp(torch.round(target / s[:, :, j] + z[:, :, j]), 0, levels - 1)
        values = (k - z[:, :, j]) * s[:, :, j]
        return values if kept is None else values * kept[:, :, j]

    out = first_pass(problem, rounded)
    for _ in range(config.sweeps if stats is not None else 0):
        next_pass(problem, out, rounded)
    q = problem.from_order(torch.round(out / s + z)).reshape(weight.matrix.shape)
    return _grid(q, scale, zero, levels, group, config.symmetric)


def _grid(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int, group: int, symmetric: bool) -> Code:
    bits = max(2, math.ceil(math.log2(levels)))
    middle = 1 << (bits - 1)
    if not symmetric:
        zeros = zero.to(torch.uint8).numpy()
    elif levels == 2 * middle:
        zeros = np.zeros(0, np.uint8)
    else:
        zeros = np.full((1, 1), levels // 2, np.uint8)
    return Code("grid", tuple(q.shape), (bits, group), (q.to(torch.uint8).numpy(), scale.to(torch.float16).numpy(), zeros))


def scales(
    matrix: torch.Tensor, importance: torch.Tensor, levels: int, group: int, symmetric: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (as float16 holds it) and zero point [rows, groups]: those of the least Σ importance · (w - rounded)².

    A symmetric grid of an even number of levels has one more below zero than above; below 4 bits its scale may be negative, so that
    the further reaching side gets it.
    """
    rows, cols = matrix.shape
    width = group or cols
    pad = (0, -cols % width)
    w = torch.nn.functional.pad(matrix, pad).reshape(rows, -1, width)
    h = torch.nn.functional.pad(importance, pad).reshape(rows, -1, width)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    down, up = levels // 2, levels - 1 - levels // 2
    shares = torch.linspace(1.0, 0.35, 40).tolist() if search else [1.0]
    best = scale = zero = torch.empty(0)
    for share in shares:
        for sign in (1.0, -1.0) if symmetric and search and down != up and levels < 16 else (1.0,):
            if symmetric:
                a, b = (low, high) if sign > 0 else (-high, -low)
                s = sign * torch.maximum(-a / down, b / up) * share
                z = torch.full_like(s, down)
            else:
                s = (high - low) / (levels - 1) * share
                z = torch.clamp(torch.round(-low * share / s.clamp_min(1e-12)), 0, levels - 1)
            s = (torch.sign(s) * s.abs().clamp(6e-8, 65504)).to(torch.float16).float()
            s = torch.where(s == 0, torch.full_like(s, 6e-8).half().float(), s)
            k = torch.clamp(torch.round(w / s[..., None] + z[..., None]), 0, levels - 1)
            cost = (h * ((k - z[..., None]) * s[..., None] - w) ** 2).sum(-1)
            if not best.numel():
                best, scale, zero = cost, s, z
            better = cost < best
            best, scale, zero = torch.where(better, cost, best), torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


METHOD = Gptq()
