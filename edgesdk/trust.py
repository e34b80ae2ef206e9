"""Can a measurement be trusted? Decided from raw samples and conditions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgesdk.report import Conditions, MethodSamples, Moment, Steady, Trust

SPREAD = 1.25  # p90 / p50 above this is noise
DRIFT = 0.10  # between the medians of the first and the last third
CLOCK_DROP = 0.10
HOT_C = 85.0  # most boards hold back their clock from about here on (Raspberry Pi: soft limit at 80, hard at 85)
FEW = 20
CHANGE = 0.03  # between two levels of a sustained run
SLOWED = 1.1  # sustained over burst
OTHERS = 0.10  # of all cores' time
STOLEN = 0.02


def percentile(samples: Sequence[float], share: float) -> float:
    """The `share` quantile (0..1) of samples, with linear interpolation between ranks."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * share
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def method_samples(method: str, cold_s: float | None, samples: Sequence[float], waits: Sequence[float] = (), **more: Any) -> MethodSamples:
    """Raw seconds with their percentiles; `more`: other fields of `MethodSamples`."""
    p50, p90, p99 = (percentile(samples, q) if samples else None for q in (0.5, 0.9, 0.99))
    w50, w99 = (percentile(waits, q) if waits else None for q in (0.5, 0.99))
    return MethodSamples(
        method=method, cold_s=cold_s, samples_s=tuple(samples), p50_s=p50, p90_s=p90, p99_s=p99, waits_s=tuple(waits), wait_p50_s=w50, wait_p99_s=w99,
        **more,
    )  # fmt: skip


def drift(samples: Sequence[float]) -> float:
    """Median of the last third over that of the first third, less one."""
    third = max(1, len(samples) // 3)
    first = percentile(samples[:third], 0.5)
    return percentile(samples[-third:], 0.5) / first - 1.0 if first else 0.0  # a clock too coarse for the calls


def steady(m: MethodSamples) -> Steady | None:
    """How a sustained run went on, from its chunks; None where there are too few."""
    medians = [percentile(m.samples_s[c.first : c.first + c.count], 0.5) for c in m.chunks if c.count]
    chunks = [c for c in m.chunks if c.count]
    if len(medians) < 3:
        return None
    late = chunks[0].start_s + (chunks[-1].end_s - chunks[0].start_s) * 2 / 3
    last = [t for c in chunks if c.start_s >= late for t in m.samples_s[c.first : c.first + c.count]]
    sustained = percentile(last, 0.5) if last else medians[-1]
    at = change(medians)
    return Steady(
        burst_p50_s=medians[0],
        sustained_p50_s=sustained,
        ratio=sustained / medians[0],
        changed_at_s=None if at is None else chunks[at].start_s,
    )


def change(values: Sequence[float]) -> int | None:
    """Where a series goes from one level to another: the split with the least squares left, if the levels differ by CHANGE and by 4 standard errors."""
    best: tuple[float, int] | None = None
    for i in range(2, len(values) - 1):
        left = sum((v - _mean(part)) ** 2 for part in (values[:i], values[i:]) for v in part)
        best = min(best, (left, i)) if best else (left, i)
    if best is None:
        return None
    left, i = best
    a, b = _mean(values[:i]), _mean(values[i:])
    error = math.sqrt(left / max(1, len(values) - 2) * (1 / i + 1 / (len(values) - i)))
    return i if abs(b / a - 1) > CHANGE and abs(b - a) > 4 * error else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def judge(
    conditions: Conditions,
    methods: Sequence[MethodSamples],
    emulated: Sequence[str] = (),
    notes: Sequence[str] = (),
    moments: Sequence[Moment] = (),
) -> Trust:
    """The verdict with its reasons: emulated before throttled before noisy before good. `notes` and an unsteady governor change no verdict."""
    company = _company(moments)
    noise = [line for m in methods for line in _scatter(m)] + company
    heat = _heat(conditions, moments)
    for m in methods:
        if m.steady and m.steady.ratio > SLOWED:
            when = "" if m.steady.changed_at_s is None else f", from {m.steady.changed_at_s:.0f} s on"
            (noise if company else heat).append(f"{m.method}: sustained calls take {m.steady.ratio:.2f} times the first ones{when}")
    unknown = [] if conditions.clock_after_hz else ["the clock cannot be read here"]
    if conditions.governor and conditions.governor.split()[-1] != "performance":
        unknown.append(f"the governor is {conditions.governor}, not performance: clocks follow the load")
    fake = [f"an emulator ({', '.join(emulated)}): its times say nothing about silicon"] if conditions.emulated else []
    verdict: Any = "emulated" if fake else "throttled" if heat else "noisy" if noise else "good"
    return Trust(verdict=verdict, reasons=(*fake, *heat, *noise, *unknown, *notes))


def _scatter(m: MethodSamples) -> list[str]:
    """What makes one method's samples noise."""
    if not m.samples_s:
        return [f"{m.method}: {m.summary.tool} tells no single times"] if m.summary else [f"{m.method}: no samples"]
    found = []
    if m.p90_s and m.p50_s and m.p90_s > SPREAD * m.p50_s:
        found.append(f"{m.method}: p90 is {m.p90_s / m.p50_s:.2f} times p50")
    if len(m.samples_s) < FEW:
        found.append(f"{m.method}: {len(m.samples_s)} samples, {FEW} make a p90")
    elif not m.steady and abs(moved := drift(m.samples_s)) > DRIFT:
        found.append(f"{m.method}: the last third is {moved:+.0%} against the first")
    return found


def _company(moments: Sequence[Moment]) -> list[str]:
    """Others at work on the same device."""
    found = []
    for field, limit, who in (("others", OTHERS, "other processes took"), ("steal", STOLEN, "the hypervisor took")):
        shares = [s for m in moments if (s := getattr(m, field)) is not None]
        if shares and _mean(shares) > limit:
            found.append(f"{who} {_mean(shares):.0%} of all cores' time")
    return found


def _heat(conditions: Conditions, moments: Sequence[Moment]) -> list[str]:
    """What held the device back."""
    found = []
    flags: dict[str, int] = {}
    for moment in moments:
        for flag in {f.split(" (")[0] for f in moment.throttle or ()}:
            flags[flag] = flags.get(flag, 0) + 1
    found += [f"{flag} at {n} of {len(moments)} moments" for flag, n in flags.items()]
    if conditions.throttled and not flags:
        found.append("the board says that it is throttled")
    before, after = conditions.clock_before_hz, conditions.clock_after_hz
    if before and after and after < before * (1 - CLOCK_DROP):
        found.append(f"the clock fell from {before / 1e6:.0f} to {after / 1e6:.0f} MHz")
    hottest = max((t for m in moments for t in m.temperatures_c.values()), default=conditions.temperature_after_c or 0.0)
    if hottest >= HOT_C:
        found.append(f"{hottest:.0f} °C at its hottest" if moments else f"{hottest:.0f} °C afterwards")
    return found
