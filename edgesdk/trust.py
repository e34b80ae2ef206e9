"""Can a measurement be trusted? Decided from raw samples and conditions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgesdk.report import Conditions, MethodSamples, Trust

SPREAD = 1.25  # p90 / p50 above this is noise
DRIFT = 0.10  # between the medians of the first and the last third
CLOCK_DROP = 0.10
HOT_C = 85.0  # most boards hold back their clock from about here on (Raspberry Pi: soft limit at 80, hard at 85)
FEW = 20


def percentile(samples: Sequence[float], share: float) -> float:
    """The `share` quantile (0..1) of samples, with linear interpolation between ranks."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * share
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def method_samples(method: str, cold_s: float | None, samples: Sequence[float]) -> MethodSamples:
    """Raw seconds with their percentiles."""
    p50, p90, p99 = (percentile(samples, q) for q in (0.5, 0.9, 0.99))
    return MethodSamples(method=method, cold_s=cold_s, samples_s=tuple(samples), p50_s=p50, p90_s=p90, p99_s=p99)


def drift(samples: Sequence[float]) -> float:
    """Median of the last third over that of the first third, less one."""
    third = max(1, len(samples) // 3)
    return percentile(samples[-third:], 0.5) / percentile(samples[:third], 0.5) - 1.0


def judge(conditions: Conditions, methods: Sequence[MethodSamples], emulated: Sequence[str] = (), notes: Sequence[str] = ()) -> Trust:
    """The verdict with its reasons: emulated before throttled before noisy before good."""
    noise, heat = [], []
    for m in methods:
        if not m.samples_s:
            continue
        if m.p90_s and m.p50_s and m.p90_s > SPREAD * m.p50_s:
            noise.append(f"{m.method}: p90 is {m.p90_s / m.p50_s:.2f} times p50")
        if len(m.samples_s) < FEW:
            noise.append(f"{m.method}: {len(m.samples_s)} samples, {FEW} make a p90")
        elif abs(moved := drift(m.samples_s)) > DRIFT:
            noise.append(f"{m.method}: the last third is {moved:+.0%} against the first")
    before, after = conditions.clock_before_hz, conditions.clock_after_hz
    if conditions.throttled:
        heat.append("the board says that it is throttled")
    if before and after and after < before * (1 - CLOCK_DROP):
        heat.append(f"the clock fell from {before / 1e6:.0f} to {after / 1e6:.0f} MHz")
    if (conditions.temperature_after_c or 0.0) >= HOT_C:
        heat.append(f"{conditions.temperature_after_c:.0f} °C afterwards")
    unknown = [] if after else ["the clock cannot be read here"]
    fake = [f"an emulator ({', '.join(emulated)}): its times say nothing about silicon"] if conditions.emulated else []
    verdict: Any = "emulated" if fake else "throttled" if heat else "noisy" if noise else "good"
    return Trust(verdict=verdict, reasons=(*fake, *heat, *noise, *unknown, *notes))
