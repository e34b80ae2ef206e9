"""One option for every unit, least loss within several budgets: a multiple-choice knapsack, answered with a certified gap.

Lagrangian relaxation (Everett 1963; Fisher, Management Science 27, 1981): for prices of the budgets every unit chooses for itself, and the
priced sum less what the budgets are worth bounds every answer from below. Prices come from the linear relaxation; the answer at these prices
is repaired and improved by exchanges. Where the gap stays open, HiGHS solves what is left once options that cost too much at these prices are out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    scaled = np.where(known, use, 0.0) / np.maximum(limits, 1e-30)[:, None, None]
    bound, prices = _relaxed(loss, scaled)
    picked = None
    for factor in AROUND:
        found = _repaired(loss, scaled, (loss + np.tensordot(factor * prices, scaled, 1)).argmin(1))
        if found is not None:
            found = _exchanged(loss, scaled, found)
            picked = found if picked is None or _sum(loss, found) < _sum(loss, picked) else picked
            if _sum(loss, picked) - bound <= gap * max(abs(_sum(loss, picked)), 1e-30):
                return _choice(loss, picked, bound, began, "Lagrangian")
    if picked is not None:
        priced = loss + np.tensordot(prices, scaled, 1)
        known = known & (priced - priced.min(1)[:, None] <= _sum(loss, picked) - bound)
    return _milp(loss, scaled, known, gap, bound, picked, began)


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


def _exchanged(loss: Any, scaled: Any, picked: Any) -> Any:
    """Single options and pairs of options exchanged as long as that lowers the loss and fits."""
    picked, units = picked.copy(), np.arange(len(picked))
    for _ in range(200):
        room = 1 + 1e-12 - scaled[:, units, picked].sum(1)
        gain = loss[units, picked][:, None] - loss  # [units, options]
        more = scaled - scaled[:, units, picked][:, :, None]
        gain = np.where(np.isfinite(loss), gain, -np.inf)
        alone = np.where((more <= room[:, None, None]).all(0), gain, 0.0)
        at = np.unravel_index(np.argmax(alone), alone.shape)
        if alone[at] > 1e-15:
            picked[at[0]] = at[1]
            continue
        pair = _pair(gain, more, room)
        if pair is None:
            return picked
        for i, j in pair:
            picked[i] = j
    return picked


def _pair(gain: Any, more: Any, room: Any, most: int = 400) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Two exchanges in different units whose gains add up to the most and which fit together."""
    options = gain.shape[1]
    flat, need = gain.reshape(-1), more.reshape(len(more), -1)
    known = np.isfinite(flat) & (flat != 0)
    value = np.where(known, flat, -np.inf)
    better = np.argsort(-value)[:most]
    better = better[value[better] > 0]
    relief = np.flatnonzero(known & (flat < 0) & (need < 0).any(0))
    relief = relief[np.argsort(-flat[relief])][: 2 * most]
    if not len(better) or not len(relief):
        return None
    both = flat[better][:, None] + flat[relief][None]
    fits = ((need[:, better][:, :, None] + need[:, relief][:, None]) <= room[:, None, None]).all(0)
    both = np.where(fits & (better[:, None] // options != relief[None] // options), both, -np.inf)
    at = np.unravel_index(np.argmax(both), both.shape)
    if both[at] <= 1e-15:
        return None
    a, b = int(better[at[0]]), int(relief[at[1]])
    return (a // options, a % options), (b // options, b % options)


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
