"""Entropy-constrained second-order rounding: the least output error for a number of *stored* bits, as `pack` writes them.

GPTQ's order and feedback (arXiv:2210.17323) with three changes that each follow from rate-distortion theory. With H⁻¹ = Uᵀ·U and rounding errors r,
the output error is Σ_j (r_j / U_jj)² and every column's bits fall by one per octave of its step, so at equal total bits the steps are to be
proportional to U_jj (reverse water-filling). Indices are entropy-coded with the model of `packed.matrices.best_model`, so grids need no bound, no groups and
no clipping; a point is chosen by error + λ·bits (λ by the slope of uniform rounding, D = Δ²/12 at high rate). Points of a trellis (see `walk`)
save up to another 0.17 bits a weight. The step Δ is searched until the stored bytes are what was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.compress.walk import first_walk, next_walk
from edgesdk.packed import Code, pack
from edgesdk.packed.matrices import Model, best_model, model_of, to_trellis

if TYPE_CHECKING:
    from edgesdk.compress.gptq import Problem

FREE = 1900  # the largest index while no model is known
SHIFT = {
    False: (2.05, 1.7),
    True: (1.2, 2.3),
}  # (a, b): weights of deviation σ take R bits where log2(σ / Δ) = R - a - b·e^-R; plain, trellis
PRICE = {False: 0.09, True: 0.2}  # λ / Δ²; by theory 0.115 and 0.37 at high rates, best over layers of our models at 1.5 to 3 bits
NONE = np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Rounded:
    log_step: float
    code: Code
    bytes: float  # of all of the code, within about a percent
    error: float  # Σ e·H·eᵀ, rows by their weight


class Rounder:
    """One weight's rounding with any step. Arrays of a group: [cols, rows], columns in the problem's order."""

    def __init__(self, problem: Problem, *, trellis: bool, water: bool = True, weights: Any = None, kept: Any = None) -> None:
        self.groups, self.rows, self.cols = problem.w.shape
        self.trellis = trellis and self.groups == 1
        self.perm = problem.perm.numpy()
        self.w = [np.ascontiguousarray(w.T) for w in problem.w.numpy()]
        self.u, self.h = problem.u.float().numpy(), problem.h.float().numpy()
        self.weights = np.ones((self.groups, self.rows), np.float32) if weights is None else weights.reshape(self.groups, self.rows)
        if kept is None and not bool(problem.w.any(2).all()):
            kept = problem.w.any(2, keepdim=True).expand_as(problem.w)  # what is 0 as a whole stays so
        masks = [NONE.reshape(0, 0)] * self.groups if kept is None else problem.to_order(kept.reshape(problem.w.shape)).numpy()
        self.kept = [np.ascontiguousarray(m.T.astype(np.uint8)) for m in masks]
        logs = np.log2(problem.u.diagonal(dim1=1, dim2=2).numpy())
        self.level = float(logs.mean())
        placed = np.zeros_like(logs)
        np.put_along_axis(placed, self.perm, logs - self.level, 1)
        fine = 2 if self.groups * self.rows < 200 else 4  # steps an octave: what they cost against what they gain
        self.col, self.row = np.zeros(self.cols), np.zeros(self.groups * self.rows)
        if water:
            self.col = np.clip(np.round(placed.mean(0) * fine) / fine, -9, 9)
            rows = np.repeat(placed.mean(1), self.rows) - np.log2(self.weights.reshape(-1)) / 2
            self.row = np.clip(np.round(rows * fine) / fine, -9, 9)
        self.spread = math.log2(max(float(problem.w.std(correction=0)), 1e-30))

    def start(self, bits: float) -> float:
        """log2 of a step that takes about so many bits a weight."""
        once, low = SHIFT[self.trellis]
        return self.spread - float(self.col.mean()) - float(self.row.mean()) + once + low * math.exp(-bits) - bits

    def run(self, log_step: float, *, price: float | None = None, sweeps: int = 1) -> Rounded:
        """`price`: λ/Δ². The bits that are priced are those of rounding without a price (a model that follows its own choices drifts to zeros)."""
        price = PRICE[self.trellis] if price is None else price
        col = 2.0 ** (self.col + log_step)
        col = col.astype(np.float16 if col.min() > 1e-4 and col.max() < 6e4 else np.float32)
        row = (2.0**self.row).astype(np.float16)
        steps = row.astype(np.float32).reshape(self.groups, self.rows), col.astype(np.float32)
        least = price * 4.0 ** (log_step - self.level)
        points = [self._walk(g, None, [], steps, 0.0) for g in range(self.groups)]
        model = self._model(points)
        if price > 0:
            points = [self._walk(g, model, [], steps, least) for g in range(self.groups)]
        for _ in range(sweeps):
            model = self._model(points) if price > 0 else model
            points = [self._walk(g, model, points, steps, least) for g in range(self.groups)]
        code = self._code(self._matrix(points), row, col)
        return Rounded(log_step, code, size_of(code), self._error(points, steps))

    def _walk(self, g: int, model: Model | None, points: list[Any], steps: tuple[Any, Any], price: float) -> Any:
        """Group g, for the first time or (with `points`) again."""
        col = steps[1][self.perm[g]]
        if model is None:
            bits = np.zeros((2, FREE + 1), np.float32)
            classes = np.zeros(self.rows, np.int64), np.zeros(self.cols, np.int64)
        else:
            bits = _further(model.bits.reshape(-1, model.most + 1)).astype(np.float32)
            rows = model.row.astype(np.int64).reshape(self.groups, self.rows)[g]
            classes = rows, model.col.astype(np.int64)[self.perm[g]]
        given = col, steps[0][g], self.weights[g], *classes, bits, price, self.trellis, self.kept[g]
        if not points:
            return first_walk(self.w[g].copy(), self.u[g], *given)
        made = points[g].copy()
        next_walk(self.h[g], self._by_h(g, self._off(g, made, steps)), made, *given)
        return made

    def _off(self, g: int, points: Any, steps: tuple[Any, Any]) -> Any:
        """Points less the weights, float32 [cols, rows]."""
        return points.astype(np.float32) * steps[1][self.perm[g]][:, None] * steps[0][g] - self.w[g]

    def _by_h(self, g: int, x: Any) -> Any:
        """H @ x by torch, whose number of threads is under control here (numpy's is not)."""
        import torch

        return (torch.from_numpy(self.h[g]) @ torch.from_numpy(x)).numpy()

    def _matrix(self, points: list[Any]) -> Any:
        """[rows, cols] in the model's order."""
        out = np.empty((self.groups, self.rows, self.cols), np.int64)
        for g, p in enumerate(points):
            out[g][:, self.perm[g]] = p.T
        return out.reshape(-1, self.cols)

    def _model(self, points: list[Any]) -> Model:
        v = self._matrix(points)
        turned = to_trellis(v) if self.trellis else None
        return model_of(*turned)[0] if turned else model_of(v)[0]

    def _error(self, points: list[Any], steps: tuple[Any, Any]) -> float:
        total = 0.0
        for g, p in enumerate(points):
            e = self._off(g, p, steps)
            total += float((self.weights[g] * (e * self._by_h(g, e)).sum(0)).sum())
        return total

    def _code(self, v: Any, row: Any, col: Any) -> Code:
        bits = max(2, int(np.abs(v).max()).bit_length() + 1)
        q = (v + (1 << (bits - 1))).astype(np.uint8 if bits <= 8 else np.uint16)
        none = np.zeros(0, np.float16)
        flat_row, flat_col = bool((row == row[0]).all()), bool((col == col[0]).all())
        if flat_row and flat_col:
            return Code("grid", v.shape, (bits, 0), (q, (row[:1] * col[:1])[None], NONE))
        grid = Code("grid", v.shape, (bits, 0), (q, none, NONE))
        return Code("scaled", v.shape, (), (none if flat_row else row, col), (grid,))


def _further(bits: Any) -> Any:
    """What indices cost that the model has not seen, too, on a line: what is fed back may push a weight past the largest index so far, and to
    round it to a smaller one would cost far more than any bits."""
    slope = np.maximum(bits[:, -1:] - bits[:, -2:-1], 1.0) if bits.shape[1] > 1 else np.ones_like(bits)
    return np.concatenate([bits, bits[:, -1:] + slope * np.arange(1, 5 + bits.shape[1] // 4)], 1)


def size_of(code: Code) -> float:
    """len(pack(code)) of what `Rounder` makes, without writing all of it."""
    grid = code.parts[0] if code.parts else code
    found = best_model(grid.arrays[0])
    if found is None:
        return len(pack(code))
    small = Code("grid", (1, 1), grid.numbers, (np.zeros((1, 1), np.uint8), *grid.arrays[1:]))
    return found[4] + 8 + len(pack(small)) + (len(pack(Code("scaled", code.shape, (), code.arrays))) if code.parts else 0)


def fair(bits: float, count: int) -> float:
    """Bits a weight for a matrix of so many elements: below 4096 half a bit more each time they halve, at most two. (Where every layer's relative
    error matters alike, 2^-2R is best in proportion to the elements; small layers cost next to nothing.)"""
    return bits + min(2.0, max(0.0, 0.5 * math.log2(4096 / count)))


def best_at(problem: Problem, bits: float, *, trellis: bool = True, sweeps: int = 1, kept: Any = None) -> Rounded:
    """`at_rate` with one step for all columns or a step for each, whichever loses less (their steps must be stored, too)."""
    bits = fair(bits, problem.w.numel())
    ways = [Rounder(problem, trellis=trellis, water=water, kept=kept) for water in (False, True)]
    tries = [way.run(way.start(bits), sweeps=0) for way in ways]
    count = problem.w.numel()
    losses = [math.log2(max(t.error, 1e-300)) / 2 + 8 * t.bytes / count for t in tries]  # an octave of Δ is a bit
    best = int(losses[1] < losses[0])
    return at_rate(ways[best], bits, sweeps=sweeps, first=tries[best])


def at_rate(rounder: Rounder, bits: float, *, price: float | None = None, sweeps: int = 1, first: Rounded | None = None) -> Rounded:
    """The rounding that is stored in at most `bits` a weight and within about half a percent of it; where steps of any size take more,
    that of fewest bytes found. Weights of less than 512 elements get 32 bytes on top for the names of their parts. `first`: what is known of this
    rounder without sweeps."""
    count = rounder.groups * rounder.rows * rounder.cols
    goal = bits * count / 8 + (32 if count < 512 else 0)
    done = first or rounder.run(rounder.start(bits), price=price, sweeps=0)
    if sweeps:  # about right without them, then with them
        quick = _search(rounder, done, (0.985 * goal, 1.01 * goal), price, 0, 3)
        done = rounder.run(quick.log_step, price=price, sweeps=sweeps)
    return _search(rounder, done, (0.994 * goal, goal), price, sweeps, 3 if sweeps else 5)


def _search(rounder: Rounder, done: Rounded, window: tuple[float, float], price: float | None, sweeps: int, most: int) -> Rounded:
    """From `done` on by at most so many more runs: the largest within a window of bytes or below it, or else what is least above it."""
    below: Rounded | None = None
    above: Rounded | None = None
    for left in range(most, -1, -1):
        if done.bytes <= window[1]:
            below = done if below is None or done.bytes > below.bytes else below
        elif above is None or done.bytes < above.bytes:
            above = done
        step = _next_step(rounder, below, above, done, sum(window) / 2)
        if not left or window[0] < done.bytes <= window[1] or abs(step - done.log_step) < 0.002:
            break
        done = rounder.run(step, price=price, sweeps=sweeps)
    answer = below or above
    assert answer is not None
    return answer


def _next_step(rounder: Rounder, below: Rounded | None, above: Rounded | None, last: Rounded, aim: float) -> float:
    """Between the nearest on both sides, or as far from the last as the expected steps lie apart."""
    if below is not None and above is not None:
        share = (above.bytes - aim) / (above.bytes - below.bytes)
        return above.log_step + min(max(share, 0.05), 0.95) * (below.log_step - above.log_step)
    scale = 8 / (rounder.groups * rounder.rows * rounder.cols)
    move = rounder.start(scale * aim) - rounder.start(scale * last.bytes)
    return last.log_step + min(max(move, -3.0), 3.0)
