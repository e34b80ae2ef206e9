"""A report of a device without Python: the runtime's own tool measures, what it does not tell stays unknown."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.agent.client import Tell
from edgesdk.bundle import Manifest
from edgesdk.errors import DeviceError, EdgeError, InputError, UnknownName
from edgesdk.installed import Here, stored
from edgesdk.lease import lease
from edgesdk.measured import plan_of
from edgesdk.plain.device import PlainDevice, find_runner, name_of, silent
from edgesdk.plain.output import Operator, Told
from edgesdk.plain.tools import ETDUMP, Call
from edgesdk.report import Comparison, Conditions, MethodSamples, OperatorTime, Report, Summary
from edgesdk.trust import judge, method_samples

if TYPE_CHECKING:
    from edgesdk.plan.types import Plan
    from edgesdk.transport import Transport


@dataclass(frozen=True)
class Measured:
    """One method, as the tool told it."""

    method: str
    told: Told
    samples: MethodSamples
    peak_bytes: int | None
    operators: tuple[OperatorTime, ...]
    notes: tuple[str, ...]


def profile(
    bundle: str | Path | None,
    on: str | Transport,
    runner: str,
    *,
    runs: int,
    warmup: int,
    method: str | None = None,
    device: str | None = None,
    operators: bool = False,
    allow_unchecked: bool = False,
    wait_s: float = 0.0,
    tell: Tell | None = None,
) -> Report:
    """`edgesdk.profile.profile` with a native runner (see `device.find_runner`) in the agent's place. Raises what that raises."""
    from edgesdk.flash import Performer, connected

    with connected(on) as transport, lease(transport, "profile", plain=True, wait_s=wait_s):
        here = _installed(transport, bundle, runner, allow_unchecked)
        board = PlainDevice(transport, find_runner(transport, runner), read=here.read)
        performer = Performer(transport, transport.python, False, None, board)
        performer.all(board.prepare(here.manifest))
        try:
            return _report(board, here, runs, warmup, method, device, operators, tell)
        finally:
            board.close()


def _installed(transport: Transport, bundle: str | Path | None, runner: str, allow_unchecked: bool) -> Here:
    """`edgesdk.installed.installed`, without Python; one that is there unchecked is good enough where that is allowed."""
    from edgesdk.bundles import read_member
    from edgesdk.flash import flash
    from edgesdk.install import read_source, survey

    state = survey(transport)
    if bundle is None:
        if state.current is None:
            raise DeviceError(
                f"{transport.link}: nothing is installed", "give a bundle, or install one: edgesdk flash BUNDLE --on … --runner …"
            )
        return stored(transport, state.current)
    source = read_source(bundle)
    there = state.good.get(source.digest)
    if not (there or (allow_unchecked and there is not None)):
        flash(bundle, transport, runner=runner, allow_unchecked=allow_unchecked)
    return Here(f"{transport.root}/store/{source.digest}", source.digest, source.manifest, lambda name: read_member(bundle, name))


def _report(
    board: PlainDevice, here: Here, runs: int, warmup: int, method: str | None, device: str | None, operators: bool, tell: Tell | None
) -> Report:
    manifest, tool = here.manifest, board.tool
    if method is not None and method not in manifest.methods:
        raise UnknownName("method", method, manifest.methods)
    if operators and (tool.operators(Call("", "", 1, 1), 1) is None):
        hint = "leave --operators out, or take one built with it: benchmark_model; executor_runner with -DEXECUTORCH_ENABLE_EVENT_TRACER=ON"
        raise InputError(f"this {tool.kind} times no single operators", hint)
    wanted = (method,) if method else manifest.methods
    before = board.ask("facts")
    found = []
    for i, name in enumerate(wanted):
        if tell:
            tell(f"{name}: {runs} calls", i / len(wanted))
        found.append(_measure(board, here, name, runs, warmup, operators))
    after = board.ask("facts")
    plan = _plan(here)
    name = device or ("host" if board.transport.link.startswith("local") else manifest.device)
    conditions = _conditions(board, manifest, name, before, after, plan)
    notes = list(dict.fromkeys(n for m in found for n in m.notes))
    comparisons: tuple[Comparison, ...] = ()
    if plan is not None and plan.device != name:
        notes.append(f"planned for {plan.device}, measured on {name}: nothing to compare with")
    elif plan is not None and not conditions.emulated:
        comparisons = tuple(_comparisons(plan, found))
    methods = tuple(m.samples for m in found)
    peaks = [m.peak_bytes for m in found if m.peak_bytes]
    return Report(
        bundle_digest=here.digest,
        model_name=manifest.model_name,
        conditions=conditions,
        load_cold_s=found[0].told.load_s,
        load_warm_s=None,
        methods=methods,
        peak_rss_bytes=max(peaks, default=None),
        comparisons=comparisons,
        trust=judge(conditions, methods, before["emulated"], notes),
        operators=tuple(row for m in found for row in m.operators),
        operators_route=f"{tool.kind}'s own profiler, in a run apart that it slows" if operators else None,
    )


def _measure(board: PlainDevice, here: Here, method: str, runs: int, warmup: int, operators: bool) -> Measured:
    """One run for times, one for memory, one for operators."""
    tool = board.tool
    inputs = next((c.inputs for c in here.manifest.golden if c.method == method), ())
    call, _ = board.call(here.folder, here.manifest, method, inputs)
    told = tool.read(board.run(tool.times(call, runs, warmup))[0])
    notes = [] if call.feeds else [f"{tool.kind} made up the inputs: its times may differ where they depend on values"]
    if "etdump_path" in tool.flags:
        notes.append(f"this {tool.kind} is built with the event tracer, which takes part of its times")
    samples = told.samples_s[1 + warmup :]
    if samples:
        made = method_samples(method, told.first_s, samples)
    elif told.mean_s is not None:
        made = _summarized(method, tool.kind, told, runs)
    else:
        raise silent(board.transport.link, tool.kind)
    peak, why = _peak(board, call)
    rows = _operators(board, method, call, runs) if operators else ()
    return Measured(method, told, made, peak, rows, (*notes, *why))


def _summarized(method: str, tool: str, told: Told, runs: int) -> MethodSamples:
    summary = Summary(
        tool=tool, calls=told.calls or runs, mean_s=told.mean_s, min_s=told.min_s, max_s=told.max_s, std_s=told.std_s, p5_s=told.p5_s,
        p95_s=told.p95_s, warmup_calls=told.warmup_calls, warmup_mean_s=told.warmup_mean_s,
    )  # fmt: skip
    return MethodSamples(method=method, cold_s=told.first_s, samples_s=(), p50_s=told.p50_s, p90_s=None, p99_s=None, summary=summary)


def _peak(board: PlainDevice, call: Call) -> tuple[int | None, tuple[str, ...]]:
    """The peak memory of a run apart, by the tool itself or by looking at its process."""
    own = board.tool.memory(call)
    if own is not None:
        return board.tool.read(board.run(own)[0]).peak_bytes, ()
    peak = board.run(board.tool.times(call, 3, 1), poll=True)[1]
    return peak, () if peak else ("its memory was not seen: the run ended before /proc/PID/status was read",)


def _operators(board: PlainDevice, method: str, call: Call, runs: int) -> tuple[OperatorTime, ...]:
    """Times of single operators, from a run apart: an ETDump, or the tool's own table."""
    argv = board.tool.operators(call, runs)
    assert argv is not None
    text, _ = board.run(argv)
    if board.tool.kind == "executor_runner":
        from edgesdk.operators import read_etdump

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "etdump")
            path.write_bytes(board.transport.get(f"{board.scratch}/{ETDUMP}"))
            rows, _ = read_etdump(path)
        return tuple(row.model_copy(update={"method": method}) for row in rows)
    return _rows(method, board.tool.read(text).operators)


def _rows(method: str, found: Sequence[Operator]) -> tuple[OperatorTime, ...]:
    """A delegate's own row is left out where its steps are listed."""
    inside = any(o.delegate for o in found)
    listed = [o for o in found if o.delegate or not (inside and "Delegate" in o.op)]
    total = sum(o.mean_s for o in listed) or 1.0
    return tuple(OperatorTime(method=method, unit=o.name, op=o.op, median_s=o.mean_s, share=o.mean_s / total, is_mean=True) for o in listed)


def _conditions(
    board: PlainDevice, manifest: Manifest, device: str, before: dict[str, Any], after: dict[str, Any], plan: Plan | None
) -> Conditions:
    return Conditions(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        link=board.transport.link,
        emulated=bool(before["emulated"]),
        machine=", ".join(p for p in (before["machine"], before["cpu"], before["board"]) if p and p != "unknown"),
        system=before["system"],
        runtime=manifest.runtime,
        runtime_version=name_of(board.runner, board.tool),
        threads=manifest.threads,
        power_mode=plan.power_mode if plan and plan.device == device else None,
        clock_before_hz=before["clock_hz"],
        clock_after_hz=after["clock_hz"],
        temperature_before_c=before["temperature_c"],
        temperature_after_c=after["temperature_c"],
        throttled=None,
        governor=before["governor"],
    )


def _plan(here: Here) -> Plan | None:
    try:
        return plan_of(here)
    except EdgeError:  # of another version of edgesdk
        return None


def _comparisons(plan: Plan, found: Sequence[Measured]) -> list[Comparison]:
    """Predicted beside measured: medians, else means, which the name then says."""
    rows = []
    for m in found:
        predicted, mean = plan.method_latency.get(m.method), m.samples.p50_s is None
        measured = m.told.mean_s if mean else m.samples.p50_s
        if predicted is not None:
            rows.append(
                Comparison(
                    name=f"latency {m.method}{' (mean)' if mean else ''}", predicted=predicted.value, predicted_low=predicted.low,
                    predicted_high=predicted.high, measured=measured, unit="s",
                )
            )  # fmt: skip
    return rows
