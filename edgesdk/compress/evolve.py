"""Evolutionary refinement of a choice of options on the true loss, where errors of weights do not add up.

Source: EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search (arXiv:2410.14649): level switches that keep the budget,
many offspring judged on little data, few on all. Changed: the start is the exact answer of the additive problem, and bytes that a switch
leaves over are spent again.
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
    sizes: Any,
    options: Sequence[int],
    limit: float,
    judges: Sequence[Judge],
    *,
    generations: int,
    offspring: int = 16,
    seed: int = 0,
    step: Step | None = None,
) -> Evolved:
    """Improve a choice that holds its budget: `sizes` float64 [weights, options], summed no larger than `limit`.

    `options[i]` is how many weight i has. `judges` from the cheapest to the one that decides: a quarter of the offspring passes each.
    The answer is never worse than the start by the last judge.
    """
    rng, sizes = np.random.default_rng(seed), np.asarray(sizes, np.float64)
    best = tuple(int(p) for p in picked)
    value = start = judges[-1](best)
    known: dict[tuple[int, ...], float] = {best: value}
    for turn in range(generations):
        if step:
            step(f"generation {turn + 1} of {generations}, loss {value:.4g}", turn / generations)
        young = {c for c in (_mutated(best, sizes, options, limit, rng) for _ in range(offspring)) if c not in known}
        for judge in judges[:-1]:
            young = set(sorted(young, key=lambda c: (judge(c), c))[: max(2, len(young) // 4)])
        for child in sorted(young):
            known[child] = judges[-1](child)
            if known[child] < value:
                best, value = child, known[child]
    return Evolved(best, value, start, len(known))


def _mutated(parent: tuple[int, ...], sizes: Any, options: Sequence[int], limit: float, rng: np.random.Generator) -> tuple[int, ...]:
    """One to three weights a step up or down, then others down until the budget holds, then up as far as it allows."""
    child = np.array(parent)
    rows = np.arange(len(child))
    for _ in range(int(rng.integers(1, 4))):
        i = int(rng.integers(len(child)))
        child[i] = np.clip(child[i] + rng.choice((-2, -1, 1, 2), p=(0.15, 0.35, 0.35, 0.15)), 0, options[i] - 1)
    while (over := sizes[rows, child].sum() - limit) > 0:
        can = np.flatnonzero(child > 0)
        if not len(can):
            return parent
        spare = sizes[can, child[can]] - sizes[can, child[can] - 1]
        enough = can[spare >= over]
        i = int(rng.choice(enough if len(enough) and rng.random() < 0.7 else can))
        child[i] -= 1
    for i in rng.permutation(len(child)):
        if child[i] + 1 < options[i] and sizes[rows, child].sum() + sizes[i, child[i] + 1] - sizes[i, child[i]] <= limit:
            child[i] += 1
    return tuple(int(c) for c in child)
