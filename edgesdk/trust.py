"""Can a measurement be trusted, and may two be compared? Decided from raw samples and conditions alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from edgesdk.report import Conditions, MethodSamples, Report, Trust

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
        if m.p90_s > SPREAD * m.p50_s:
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


def differences(a: Report, b: Report) -> tuple[list[str], list[str]]:
    """(why the two may not be compared, what else differs between them)"""
    stops, others = [], []
    ca, cb = a.conditions, b.conditions
    for name, x, y in (
        ("model", a.model_name, b.model_name),
        ("device", ca.device, cb.device),
        ("machine", ca.machine, cb.machine),
        ("emulated", ca.emulated, cb.emulated),
        ("power mode", ca.power_mode, cb.power_mode),
    ):
        if x != y:
            stops.append(f"{name}: {x} against {y}")
    for name, clock_a, clock_b in (("clock", ca.clock_after_hz, cb.clock_after_hz),):
        if clock_a and clock_b and abs(clock_a / clock_b - 1) > CLOCK_DROP and not ca.emulated:
            stops.append(f"{name}: {clock_a / 1e6:.0f} against {clock_b / 1e6:.0f} MHz")
    for side, report in (("first", a), ("second", b)):
        if report.trust.verdict == "throttled":
            stops.append(f"the {side} was throttled: {report.trust.reasons[0]}")
        if report.trust.verdict == "noisy":
            others.append(f"the {side} is noisy: {report.trust.reasons[0]}")
    rest: tuple[tuple[str, object, object], ...] = (
        ("runtime", f"{ca.runtime} {ca.runtime_version}", f"{cb.runtime} {cb.runtime_version}"),
        ("threads", ca.threads, cb.threads),
        ("bundle", a.bundle_digest[:12], b.bundle_digest[:12]),
        ("system", ca.system, cb.system),
    )
    for name, before, after in rest:
        if before != after:
            others.append(f"{name}: {before} against {after}")
    return stops, others


def ratio(a: Sequence[float], b: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """median(b) / median(a) with its 95% interval: (value, low, high). Block bootstrap, as neighbours in time resemble each other."""
    rng = random.Random(seed)
    values = sorted(percentile(_redraw(b, rng), 0.5) / percentile(_redraw(a, rng), 0.5) for _ in range(draws))
    return percentile(b, 0.5) / percentile(a, 0.5), percentile(values, 0.025), percentile(values, 0.975)


def _redraw(samples: Sequence[float], rng: random.Random) -> list[float]:
    n = len(samples)
    block = max(1, round(n ** (1 / 3)))
    drawn: list[float] = []
    while len(drawn) < n:
        start = rng.randrange(n)
        drawn += [samples[(start + i) % n] for i in range(block)]
    return drawn[:n]
