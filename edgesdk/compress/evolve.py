"""Evolutionary refinement of a choice of options on the true loss, where errors of weights do not add up.

Source: EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search (arXiv:2410.14649): level switches that keep the budget,
many offspring judged on little data, few on all. Changed: the start is the exact answer of the additive problem, there may be several budgets, and what a
switch leaves over of them is spent again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgesdk.compress.types import Step

Judge = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Evolved:
    picked: tuple[int, ...]
    loss: float  # by the last judge
    start: float  # of the choice it began with
    evaluations: int


def evolve(
    picked: Sequence[int],
    loss: Any,
    use: Any,
    limits: Any,
    judges: Sequence[Judge],
    *,
    generations: int,
    offspring: int = 16,
    seed: int = 0,
    step: Step | None = None,
) -> Evolved:
    """Improve a choice that holds its budgets.

    `loss` float64 [weights, options], inf for an option that a weight has not, orders a weight's options; `use` [budgets, weights, options] sums to
    no more than `limits` [budgets]. `judges` from the cheapest to the one that decides: a quarter of the offspring passes each.
    The answer is never worse than the start by the last judge.
    """
    rng = np.random.default_rng(seed)
    field = _Field(np.asarray(loss, np.float64), np.asarray(use, np.float64), np.asarray(limits, np.float64))
    best = tuple(int(p) for p in picked)
    value = start = judges[-1](best)
    known: dict[tuple[int, ...], float] = {best: value}
    for turn in range(generations):
        if step:
            step(f"generation {turn + 1} of {generations}, loss {value:.4g}", turn / generations)
        young = {c for c in (field.mutated(best, rng) for _ in range(offspring)) if c not in known}
        for judge in judges[:-1]:
            young = set(sorted(young, key=lambda c: (judge(c), c))[: max(2, len(young) // 4)])
        for child in sorted(young):
            known[child] = judges[-1](child)
            if known[child] < value:
                best, value = child, known[child]
    return Evolved(best, value, start, len(known))


class _Field:
    """Options of every weight as levels, the most loss first, and what each takes as a share of every budget."""

    def __init__(self, loss: Any, use: Any, limits: Any) -> None:
        self.count = np.isfinite(loss).sum(1)
        self.order = np.argsort(np.where(np.isfinite(loss), -loss, np.inf), axis=1, kind="stable")  # level → option
        self.level = np.argsort(self.order, axis=1)
        shares = np.where(np.isfinite(loss), use, np.inf) / np.maximum(limits, 1e-30)[:, None, None]
        self.use = np.take_along_axis(shares, self.order[None], axis=2)  # [budgets, weights, levels]
        self.rows = np.arange(len(loss))

    def mutated(self, parent: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        """One to three weights a step up or down, then others moved until every budget holds, then up as far as they allow."""
        child = self.level[self.rows, parent]
        for _ in range(int(rng.integers(1, 4))):
            i = int(rng.integers(len(child)))
            child[i] = np.clip(child[i] + rng.choice((-2, -1, 1, 2), p=(0.15, 0.35, 0.35, 0.15)), 0, self.count[i] - 1)
        while (over := self._over(child)) > 0:
            after = self._after(child)
            less = after < over - 1e-15
            can = np.flatnonzero(less.any(1))
            if not len(can):
                return parent
            steps = np.abs(np.arange(less.shape[1]) - child[:, None]) + 0.5 * (np.arange(less.shape[1]) > child[:, None])
            nearest = np.where(less, steps, np.inf).argmin(1)  # the next level that takes less, rather one of more loss
            enough = can[after[can, nearest[can]] <= 0]
            i = int(rng.choice(enough if len(enough) and rng.random() < 0.7 else can))
            child[i] = nearest[i]
        room = 1 + 1e-12 - self.use[:, self.rows, child].sum(1)
        for i in rng.permutation(len(child)):
            more = self.use[:, i, child[i] + 1 : self.count[i]] - self.use[:, i, child[i]][:, None]
            fits = np.flatnonzero((more <= room[:, None]).all(0))
            if len(fits):
                room = room - more[:, fits[0]]
                child[i] += 1 + fits[0]
        return tuple(int(o) for o in self.order[self.rows, child])

    def _over(self, child: Any) -> float:
        return float(np.maximum(self.use[:, self.rows, child].sum(1) - 1 - 1e-12, 0).sum())

    def _after(self, child: Any) -> Any:
        """What would be over the budgets if one weight took another level, [weights, levels]."""
        now = self.use[:, self.rows, child]
        return np.maximum(now.sum(1)[:, None, None] - now[:, :, None] + self.use - 1 - 1e-12, 0).sum(0)
