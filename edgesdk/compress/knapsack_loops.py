"""The loops of `knapsack`, compiled: prices of the budgets, exchanges, and an enumeration that proves as it searches."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesdk.compress.compiled import compiled


def _dual(loss: Any, use: Any, prices: Any, slope: Any) -> Any:
    """The Lagrangian at `prices`; `slope` [budgets] becomes a subgradient. An option that does not exist has a loss of inf."""
    units, options = loss.shape
    budgets = len(prices)
    total = 0.0
    for k in range(budgets):
        slope[k] = -1.0
        total -= prices[k]
    for i in range(units):
        best, at = np.inf, 0
        for j in range(options):
            value = loss[i, j]
            for k in range(budgets):
                value += prices[k] * use[i, j, k]
            if value < best:
                best, at = value, j
        total += best
        for k in range(budgets):
            slope[k] += use[i, at, k]
    return total


dual = compiled(_dual)


def _prices(loss: Any, use: Any, radius: Any, turns: Any) -> Any:
    """Prices [budgets ≥ 2] of the best Lagrangian bound found, and the bound: the ellipsoid method over prices ≥ 0.

    Source: Shor 1977, Yudin and Nemirovski 1976; cuts go through the centre, or deeper where it is worse than the best one.
    """
    budgets = use.shape[2]
    n = float(budgets)
    centre, slope, best_at = np.zeros(budgets), np.zeros(budgets), np.zeros(budgets)
    cut, turned, shape = np.zeros(budgets), np.zeros(budgets), np.zeros((budgets, budgets))
    for k in range(budgets):
        shape[k, k] = radius * radius
    best = -np.inf
    for _ in range(turns):
        worst = 0
        for k in range(budgets):
            cut[k] = 0.0
            if centre[k] < centre[worst]:
                worst = k
        if centre[worst] < 0:
            cut[worst], deep = -1.0, -centre[worst]
        else:
            value = dual(loss, use, centre, slope)
            if value > best:
                best = value
                for k in range(budgets):
                    best_at[k] = centre[k]
            deep = best - value
            for k in range(budgets):
                cut[k] = -slope[k]
        square = 0.0
        for k in range(budgets):
            turned[k] = 0.0
            for m in range(budgets):
                turned[k] += shape[k, m] * cut[m]
            square += cut[k] * turned[k]
        size = max(square, 0.0) ** 0.5
        if deep >= size or (size <= 1e-9 * abs(best) and centre[worst] >= 0):
            break
        alpha = deep / size
        near, wide = (1 + n * alpha) / (n + 1), n * n / (n * n - 1) * (1 - alpha * alpha)
        for k in range(budgets):
            turned[k] /= size
            centre[k] -= near * turned[k]
        for k in range(budgets):
            for m in range(budgets):
                shape[k, m] = wide * (shape[k, m] - 2 * near / (1 + alpha) * turned[k] * turned[m])
    return best, best_at


prices = compiled(_prices)


def _pair(gain: Any, need: Any, units: Any, order: Any, room: Any) -> Any:
    """The exchange, or two of them in different units, of the most `gain` [candidates] that fits `room`; -1 for none.

    `need` [candidates, budgets] is what each takes, `order` sorts the candidates by falling gain.
    """
    budgets, first, second = len(room), -1, -1
    best = 1e-12 * abs(gain[order[0]])
    for a in order:
        if gain[a] <= 0 or 2 * gain[a] <= best:
            break
        fits = True
        for k in range(budgets):
            fits = fits and need[a, k] <= room[k]
        if fits:
            if gain[a] > best:
                best, first, second = gain[a], a, -1
            continue
        for b in order:
            if gain[a] + gain[b] <= best:
                break
            fits = units[b] != units[a]
            for k in range(budgets):
                fits = fits and need[a, k] + need[b, k] <= room[k]
            if fits:
                best, first, second = gain[a] + gain[b], a, b
    return first, second


pair = compiled(_pair)


def _enumerate(
    extra: Any,
    need: Any,
    units: Any,
    count: Any,
    room: Any,
    prices: Any,
    relief: Any,
    filling: Any,
    limit: Any,
    best: Any,
    enough: Any,
    most: Any,
) -> Any:
    """The best set of flips whose `extra` [flips, ascending] sum to at most `limit`, one a unit, which fits `room`.

    What a set costs over the bound is its extras and what it leaves of the budgets at their prices. `relief` [flips, budgets] and `filling` [flips]
    are the most that this flip or a later one frees of a budget, or takes of all at their prices, for each of its extra.
    Stops at a cost of `enough`, or after `most` sets. Returns the cost (`best` where nothing is better), the set, and whether all were seen.
    """
    flips, budgets = need.shape
    taken = np.zeros(count, np.bool_)
    stack, found = np.zeros(count + 1, np.int64), np.zeros(count, np.int64)
    left, spent, worth = np.zeros((count + 1, budgets)), np.zeros(count + 1), np.zeros(count + 1)
    for k in range(budgets):
        left[0, k] = room[k]
        worth[0] += prices[k] * room[k]
    depth, at, size, seen = 0, 0, -1, 0
    while True:
        go = at < flips
        if go:
            rest = limit - spent[depth]
            go = extra[at] <= rest and spent[depth] + extra[at] < best
            go = go and spent[depth] + worth[depth] - max(filling[at] - 1.0, 0.0) * rest < best
            for k in range(budgets):
                go = go and left[depth, k] + relief[at, k] * rest >= 0
        if go and taken[units[at]]:
            at += 1
        elif go:
            cost, fits = spent[depth] + extra[at], True
            spent[depth + 1] = cost
            worth[depth + 1] = 0.0
            for k in range(budgets):
                left[depth + 1, k] = left[depth, k] - need[at, k]
                worth[depth + 1] += prices[k] * left[depth + 1, k]
                fits = fits and left[depth + 1, k] >= 0
            cost += worth[depth + 1]
            stack[depth] = at
            depth += 1
            seen += 1
            taken[units[at]] = True
            at += 1
            if fits and cost < best:
                best, size = cost, depth
                for k in range(depth):
                    found[k] = stack[k]
                if best <= enough:
                    return best, found[:size], False
            if seen >= most:
                return best, found[: max(size, 0)], False
        elif depth == 0:
            return best, found[: max(size, 0)], True
        else:
            depth -= 1
            at = stack[depth] + 1
            taken[units[stack[depth]]] = False


enumerate_sets = compiled(_enumerate)
