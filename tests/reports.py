"""Reports for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgesdk.report import Conditions, Report
from edgesdk.trust import judge, method_samples

CONDITIONS = Conditions(
    when="2026-01-01T00:00:00+00:00", device="host", link="local", emulated=False, machine="m", system="s", runtime="litert",
    runtime_version="2", threads=1, clock_after_hz=2e9, clock_before_hz=2e9,
)  # fmt: skip


def report_of(samples: Sequence[float] | dict[str, Sequence[float]], *, report: dict[str, Any] | None = None, **conditions: Any) -> Report:
    """A report of one method `forward`, or of those given; `report` replaces fields of it, the rest fields of its conditions."""
    c = CONDITIONS.model_copy(update=conditions)
    given = samples if isinstance(samples, dict) else {"forward": samples}
    methods = tuple(method_samples(name, None, s) for name, s in given.items())
    made = Report(
        bundle_digest="0" * 64, model_name="tiny", conditions=c, load_cold_s=None, load_warm_s=None, methods=methods, peak_rss_bytes=None,
        trust=judge(c, methods),
    )  # fmt: skip
    return made.model_copy(update=report or {})
