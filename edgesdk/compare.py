"""Two reports against each other."""

from __future__ import annotations

from typing import Any

from edgesdk.errors import InputError
from edgesdk.report import Report
from edgesdk.trust import differences, ratio


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
