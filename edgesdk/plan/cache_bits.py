"""Whether a sequence model's caches are better held in fewer bits: plans are made with them where that can matter, and the best one taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from edgesdk.devices import load_device
from edgesdk.errors import EdgeError
from edgesdk.plan.rates import calibration_of
from edgesdk.plan.types import Plan, Workload
from edgesdk.sequence.card import NATIVE_BITS
from edgesdk.sequence.sizes import refuse_narrow
from edgesdk.units import show_bytes

LONG_BYTES = 4 * 2**20
"""Float caches that take less are not weighed: what narrow ones save there is below what any prediction can tell."""
FASTER = 1.05
"""Answers must be predicted so many times as fast for narrow caches to be taken on their own account."""
MAY_LOSE = 0.01
"""Measured quality that narrow caches may cost, where the budget names no limit."""
_NAMES: dict[Literal[16, 8, 4], str] = {16: "float16", 8: "int8", 4: "int4"}


def refuse_unread(asked: Workload, device: str, runtime: str | None) -> None:
    """Raises `InputError` for caches that the runtime asked for, or the device, cannot read: before anything is measured."""
    if asked.cache_bits in NATIVE_BITS:
        refuse_narrow(
            asked.cache_bits, runtime or "native", device, (runtime or "native") in {r.name for r in load_device(device).runtimes}
        )


def weighed(plan: Plan, make: Callable[[Workload], Plan]) -> Plan:
    """`plan`, made with float caches, or what `make` gives with narrower ones, the widest first: where memory forces them the first that fits,
    where they are predicted to pay the fastest."""
    forced = any(c.name == "memory" and not c.fits for c in plan.checks)
    best, told = plan, list[str]()
    for bits, narrow in _narrower(plan, make, forced):
        caches, held = (p.memory.cache_bytes + p.memory.cross_cache_bytes for p in (plan, narrow))
        if held >= caches or (narrow.model != plan.model and narrow.layout != plan.layout):
            continue
        faster, why_not = plan.latency.value / narrow.latency.value, _why_not(plan, narrow)
        said = f"caches in {_NAMES[bits]}: {show_bytes(caches - held)} less, answers predicted {faster:.2f}x as fast"
        if forced and not why_not:
            return _with(narrow, [*told, f"{said}, as memory forces"])
        pays = not why_not and narrow.latency.value * FASTER <= best.latency.value
        told.append(said if pays else f"{said}; {why_not or 'so they stay wider'}")
        best = narrow if pays else best
    return _with(best, told)


def _narrower(plan: Plan, make: Callable[[Workload], Plan], forced: bool) -> Iterator[tuple[Literal[16, 8, 4], Plan]]:
    """The same plan with narrower caches, as it is asked for; those that only our own kernels read where they were measured."""
    caches = plan.memory.cache_bytes + plan.memory.cross_cache_bytes
    if plan.workload.cache_bits is not None or not caches or not (forced or (plan.fits and caches >= LONG_BYTES)):
        return
    native = plan.runtime == "native" or calibration_of(load_device(plan.device), "native", plan.threads) is not None
    for bits in _NAMES:
        if bits in NATIVE_BITS and not native:
            continue
        try:
            yield bits, make(plan.workload.model_copy(update={"cache_bits": bits}))
        except EdgeError:  # a model whose programs are as they are, a runtime without such caches
            continue


def _why_not(plan: Plan, narrow: Plan) -> str:
    limit = plan.budget.quality_drop if plan.budget.quality_drop is not None else MAY_LOSE
    if plan.quality is not None and narrow.quality is not None and narrow.quality < plan.quality - limit:
        return "quality falls"
    return "" if narrow.fits else "it does not fit either"


def _with(plan: Plan, reasons: list[str]) -> Plan:
    return plan.model_copy(update={"reasons": (*plan.reasons, *reasons)}) if reasons else plan
