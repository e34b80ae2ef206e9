"""What the codebook methods share: exact k-means on a line, k-means of vectors, and rounding that corrects its own error.

Rounding to any set of points under the error tr(E·H·Eᵀ) of the outputs (H: mean x·xᵀ of the inputs, E: the weight's error) goes three ways, all here:
`feedback` rounds block after block of columns and lets the columns that are left take up the error (GPTQ, arXiv:2210.17323, here for vectors too),
`refine` revisits every block with all others fixed (coordinate descent), `refit` moves the points themselves to their least-squares place.
Shapes: weights [groups, rows, cols] (a convolution's groups; one group else), H [groups, cols, cols], blocks of `length` columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgesdk.compress.compiled import compiled
from edgesdk.compress.types import Stats, Weight

Pick = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(first column, targets [groups, rows, length], factor [groups, length, length]) → points [groups, rows, length]: each row's
nearest by the length of (target - point) @ factor."""


def _line(x: Any, w: Any, k: int) -> Any:
    """Exact weighted k-means of sorted x [n] with weights w > 0: dynamic programming over the last border, which only ever moves right
    (divide and conquer, O(k·n·log n); Wu 1991, Grønlund et al. arXiv:1701.07204). Answers the k centres."""
    n = len(x)
    sw, sx, sxx = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        sw[i + 1] = sw[i] + w[i]
        sx[i + 1] = sx[i] + w[i] * x[i]
        sxx[i + 1] = sxx[i] + w[i] * x[i] * x[i]
    best, border = np.empty((k, n + 1)), np.zeros((k, n + 1), np.int64)
    for j in range(n + 1):
        best[0, j] = sxx[j] - sx[j] * sx[j] / sw[j] if j else 0.0
    stack = np.empty((n + 65, 4), np.int64)
    for c in range(1, k):
        stack[0] = (0, n, 0, n)
        top = 1
        while top:
            top -= 1
            low, high, first, last = stack[top]
            mid = (low + high) // 2
            least, at = np.inf, first
            for i in range(first, min(mid, last) + 1):
                cost = best[c - 1, i]
                if mid > i:
                    gap = sx[mid] - sx[i]
                    cost += max(0.0, sxx[mid] - sxx[i] - gap * gap / (sw[mid] - sw[i]))
                if cost < least:
                    least, at = cost, i
            best[c, mid], border[c, mid] = least, at
            if low < mid:
                stack[top] = (low, mid - 1, first, at)
                top += 1
            if mid < high:
                stack[top] = (mid + 1, high, at, last)
                top += 1
    centres, end = np.empty(k), n
    for c in range(k - 1, -1, -1):
        start = border[c, end] if c else 0
        centres[c] = (sx[end] - sx[start]) / (sw[end] - sw[start]) if end > start else x[min(start, n - 1)]
        end = start
    return np.sort(centres)


_fast_line = compiled(_line)


def line_kmeans(values: Any, weights: Any, k: int, most: int = 4096) -> Any:
    """The k centres (float64, sorted) of least weighted squared error; exact up to `most` values, above it over `most` bins of equal count.

    Weights of zero count a millionth of the mean weight, so that no value is left without a near centre.
    """
    x, w = np.asarray(values, np.float64).ravel(), np.asarray(weights, np.float64).ravel()
    w = np.maximum(w, 1e-6 * w.mean()) if w.any() else np.ones_like(w)
    order = np.argsort(x, kind="stable")
    x, w = x[order], w[order]
    if len(x) > most:
        starts = np.arange(most) * len(x) // most
        total = np.add.reduceat(w, starts)
        x, w = np.add.reduceat(w * x, starts) / total, total
    return _fast_line(x, w, k)


def damped(weight: Weight, stats: Stats | None, damp: float = 0.01) -> torch.Tensor:
    """H, float64 [groups, cols, cols], made safe to invert. Entries off the diagonal shrink by what few inputs leave uncertain
    (count against cols), inputs that are always zero count `damp` of the mean. Without statistics: the identity."""
    if stats is None:
        return torch.eye(weight.cols, dtype=torch.float64).expand(weight.groups, -1, -1).clone()
    h = stats.gram.to(torch.float64).clone()
    diagonal = h.diagonal(dim1=1, dim2=2).clone()
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    h *= stats.count / (stats.count + 0.1 * weight.cols)
    h.diagonal(dim1=1, dim2=2).copy_(diagonal + damp * mean)
    return h


def grouped(weight: Weight) -> torch.Tensor:
    """The matrix as [groups, rows, cols]."""
    return weight.matrix.reshape(weight.groups, -1, weight.cols)


def feedback(w: torch.Tensor, h: torch.Tensor, pick: Pick, length: int = 1) -> torch.Tensor:
    """Rounded w. Blocks of `length` columns in order; a block's error, seen through what later columns can make good, is what `pick` minimises."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    blocks = _diagonal_blocks(upper, length)
    factors = torch.linalg.solve_triangular(blocks, torch.eye(length, dtype=blocks.dtype).expand_as(blocks), upper=True).float()
    upper, left, out = upper.float(), w.clone(), torch.empty_like(w)
    for i, start in enumerate(range(0, w.shape[2], length)):
        end = start + length
        out[:, :, start:end] = pick(start, left[:, :, start:end], factors[:, i])
        error = (left[:, :, start:end] - out[:, :, start:end]) @ factors[:, i]
        left[:, :, end:] -= error @ upper[:, start:end, end:]
    return out


def refine(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor, pick: Pick, length: int = 1) -> torch.Tensor:
    """q with every block chosen anew while all others stay: never a greater error, when `pick` takes the nearest."""
    factors = torch.linalg.cholesky(_diagonal_blocks(h, length))
    solves, factors = torch.cholesky_inverse(factors).float(), factors.float()
    h, out = h.float(), q.clone()
    pull = (w - out) @ h
    for i, start in enumerate(range(0, w.shape[2], length)):
        end = start + length
        old = out[:, :, start:end]
        new = pick(start, old + pull[:, :, start:end] @ solves[:, i], factors[:, i])
        pull -= (new - old) @ h[:, start:end]
        out[:, :, start:end] = new
    return out


def _diagonal_blocks(h: torch.Tensor, length: int) -> torch.Tensor:
    """[groups, cols, cols] → [groups, cols / length, length, length]."""
    blocks = h.reshape(h.shape[0], -1, length, h.shape[2] // length, length)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def refit(basis: torch.Tensor, w: torch.Tensor, h: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """The coefficients c of least error tr(E·H·Eᵀ), E = w - Σ c_k · basis[k].

    basis [k, groups, rows, cols]; `now` [k] (one set for the whole weight) or [groups, rows, k] (one for each row) is what stays where
    the inputs do not decide. Answers the shape of `now`, float64.
    """
    h = h.to(torch.float32)
    seen = basis @ h
    if now.dim() == 1:
        a, b = torch.einsum("kgrc,lgrc->kl", seen, basis), torch.einsum("kgrc,grc->k", seen, w)
    else:
        a, b = torch.einsum("kgrc,lgrc->grkl", seen, basis), torch.einsum("kgrc,grc->grk", seen, w)
    a, b = a.double(), b.double()
    ridge = 1e-4 * a.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1e-20
    a.diagonal(dim1=-2, dim2=-1).add_(ridge)
    missing = b - (a @ now[..., None]).squeeze(-1) + ridge * now
    moved: torch.Tensor = torch.linalg.solve(a, missing[..., None]).squeeze(-1)
    return now + moved


def short(scale: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Scales within float16's range, of `bits` significant bits: the low byte is then nearly always the same and takes little in an entropy code."""
    mantissa, exponent = torch.frexp(scale.clamp(1e-6, 6e4))
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def loss(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> float:
    """tr(E·H·Eᵀ) of E = w - q."""
    e = (w - q).to(torch.float64)
    return float(((e @ h) * e).sum())


def vector_kmeans(points: torch.Tensor, weights: torch.Tensor, k: int, rounds: int = 15) -> torch.Tensor:
    """k centres [k, length] of points [n, length], each counted with its weight [n]: seeded by k-means++ (always the same), then Lloyd's
    rounds; a centre that no point is nearest to moves to the point that pays most."""
    generator = torch.Generator().manual_seed(0)
    w = weights.clamp_min(1e-6 * float(weights.mean()) or 1e-20)
    centres = points[torch.multinomial(w, 1, generator=generator)]
    away = ((points - centres) ** 2).sum(1)
    while len(centres) < k:  # several at a time: a sixteenth of what there is
        cost = (w * away).clamp_min(1e-30)
        count = min(k - len(centres), max(1, len(centres) // 16), len(points))
        new = points[torch.multinomial(cost, count, generator=generator)]
        centres = torch.cat([centres, new])
        away = torch.minimum(away, nearest(points, new)[1])
    for _ in range(rounds):
        which, away = nearest(points, centres)
        total = torch.zeros(k).index_add_(0, which, w)
        sums = torch.zeros_like(centres).index_add_(0, which, w[:, None] * points)
        centres = sums / total.clamp_min(1e-30)[:, None]
        empty = torch.nonzero(total == 0).flatten()
        if len(empty):
            centres[empty] = points[(w * away).topk(min(len(empty), len(points))).indices].repeat(-(-len(empty) // len(points)), 1)[
                : len(empty)
            ]
    return centres


def nearest(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every point [..., n, length] the nearest centre [..., k, length] and the squared distance."""
    half = (centres**2).sum(-1)[..., None, :] / 2
    size = max(1, (1 << 22) // centres.shape[-2])
    found = [(half - p @ centres.transpose(-1, -2)).min(-1) for p in torch.split(points, size, -2)]
    away = 2 * torch.cat([f.values for f in found], -1) + (points**2).sum(-1)
    return torch.cat([f.indices for f in found], -1), away.clamp_min(0)
