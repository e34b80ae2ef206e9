"""Energy of a call: power over time, integrated by the trapezoid rule over the chunks of calls."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any

from edgesdk.report import Chunk, Energy, MethodSamples, Power
from edgesdk.trust import percentile

LEAST = 3
"""Readings within a method's chunks that make a figure."""


def interval(times: Sequence[float], watts: Sequence[float]) -> float:
    """Median seconds between two readings that differ: a gauge may be read more often than it has news."""
    changed = [t for i, t in enumerate(times) if i == 0 or watts[i] != watts[i - 1]]
    gaps = [b - a for a, b in itertools.pairwise(changed)] or [b - a for a, b in itertools.pairwise(times)]
    return percentile(gaps, 0.5)


def at(times: Sequence[float], watts: Sequence[float], t: float) -> float:
    """Watts at a time, on the line between two readings; the first or last one's beyond them."""
    i = bisect.bisect_left(times, t)
    if i == 0 or i == len(times):
        return watts[min(i, len(times) - 1)]
    share = (t - times[i - 1]) / (times[i] - times[i - 1])
    return watts[i - 1] + share * (watts[i] - watts[i - 1])


def joules(times: Sequence[float], watts: Sequence[float], start: float, end: float) -> float:
    """The trapezoid rule from `start` to `end`."""
    inside = list(range(bisect.bisect_right(times, start), bisect.bisect_left(times, end)))
    points = [(start, at(times, watts, start)), *((times[i], watts[i]) for i in inside), (end, at(times, watts, end))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))


def power_of(raw: dict[str, Any] | None) -> Power | None:
    """What the device's sampler answered."""
    if raw is None:
        return None
    times, watts = tuple(raw["times_s"]), tuple(raw["watts"])
    begun, rested = raw["idle"]
    idle = [w for t, w in zip(times, watts, strict=True) if begun <= t <= rested]
    return Power(
        sensor=raw["sensor"],
        covers=raw["covers"],
        times_s=times,
        watts=watts,
        interval_s=interval(times, watts),
        idle_w=sum(idle) / len(idle) if idle else None,
        idle_s=rested - begun if idle else 0.0,
        sampler_share=raw["sampler_share"],
    )


def energies(power: Power | None, methods: Sequence[MethodSamples]) -> tuple[list[Energy], list[str]]:
    """(joules of a call of each method that has chunks, why some have none)"""
    found: list[Energy] = []
    reasons: list[str] = []
    if power is None:
        return found, reasons
    for m in (m for m in methods if m.chunks):
        count = sum(c.start_s <= t <= c.end_s for c in m.chunks for t in power.times_s)
        if count < LEAST:
            reasons.append(f"{m.method}: {count} readings of its power, {LEAST} make an energy; measure longer (--duration)")
        else:
            found.append(_energy(power, m.method, m.chunks))
    return found, reasons


def _energy(power: Power, method: str, chunks: Sequence[Chunk]) -> Energy:
    """The edges of a chunk lie anywhere between two readings, which costs up to an interval times the spread of the power (uniform: / √12);
    readings scatter, of which n make the mean better by √n; and so does the idle power."""
    times, watts, h = power.times_s, power.watts, power.interval_s
    seconds, calls = sum(c.end_s - c.start_s for c in chunks), sum(c.calls for c in chunks)
    gross = sum(joules(times, watts, c.start_s, c.end_s) for c in chunks)
    within = [w for t, w in zip(times, watts, strict=True) if any(c.start_s <= t <= c.end_s for c in chunks)]
    spread = percentile(watts, 0.95) - percentile(watts, 0.05)
    variance = len(chunks) * 2 * (h * spread) ** 2 / 12 + _variance(within) * h * seconds
    if power.idle_w is not None:
        rest = watts[: max(2, bisect.bisect_right(times, power.idle_s))]
        variance += _variance(rest) / len(rest) * seconds**2
    net = (gross - power.idle_w * seconds) / calls if power.idle_w is not None else None
    return Energy(method=method, gross_j=gross / calls, net_j=net, uncertainty_j=math.sqrt(variance) / calls, calls=calls, seconds=seconds)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
