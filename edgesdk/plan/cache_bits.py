"""Whether a sequence model's caches are better held in int8: the plan is made both ways where that can matter, and the better one taken."""

from __future__ import annotations

from collections.abc import Callable

from edgesdk.errors import EdgeError
from edgesdk.plan.types import Plan, Workload
from edgesdk.units import show_bytes

LONG_BYTES = 4 * 2**20
"""Float caches that take less are not weighed: what int8 saves there is below what any prediction can tell."""
FASTER = 1.05
"""Answers must be predicted so many times as fast for int8 caches to be taken on their own account."""
MAY_LOSE = 0.01
"""Measured quality that int8 caches may cost, where the budget names no limit."""


def weighed(plan: Plan, make: Callable[[Workload], Plan]) -> Plan:
    """`plan`, made with float caches, or what `make` gives with int8 ones: where memory forces them, or where they are predicted to pay."""
    caches = plan.memory.cache_bytes + plan.memory.cross_cache_bytes
    forced = any(c.name == "memory" and not c.fits for c in plan.checks)
    if plan.workload.cache_bits is not None or not caches or not (forced or (plan.fits and caches >= LONG_BYTES)):
        return plan
    try:
        narrow = make(plan.workload.model_copy(update={"cache_bits": 8}))
    except EdgeError:  # a model whose programs are as they are
        return plan
    saved = caches - narrow.memory.cache_bytes - narrow.memory.cross_cache_bytes
    if saved <= 0 or (narrow.model != plan.model and narrow.layout != plan.layout):
        return plan
    limit = plan.budget.quality_drop if plan.budget.quality_drop is not None else MAY_LOSE
    worse = plan.quality is not None and narrow.quality is not None and narrow.quality < plan.quality - limit
    faster = plan.latency.value / narrow.latency.value
    told = f"caches in int8: {show_bytes(saved)} less, answers predicted {faster:.2f}x as fast"
    if not worse and narrow.fits and (forced or faster >= FASTER):
        return narrow.model_copy(update={"reasons": (*narrow.reasons, told + (", as memory forces" if forced else ""))})
    why = "quality falls" if worse else "it does not fit either" if not narrow.fits else "so they stay float"
    return plan.model_copy(update={"reasons": (*plan.reasons, f"{told}; {why}")})
