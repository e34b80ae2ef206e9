"""One option for every unit, least loss within several budgets: a multiple-choice knapsack, answered with a certified gap.

Lagrangian relaxation (Everett 1963; Fisher, Management Science 27, 1981): for prices of the budgets every unit chooses for itself, and the
priced sum less what the budgets are worth bounds every answer from below. The answer at the best prices is repaired and improved by exchanges. What
an answer costs over the bound is the extra price of its options and the worth of what it leaves of the budgets; so all sets of exchanges up to some
extra can be looked at, and those not looked at cost more: that closes most gaps. HiGHS solves the rest, over the options that are not too dear.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesdk.compress import knapsack_loops as loops
from edgesdk.errors import DoesNotFit


@dataclass(frozen=True)
class Choice:
    """`picked[i]` is the option of unit i. `loss` ≥ `bound` ≤ every answer's loss; `gap` is their distance over the loss."""

    picked: Any  # int64 [units]
    loss: float
    bound: float
    gap: float
    seconds: float
    by: str  # "Lagrangian" or "HiGHS"


AROUND = (1.0, 1.02, 0.98, 1.06, 0.94, 1.15)
"""Shares of the prices at which answers are looked for."""
MOST_FLIPS, MOST_SETS, ROUNDS = 400, 2_000_000, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 10, 100, 1000)
"""Exchanges that the enumeration considers, sets of them in one round (about 10 ns each), and extra losses of its rounds over the gap asked for."""


def choose(loss: Any, use: Any, limits: Any, *, gap: float = 1e-3) -> Choice:
    """The options of least summed loss whose summed use stays within the limits.

    `loss` float64 [units, options], inf for an option that a unit has not; `use` float64 [budgets, units, options] ≥ 0; `limits` [budgets].
    Raises `DoesNotFit` naming the first budget that even the smallest options exceed.
    """
    began = time.perf_counter()
    loss, use, limits = (np.asarray(a, np.float64) for a in (loss, use, limits))
    known = np.isfinite(loss)
    for k, limit in enumerate(limits):
        need = float(np.where(known, use[k], np.inf).min(1).sum())
        if need > limit * (1 + 1e-12):
            raise DoesNotFit(f"budget {k}: the smallest options need {need:g} of {limit:g}", "raise the budget, or allow smaller options")
    search = _Search(loss, np.where(known, use, 0.0) / np.maximum(limits, 1e-30)[:, None, None], gap)
    for step in (search.start, search.enumerate, search.relax, search.enumerate):
        step()
        if search.done:
            return _choice(loss, search.picked, search.bound, began, "Lagrangian")
    return _milp(loss, search.scaled, search.useful(known), gap, search.bound, search.picked, began)


class _Search:
    """An answer and a bound that approach each other. `scaled` [budgets, units, options] are uses as shares of their limits."""

    def __init__(self, loss: Any, scaled: Any, gap: float) -> None:
        self.loss, self.scaled, self.gap = loss, scaled, gap
        self.use = np.ascontiguousarray(np.moveaxis(scaled, 0, 2))
        self.picked: Any = None
        self.value, self.bound = np.inf, -np.inf
        self.prices, self.floor = np.zeros(len(scaled)), -np.inf  # `floor` is the Lagrangian bound at `prices`

    @property
    def done(self) -> bool:
        return self.picked is not None and self.value - self.bound <= self.gap * max(abs(self.value), 1e-30)

    def useful(self, known: Any) -> Any:
        """Options that an answer better than this one can hold: the others' extra alone is too much."""
        return known if self.picked is None else known & (self._extra() <= self.value - self.floor)

    def _extra(self) -> Any:
        priced = self.loss + np.tensordot(self.prices, self.scaled, 1)
        return priced - priced.min(1)[:, None]

    def _take(self, picked: Any) -> None:
        if _sum(self.loss, picked) < self.value:
            self.picked, self.value = picked, _sum(self.loss, picked)

    def start(self) -> None:
        """Prices by the ellipsoid method, answers by repair and exchange around them."""
        reach = np.where(np.isfinite(self.loss), self.loss, 0)
        radius = 4 * max(float((reach.max(1) - self.loss.min(1)).sum()), 1e-30)
        wide = self.use if len(self.scaled) > 1 else np.concatenate([self.use, np.zeros_like(self.use)], 2)
        bound, prices = loops.prices(self.loss, wide, radius, 250 * wide.shape[2])
        self.prices = prices[: len(self.scaled)]
        self.bound = self.floor = float(bound)
        self._around()

    def relax(self) -> None:
        """The same with the prices of the linear relaxation, where they are better ones."""
        bound, prices = _relaxed(self.loss, self.scaled)
        if bound > self.floor:
            self.prices, self.floor, self.bound = prices, bound, max(bound, self.bound)
            self._around()

    def _around(self) -> None:
        for factor in AROUND:
            start = (self.loss + np.tensordot(factor * self.prices, self.scaled, 1)).argmin(1)
            found = _repaired(self.loss, self.scaled, start)
            if found is None:
                continue
            self._exchange(found)
            if self.done:
                return

    def _exchange(self, picked: Any) -> None:
        """Single options and pairs of options exchanged as long as that lowers the loss and fits."""
        known, rows = np.isfinite(self.loss), np.arange(len(picked))
        room = 1 + 1e-12 - self.use[rows, picked].sum(0)
        for _ in range(400):
            value = _sum(self.loss, picked)
            units, options = np.nonzero(known & (self._extra() <= max(value - self.floor, 0.0)))
            gain = self.loss[rows, picked][units] - self.loss[units, options]
            need = self.use[units, options] - self.use[units, picked[units]]
            if value - self.bound <= 0.9 * self.gap * abs(value) or not len(gain):
                break
            chosen = [c for c in loops.pair(gain, need, units, np.argsort(-gain), room) if c >= 0]
            if not chosen:
                break
            picked[units[chosen]] = options[chosen]
            room = room - need[chosen].sum(0)
        self._take(picked)

    def enumerate(self) -> None:
        """Sets of exchanges at the prices, in rounds of growing extra loss. A round that saw all sets raises the bound: what is left costs more."""
        extra = self._extra()
        base = extra.argmin(1)
        units, options = np.nonzero(np.isfinite(extra) & (np.arange(extra.shape[1]) != base[:, None]))
        order = np.argsort(extra[units, options], kind="stable")[:MOST_FLIPS]
        units, options = units[order], options[order]
        extras, need = extra[units, options], self.use[units, options] - self.use[units, base[units]]
        room = 1 + 1e-12 - self.use[np.arange(len(base)), base].sum(0)
        each = np.maximum(extras, 1e-300)
        relief = np.maximum.accumulate((np.maximum(-need, 0) / each[:, None])[::-1])[::-1]
        filling = np.maximum.accumulate((need @ self.prices / each)[::-1])[::-1]
        size = max(abs(self.value) if np.isfinite(self.value) else abs(self.floor), 1e-30)
        for share in ROUNDS:
            limit = share * size * self.gap
            _, chosen, whole = loops.enumerate_sets(
                extras, need, units, len(base), room, self.prices, relief, filling, limit, self.value - self.floor, 0.99 * self.gap * size, MOST_SETS
            )  # fmt: skip
            if len(chosen):
                picked = base.copy()
                picked[units[chosen]] = options[chosen]
                self._take(picked)
            if whole and (limit < extras[-1] or len(extras) < MOST_FLIPS):
                self.bound = max(self.bound, min(self.floor + limit, self.value))
            if self.done or not whole:
                return


def _choice(loss: Any, picked: Any, bound: float, began: float, by: str) -> Choice:
    value = _sum(loss, picked)
    bound = min(bound, value)
    return Choice(picked, value, bound, (value - bound) / max(abs(value), 1e-30), time.perf_counter() - began, by)


def _sum(values: Any, picked: Any) -> float:
    return float(values[np.arange(len(picked)), picked].sum())


def _fits(scaled: Any, picked: Any) -> bool:
    return bool((scaled[:, np.arange(len(picked)), picked].sum(1) <= 1 + 1e-12).all())


def _columns(loss: Any, scaled: Any, known: Any) -> tuple[Any, Any, Any, Any, float]:
    """The options as columns: where they are, costs of about 1, one per unit, budgets, and the scale of the costs."""
    from scipy.sparse import csr_matrix

    at = np.argwhere(known)
    cost = loss[at[:, 0], at[:, 1]]
    one = csr_matrix((np.ones(len(at)), (at[:, 0], np.arange(len(at)))), shape=(len(loss), len(at)))
    size = max(float(np.abs(cost).max()), 1e-30)
    return at, cost / size, one, csr_matrix(scaled[:, at[:, 0], at[:, 1]]), size


def _relaxed(loss: Any, scaled: Any) -> tuple[float, Any]:
    """The bound of the linear relaxation and the prices of the budgets, taken from its dual and checked by the Lagrangian itself."""
    from scipy.optimize import linprog

    _, cost, one, rows, size = _columns(loss, scaled, np.isfinite(loss))
    result = linprog(cost, A_ub=rows, b_ub=np.ones(len(scaled)), A_eq=one, b_eq=np.ones(len(loss)), bounds=(0, None), method="highs")
    prices = np.maximum(-result.ineqlin.marginals, 0) * size if result.x is not None else np.zeros(len(scaled))
    return float((loss + np.tensordot(prices, scaled, 1)).min(1).sum() - prices.sum()), prices


def _repaired(loss: Any, scaled: Any, picked: Any) -> Any:
    """The answer made to fit: the exchange of least added loss per relief, until every budget holds. None where it cannot."""
    picked, units = picked.copy(), np.arange(len(picked))
    for _ in range(2 * len(picked)):
        sums = scaled[:, units, picked].sum(1)
        over = np.maximum(sums - 1, 0)
        if not over.any():
            return picked
        relief = np.minimum(scaled[:, units, picked][:, :, None] - scaled, over[:, None, None]).sum(0) * np.isfinite(loss)
        added = loss - loss[units, picked][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where((relief > 1e-15) & np.isfinite(loss), np.maximum(added, 0) / relief, np.inf)
        at = np.unravel_index(np.argmin(price), price.shape)
        if not np.isfinite(price[at]):
            return None
        picked[at[0]] = at[1]
    return None


def _milp(loss: Any, scaled: Any, known: Any, gap: float, bound: float, picked: Any, began: float) -> Choice:
    """HiGHS over the options that a better answer can hold (the others' priced loss alone is too much)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    at, cost, one, rows, size = _columns(loss, scaled, known)
    result = milp(
        cost, constraints=[LinearConstraint(one, 1, 1), LinearConstraint(rows, -np.inf, 1 - 1.1e-6)], bounds=Bounds(0, 1),
        integrality=np.ones(len(at), np.int64), options={"mip_rel_gap": gap / 2, "time_limit": 30.0},
    )  # fmt: skip
    if result.x is not None:
        found = np.zeros(len(loss), np.int64)
        taken = at[result.x > 0.5]
        found[taken[:, 0]] = taken[:, 1]
        if picked is None or _sum(loss, found) < _sum(loss, picked):
            picked = found
        if result.mip_dual_bound is not None:
            bound = max(bound, min(float(result.mip_dual_bound) * size, _sum(loss, picked)))
    if picked is None:
        raise DoesNotFit("no choice of options holds all budgets at once", "raise one of them, or allow smaller options")
    return _choice(loss, picked, bound, began, "HiGHS")
