"""From what a device answered to a report: samples, conditions over time, energy, predicted beside measured."""

from __future__ import annotations

import base64
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.bundle import Manifest
from edgesdk.devices import bound_to, user_devices
from edgesdk.energy import energies, power_of
from edgesdk.installed import Here
from edgesdk.report import Chunk, Comparison, Conditions, Measurement, Memory, MethodSamples, Moment, OperatorTime, Report
from edgesdk.trust import judge, method_samples, percentile, steady

if TYPE_CHECKING:
    from edgesdk.plan.types import Estimate, Plan

BUSY = 0.8
"""Of the time: a queue that grows on a device that is less busy waits for others."""


def make_report(
    here: Here,
    link: str,
    facts: dict[str, Any],
    raw: dict[str, Any],
    device: str | None,
    how: Measurement | None = None,
    when: str | None = None,
) -> Report:
    """The report of one measurement; `device`: the profile's name, else what the bundle was built for (`host` on a local link); `when` in ISO 8601,
    UTC, else now."""
    manifest, how = here.manifest, how or Measurement()
    name = device or ("host" if link.startswith("local") else manifest.device)
    plan = plan_of(here)
    moments = tuple(Moment(**{**m, "throttle": m["throttle"] if m["throttle"] is None else tuple(m["throttle"])}) for m in raw["moments"])
    power_mode = plan.power_mode if plan and plan.device == name else None
    conditions = _conditions(manifest, name, link, facts, raw, moments, power_mode, when or datetime.now(UTC).isoformat(timespec="seconds"))
    methods = tuple(_method(m, how.mode == "sustained") for m in raw["methods"])
    notes: list[str] = [line for m in methods if (line := _queue(m, how.rate_hz))]
    notes += [line for d in user_devices() if d.name == name and (line := bound_to(d, facts, link))]
    comparisons: tuple[Comparison, ...] = ()
    if plan is not None and plan.device != name:
        notes.append(f"planned for {plan.device}, measured on {name}: nothing to compare with")
    elif plan is not None and how.mode != "cold":
        comparisons = tuple(compare_with_plan(plan, methods, raw, emulated=conditions.emulated))
    power = power_of(raw.get("power"))
    energy, reasons = energies(power, methods)
    notes += [*raw.get("power_reasons", ()), *reasons]
    rows, route = operators_of(raw.get("operators"))
    memory, why = raw.get("memory") or {}, raw.get("memory_reasons") or {}
    return Report(
        bundle_digest=here.digest, model_name=manifest.model_name, conditions=conditions, load_cold_s=raw["load_cold_s"],
        load_warm_s=raw["load_warm_s"], runtime_import_s=raw["import_s"], methods=methods, peak_rss_bytes=raw["peak_rss_bytes"],
        rss_before_load_bytes=raw["rss_before_load_bytes"], rss_start_bytes=raw["rss_start_bytes"], operators=rows, operators_route=route,
        comparisons=comparisons, trust=judge(conditions, methods, facts["emulated"], notes, moments),
        how=how.model_copy(update={"page_cache": raw.get("page_cache")}), moments=moments, power=power,
        power_reasons=tuple(raw.get("power_reasons", ())), energy=tuple(energy),
        memory=Memory(peak_pss_bytes=memory.get("pss"), gpu_bytes=memory.get("gpu"), reasons=why),
    )  # fmt: skip


def _method(m: dict[str, Any], sustained: bool) -> MethodSamples:
    chunks = tuple(Chunk(first=f, count=n, start_s=start, end_s=end, calls=calls) for f, n, start, end, calls in m.get("chunks", ()))
    made = method_samples(
        m["method"],
        m["first_s"],
        m["samples_s"],
        m.get("waits_s", ()),
        starts_s=tuple(m.get("starts_s", ())),
        every=m.get("every", 1),
        chunks=chunks,
    )
    return made.model_copy(update={"steady": steady(made)}) if sustained else made


def _queue(m: MethodSamples, rate_hz: float | None) -> str | None:
    """Whether calls came faster than they were served."""
    if not m.waits_s or rate_hz is None or m.p50_s is None:
        return None
    third = max(1, len(m.waits_s) // 3)
    first, last = percentile(m.waits_s[:third], 0.5), percentile(m.waits_s[-third:], 0.5)
    if last > first + m.p50_s and rate_hz * sum(m.samples_s) / len(m.samples_s) > BUSY:
        return f"{m.method}: {rate_hz:g} calls a second are more than it serves: the queue grew to {m.waits_s[-1]:.3g} s"
    return None


def _conditions(
    manifest: Manifest,
    device: str,
    link: str,
    facts: dict[str, Any],
    raw: dict[str, Any],
    moments: tuple[Moment, ...],
    power_mode: str | None,
    when: str,
) -> Conditions:
    first, last = moments[0], moments[-1]
    told = [m.throttle for m in moments if m.throttle is not None]
    governors = last.governors
    same = set(governors.values())
    governor = same.pop() if len(same) == 1 else ", ".join(f"{c} {g}" for c, g in governors.items()) or None
    return Conditions(
        when=when,
        device=device,
        link=link,
        emulated=bool(facts["emulated"]),
        machine=", ".join(str(p) for p in (facts["machine"], facts["cpu"], facts["board"]) if p and p != "unknown"),
        system=facts["system"],
        runtime=manifest.runtime,
        runtime_version=str(raw["runtime_version"]),
        threads=manifest.threads,
        power_mode=power_mode,
        clock_before_hz=_clock(first),
        clock_after_hz=_clock(last),
        temperature_before_c=max(first.temperatures_c.values(), default=None),
        temperature_after_c=max(last.temperatures_c.values(), default=None),
        throttled=any(told) if told else None,
        governor=governor,
    )


def _clock(moment: Moment) -> float | None:
    """The fastest cluster's."""
    return max((hz for name, hz in moment.clocks_hz.items() if name != "gpu"), default=None)


def operators_of(found: dict[str, Any] | None) -> tuple[tuple[OperatorTime, ...], str | None]:
    """(times of single operators as the device's runtime told them, how, or why there are none)"""
    if found is None:
        return (), None
    if "reason" in found:
        return (), f"none: {found['reason']}"
    if "etdump" in found:
        from edgesdk.operators import read_etdump

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "etdump")
            path.write_bytes(base64.b64decode(found["etdump"]))
            rows, _ = read_etdump(path)
        return rows, "ExecuTorch's event tracer on the device"
    times = [(method, unit, op, percentile(samples, 0.5)) for method, unit, op, samples in found["rows"]]
    totals: dict[str, float] = {}
    for method, _, _, seconds in times:
        totals[method] = totals.get(method, 0.0) + seconds
    return tuple(OperatorTime(method=m, unit=u, op=o, median_s=s, share=s / (totals[m] or 1.0)) for m, u, o, s in times), found["route"]


def plan_of(here: Here) -> Plan | None:
    """The plan in the bundle, or None if it has none."""
    from edgesdk.plan.types import Plan

    if not any(m.name == "plan.json" for m in here.manifest.members):
        return None
    return Plan.from_json(here.read("plan.json"), "plan.json of the bundle")


def _predicted(plan: Plan, calls: dict[str, float]) -> Estimate | None:
    """Seconds of so many calls of each method, or None where one of them is not in the plan."""
    from edgesdk.plan.types import Estimate

    if any(name not in plan.method_latency for name in calls):
        return None
    parts = [(count, plan.method_latency[name]) for name, count in calls.items()]
    value, low, high = (sum(count * getattr(e, field) for count, e in parts) for field in ("value", "low", "high"))
    return Estimate(value=value, low=low, high=high)


def compare_with_plan(plan: Plan, methods: tuple[Any, ...], raw: dict[str, Any], *, emulated: bool) -> list[Comparison]:
    """Predicted beside measured. Latencies of an emulator are no measurement of the device that was planned for: left out."""
    found = []
    calls = {m["method"]: m.get("calls", {m["method"]: 1}) for m in raw["methods"]}
    for m in methods:
        predicted = _predicted(plan, calls[m.method])
        if predicted is not None and not emulated:
            found.append(
                Comparison(
                    name=f"latency {m.method}", predicted=predicted.value, predicted_low=predicted.low, predicted_high=predicted.high,
                    measured=m.p50_s, unit="s",
                )
            )  # fmt: skip
    peak, before, start = raw["peak_rss_bytes"], raw["rss_before_load_bytes"], raw["rss_start_bytes"]
    runtime = plan.memory.runtime_bytes
    program = plan.memory.peak_bytes - (runtime or 0)
    rows = [("memory of the program", program, peak - before if peak and before else None)]
    if runtime is not None:
        rows.append(("memory with the runtime", plan.memory.peak_bytes, peak - start if peak and start else None))
    for name, predicted_bytes, measured in rows:
        found.append(
            Comparison(name=name, predicted=predicted_bytes, predicted_low=None, predicted_high=None, measured=measured, unit="bytes")
        )
    return found
