"""Two reports against each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from edgesdk.errors import InputError
from edgesdk.report import Report
from edgesdk.trust import CLOCK_DROP, percentile


def compare(first: Report, second: Report, *, fail_above: float | None = None) -> dict[str, Any]:
    """Per method: ratio of medians (second / first) with its 95% interval and a verdict in words.

    `not_comparable` says why the two may not be compared; no verdict is given then. A regression is a ratio above
    1 + `fail_above` whose interval leaves 1 out. Raises `InputError` if they share no method.
    """
    stops, others = differences(first, second)
    theirs = {m.method: m for m in second.methods}
    pairs = [(m, theirs[m.method]) for m in first.methods if m.method in theirs]
    if not pairs:
        raise InputError("the two reports share no method", f"{[m.method for m in first.methods]} against {sorted(theirs)}")
    methods, regressions = [], []
    for a, b in pairs:
        value, low, high = ratio(a.samples_s, b.samples_s)
        verdict = "not comparable" if stops else "slower" if low > 1 else "faster" if high < 1 else "no difference shown"
        methods.append(
            {
                "method": a.method,
                "first_p50_s": a.p50_s,
                "second_p50_s": b.p50_s,
                "ratio": value,
                "low": low,
                "high": high,
                "verdict": verdict,
            }
        )
        if fail_above is not None and not stops and value > 1 + fail_above and low > 1:
            regressions.append(f"{a.method} ×{value:.2f}")
    head = {"kind": "comparison", "schema_version": 1}
    return {**head, "methods": methods, "not_comparable": stops, "differs": others, "regressions": regressions}


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
