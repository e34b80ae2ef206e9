"""The choice as a multiple-choice knapsack with several budgets, solved by HiGHS with a proven gap."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from edgesdk.plan.types import SolverProof


@dataclass(frozen=True)
class Option:
    """One precision for one group of units that share a weight. `use` is what it adds to each metric ("memory", "latency", "harm", …)."""

    group: str
    precision: str
    use: Mapping[str, float]


@dataclass(frozen=True)
class Solution:
    chosen: dict[str, Option]  # group → option
    proof: SolverProof
    stretch: float  # 1 when everything fits; else every budget times this would be needed


def solve(options: Sequence[Option], fixed: Mapping[str, float], limits: Mapping[str, float], objective: str = "latency") -> Solution:
    """Least `objective` with every metric within its limit (`fixed` is what does not depend on the choice).

    When that is infeasible: the choice that needs the smallest common stretch of the limits, ties broken by the objective.
    Quality ("harm") is never stretched: without compression it always holds.
    """
    solution = _milp(options, fixed, limits, objective, stretch=False)
    return solution or _milp(options, fixed, limits, objective, stretch=True) or _first(options)


def _first(options: Sequence[Option]) -> Solution:
    chosen: dict[str, Option] = {}
    for option in options:
        chosen.setdefault(option.group, option)
    return Solution(chosen, SolverProof(name="none", status="no choice to make", objective=0, bound=0, gap=0, seconds=0), 1.0)


def _milp(
    options: Sequence[Option], fixed: Mapping[str, float], limits: Mapping[str, float], objective: str, stretch: bool
) -> Solution | None:
    start = time.perf_counter()
    if not options:
        fits = all(fixed.get(k, 0.0) <= v for k, v in limits.items())
        return _first(options) if fits or stretch else None
    groups = sorted({o.group for o in options})
    n = len(options)
    size = n + 1 if stretch else n
    scale = max(sum(abs(o.use.get(objective, 0.0)) for o in options), 1e-30)
    cost = np.zeros(size)
    cost[:n] = [o.use.get(objective, 0.0) / scale + 1e-4 * o.use.get("harm", 0.0) for o in options]
    if stretch:
        cost[:n] *= 1e-3
        cost[n] = 1.0
    pick = np.zeros((len(groups), size))
    for i, option in enumerate(options):
        pick[groups.index(option.group), i] = 1.0
    constraints = [LinearConstraint(pick, 1.0, 1.0)]
    for metric, limit in limits.items():
        row = np.zeros(size)
        row[:n] = [o.use.get(metric, 0.0) / limit for o in options]
        elastic = stretch and metric != "harm"
        if elastic:
            row[n] = -1.0
        room = -fixed.get(metric, 0.0) / limit + (0.0 if elastic else 1.0)
        constraints.append(LinearConstraint(row[None], -np.inf, room + 1e-9))
    upper = np.ones(size)
    if stretch:
        upper[n] = np.inf
    integrality = np.ones(size, dtype=np.int64)
    if stretch:
        integrality[n] = 0
    result = milp(
        cost, constraints=constraints, bounds=Bounds(np.zeros(size), upper), integrality=integrality,
        options={"mip_rel_gap": 1e-4, "time_limit": 20.0},
    )  # fmt: skip
    if result.x is None:
        return None
    chosen = {o.group: o for i, o in enumerate(options) if result.x[i] > 0.5}
    value, bound = float(result.fun), float(result.mip_dual_bound if result.mip_dual_bound is not None else result.fun)
    proof = SolverProof(
        name="HiGHS", status=str(result.message).split("(")[0].strip()[:80], objective=value, bound=bound,
        gap=abs(value - bound) / max(abs(value), 1e-12), seconds=time.perf_counter() - start,
    )  # fmt: skip
    return Solution(chosen, proof, max(1.0, float(result.x[n])) if stretch else 1.0)
