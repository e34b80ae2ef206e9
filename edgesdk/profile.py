"""Measure a bundle on a device: times, memory, clocks and temperatures as they are, beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.agent.client import Agent, Tell
from edgesdk.bundle import Manifest
from edgesdk.errors import DeviceError, InputError
from edgesdk.lease import lease
from edgesdk.report import Comparison, Conditions, Report
from edgesdk.transport import Transport, parse_link
from edgesdk.trust import judge, method_samples

if TYPE_CHECKING:
    from edgesdk.plan.types import Estimate, Plan


@dataclass(frozen=True)
class Here:
    """A bundle that is installed on a device."""

    folder: str  # on the device
    digest: str
    manifest: Manifest
    read: Callable[[str], bytes]  # a member's bytes


def installed(transport: Transport, bundle: str | Path | None, python: str | None = None) -> Here:
    """`bundle` on the device, installed first if it is not there or was not found good; the current one if None."""
    from edgesdk.bundles import read_member
    from edgesdk.flash import flash
    from edgesdk.install import read_source, survey

    state = survey(transport)
    if bundle is None:
        if state.current is None:
            raise DeviceError(f"{transport.link}: nothing is installed", "give a bundle, or install one: edgesdk flash BUNDLE --on …")
        folder = f"{transport.root}/store/{state.current}"
        manifest = Manifest.from_json(transport.get(f"{folder}/manifest.json"), f"{transport.link}: manifest.json")
        return Here(folder, state.current, manifest, lambda name: transport.get(f"{folder}/{name}"))
    source = read_source(bundle)
    if not state.good.get(source.digest):
        flash(bundle, transport, python=python)
    return Here(f"{transport.root}/store/{source.digest}", source.digest, source.manifest, lambda name: read_member(bundle, name))


def profile(
    bundle: str | Path | None = None,
    on: str | Transport = "local",
    *,
    runs: int = 50,
    warmup: int = 5,
    method: str | None = None,
    device: str | None = None,
    python: str | None = None,
    operators: bool = False,
    wait_s: float = 0.0,
    tell: Tell | None = None,
) -> Report:
    """Run each method `runs` times on the device behind the link `on` after `warmup` calls, in a fresh process.

    `bundle` None: what is installed there. A bundle that is not there is installed first (see `flash`). `device` is the profile's name
    (default: what the bundle was built for; `host` on a local link). `operators` adds times of single units (slow: each is
    lowered and timed alone, on this host only). `wait_s`: how long to wait for others who use the device. Raises what `flash` raises, and `DeviceError` if the program fails there.
    """
    if runs < 1 or warmup < 0:
        raise InputError(f"runs = {runs}, warmup = {warmup}", "give at least one run")
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        if transport.link == "fake":
            raise InputError("the fake device measures nothing", "use --on local or --on ssh://…")
        if operators and not transport.link.startswith("local"):
            raise InputError("times of single units are taken on this host only", "leave --operators out, or use --on local")
        with lease(transport, "profile", python=python, wait_s=wait_s):
            here = installed(transport, bundle, python)
            with Agent(transport, python) as agent:
                facts = agent.ask("facts")
                extra: dict[str, Any] = {"method": method} if method else {}
                raw = agent.ask("profile", tell=tell, folder=here.folder, runs=runs, warmup=warmup, **extra)
        report = make_report(here, transport.link, facts, raw, device)
        plan = _plan_of(here) if operators else None
    finally:
        if isinstance(on, str):
            transport.close()
    if operators:
        from edgesdk.operators import time_units

        rows, route = time_units(here.manifest, plan, tell=tell)
        report = report.model_copy(update={"operators": rows, "operators_route": route})
    return report


def make_report(here: Here, link: str, facts: dict[str, Any], raw: dict[str, Any], device: str | None) -> Report:
    """The report of one agent's answer."""
    manifest = here.manifest
    name = device or ("host" if link.startswith("local") else manifest.device)
    plan = _plan_of(here)
    conditions = _conditions(manifest, name, link, facts, raw, plan.power_mode if plan and plan.device == name else None)
    methods = tuple(method_samples(m["method"], m["first_s"], m["samples_s"]) for m in raw["methods"])
    notes: list[str] = []
    comparisons: tuple[Comparison, ...] = ()
    if plan is not None and plan.device != name:
        notes.append(f"planned for {plan.device}, measured on {name}: nothing to compare with")
    elif plan is not None:
        comparisons = tuple(compare_with_plan(plan, methods, raw, emulated=conditions.emulated))
    return Report(
        bundle_digest=here.digest,
        model_name=manifest.model_name,
        conditions=conditions,
        load_cold_s=raw["load_cold_s"],
        load_warm_s=raw["load_warm_s"],
        runtime_import_s=raw["import_s"],
        methods=methods,
        peak_rss_bytes=raw["peak_rss_bytes"],
        rss_before_load_bytes=raw["rss_before_load_bytes"],
        rss_start_bytes=raw["rss_start_bytes"],
        comparisons=comparisons,
        trust=judge(conditions, methods, facts["emulated"], notes),
    )


def _conditions(
    manifest: Manifest, device: str, link: str, facts: dict[str, Any], raw: dict[str, Any], power_mode: str | None
) -> Conditions:
    before, after = raw["before"], raw["after"]
    throttled = {before["throttled"], after["throttled"]} - {None}
    return Conditions(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        link=link,
        emulated=bool(facts["emulated"]),
        machine=", ".join(str(p) for p in (facts["machine"], facts["cpu"], facts["board"]) if p and p != "unknown"),
        system=facts["system"],
        runtime=manifest.runtime,
        runtime_version=str(raw["runtime_version"]),
        threads=manifest.threads,
        power_mode=power_mode,
        clock_before_hz=before["clock_hz"],
        clock_after_hz=after["clock_hz"],
        temperature_before_c=before["temperature_c"],
        temperature_after_c=after["temperature_c"],
        throttled=any(throttled) if throttled else None,
    )


def _plan_of(here: Here) -> Plan | None:
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
