"""Figures of a plan: the roofline of its device, the front it was chosen from, memory by parts, units by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgesdk.pages.html import Figure, Table
from edgesdk.pages.rows import operators, pattern, stacks
from edgesdk.pages.svg import Plot, Scale, label_spots, logarithmic, number, timely
from edgesdk.pages.times import unit_of
from edgesdk.plan.types import Candidate, Plan, UnitPlan
from edgesdk.report import OperatorTime, Report
from edgesdk.units import show_bytes, show_seconds

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile

_DTYPES = {"fp32": "fp32", "int8-weight-only": "fp32", "fp16": "fp16"}  # all others compute in int8
LABELS = 6

# ---- roofline -----------------------------------------------------------------------------------------------


def roofline(plan: Plan, device: DeviceProfile, report: Report | None = None) -> Figure | None:
    """Operations a second over operations a byte: each unit as predicted, each method as measured, below what the device reaches at most.

    None where the plan does not hold operations and bytes.
    """
    units = [u for u in plan.units if u.ops and u.moved_bytes and u.latency.value > 0]
    if not units:
        return None
    flat, slopes = _roofs(plan, device, units)
    own = [(u.ops / u.moved_bytes, u.ops / u.latency.value, u) for u in units if u.ops and u.moved_bytes]
    whole = _methods(plan, report)
    xs = [x for x, _, _ in own] + [x for x, _, _ in whole]
    ridge = max(flat.values()) / min(slopes.values())
    ys = [y for _, y, _ in own] + [y for _, y, _ in whole] + [2 * top for top in flat.values()]

    def draw(width: int) -> str:
        x = logarithmic([*xs, ridge * 2], 4 if width < 400 else 7)
        y = logarithmic([*ys, min(slopes.values()) * x.low * 3], 6, show=lambda v: number(v / 1e9))
        plot = Plot(width, 310, x, y, left=56).axes("operations a byte", "billion operations a second")
        for i, (_, rate) in enumerate(slopes.items()):
            _ray(plot, rate, max(flat.values()), "ks" + (" dash" if i else ""))
        for i, (_, top) in enumerate(flat.items()):
            start = max(x.low, top / max(slopes.values()))
            plot.line([(start, top), (x.high, top)], "ks" + (" dash" if i else ""))
        for a, b, u in own:
            bound = "f0" if u.bound == "compute" else "fs" if u.bound == "overhead" else "f1"
            plot.dot(a, b, bound + " dot", 4.5, f"{u.method}: {u.unit}, {show_seconds(u.latency.value)} predicted, bound by {u.bound}")
        for a, b, name in whole:
            plot.dot(a, b, "ring", 7, f"{name}, measured")
        _labels(plot, flat, own, whole)
        return plot.whole

    names = ", ".join(f"{name} {rate / 1e9:.3g} GB/s" for name, rate in slopes.items())
    tops = ", ".join(f"{name} {top / 1e9:.4g}" for name, top in flat.items())
    note = f"Lines: at most {tops} billion operations a second; {names}. By the device's profile, {plan.threads} thread{'s' * (plan.threads > 1)}."
    note += " What is above a slope reads from caches."
    legend = [("bound by compute", "f0 dot"), ("bound by memory", "f1 dot"), ("bound by calls", "fs dot")]
    legend += [("a whole method, measured", "ring")] if whole else []
    rows = [
        [u.method, u.unit, u.precision, f"{a:.3g}", number(b / 1e9), show_seconds(u.latency.value), u.bound]
        for a, b, u in sorted(own, key=lambda p: -p[2].latency.value)
    ]
    rows += [[name, "measured", "", f"{a:.3g}", number(b / 1e9), "", ""] for a, b, name in whole]
    table = Table(["method", "unit", "precision", "operations a byte", "billion a second", "a call", "bound by"], rows)
    counts = {k: sum(1 for u in units if u.bound == k) for k in ("compute", "overhead")}
    said = f"{len(units)} units: {counts['compute']} bound by compute, {counts['overhead']} by calls, the rest by memory. {note}"
    return Figure(f"Roofline: {plan.model_name} on {plan.device}", said, draw, table, legend, note)


def _roofs(plan: Plan, device: DeviceProfile, units: Sequence[UnitPlan]) -> tuple[dict[str, float], dict[str, float]]:
    """(arithmetic → operations a second, memory → bytes a second) of the plan's threads."""
    compute = device.unit(plan.unit)
    share = min(plan.threads, compute.cores) / compute.cores if compute.kind == "cpu" else 1.0
    used = dict.fromkeys(_DTYPES.get(u.precision, "int8") for u in units if u.weight_bytes) or {"fp32": None}
    peaks = {str(k): v for k, v in compute.peak_ops_per_s.items()}
    flat = {name: peaks[name] * share for name in used if name in peaks} or {"peak": max(peaks.values()) * share}
    memory = device.memory
    one = memory.one_thread_bytes_per_s
    rate = min(one * plan.threads, memory.bandwidth_bytes_per_s) if one and compute.kind == "cpu" else memory.bandwidth_bytes_per_s
    slopes = {"memory": rate}
    for cache in sorted(compute.caches, key=lambda c: -c.level):
        if cache.bandwidth_bytes_per_s:
            slopes[f"L{cache.level}"] = cache.bandwidth_bytes_per_s * min(plan.threads, compute.cores)
    return flat, slopes


def _methods(plan: Plan, report: Report | None) -> list[tuple[float, float, str]]:
    """(operations a byte, operations a second, name) of methods that were measured, emulators' times apart."""
    found = []
    for m in report.methods if report and not report.conditions.emulated else ():
        units = [u for u in plan.units if u.method == m.method and u.ops and u.moved_bytes]
        ops, moved = sum(u.ops or 0 for u in units), sum(u.moved_bytes or 0 for u in units)
        if ops and moved and m.p50_s:
            found.append((ops / moved, ops / m.p50_s, m.method))
    return found


def _ray(plot: Plot, rate: float, top: float, kind: str) -> None:
    """Bytes a second as a slope, from the frame's edge to where arithmetic is the limit."""
    start = max(plot.x.low, plot.y.low / rate)
    end = min(plot.x.high, top / rate)
    if end > start:
        plot.line([(start, start * rate), (end, end * rate)], kind)


def _labels(
    plot: Plot, flat: dict[str, float], own: Sequence[tuple[float, float, UnitPlan]], whole: Sequence[tuple[float, float, str]]
) -> None:
    """Names of the methods and of the slowest units where there is room, of the ceilings at the right."""
    slow: dict[str, tuple[float, float, str]] = {}
    for a, b, u in sorted(own, key=lambda p: -p[2].latency.value):
        slow.setdefault(pattern(u.unit), (a, b, ".".join(u.unit.split(".")[-2:])))
    named = [*whole, *list(slow.values())[: LABELS if plot.width > 400 else 3]]
    spots = label_spots(plot, named, [(a, b) for a, b, _ in own])
    taken: list[float] = []
    for name, top in flat.items():
        y = plot.py(top) - 6
        clear = all(abs(y - t) > 16 for t in taken) and not any(s and abs(s[1] - y) < 16 and s[0] > plot.width - 110 for s in spots)
        if clear and y > plot.top + 10:
            plot.write(plot.width - plot.right - 2, y, name, "end", "ink")
            taken.append(y)
    for (_, _, name), spot in zip(named, spots, strict=True):
        if spot:
            plot.write(*spot, name, "start", "ink")


# ---- front --------------------------------------------------------------------------------------------------


def front(plan: Plan) -> Figure | None:
    """What could have been chosen: no other choice is both faster and smaller. None where there was one choice only."""
    points = list(plan.front)
    if len(points) < 2:
        return None
    chosen = next((i for i, c in enumerate(points) if _is(c, plan)), None)
    allowed = next((c.limit for c in plan.checks if c.name == "harm"), 1.0)
    rows = [
        [
            f"{i + 1}{' (chosen)' if i == chosen else ''}", c.layout, c.runtime, show_seconds(c.latency.value), show_bytes(c.memory_bytes),
            show_bytes(c.storage_bytes), "unknown" if c.quality_drop is None else f"{c.quality_drop:.2%}",
            ", ".join(f"{n} {p}" for p, n in sorted(c.precisions.items())),
        ]
        for i, c in enumerate(points)
    ]  # fmt: skip
    table = Table(["", "layout", "runtime", "one answer", "memory", "stored", "quality lost", "units"], rows)
    ends = f"from {rows[0][3]} and {rows[0][4]} to {rows[-1][3]} and {rows[-1][4]}"
    said = f"{len(points)} choices {ends}; chosen: {show_seconds(plan.latency.value)}, {show_bytes(plan.memory.peak_bytes)}."
    note = "Predicted. No other choice is both faster and smaller."
    note += "" if chosen is not None else " The chosen one is off the front: the plan's reasons say why."
    legend = [("a choice", "f0"), ("chosen", "ring")]
    if any((c.quality_drop or 0) > allowed for c in points):
        legend.insert(1, (f"loses more than {allowed:.2%} of quality", "f1"))
    legend += [("latency budget", "ref")] if plan.budget.latency_s else []
    return Figure(
        f"Pareto front: {plan.model_name} on {plan.device}", said, lambda width: _front_drawn(plan, width, allowed), table, legend, note
    )


def _front_drawn(plan: Plan, width: int, allowed: float) -> str:
    """Memory over latency: the choices with their numbers, the chosen one in a ring."""
    limit = plan.budget.latency_s
    factor, unit = unit_of(max(c.latency.value for c in plan.front))
    size, bytes_ = (1e6, "MB") if max(c.memory_bytes for c in plan.front) >= 10**6 else (1e3, "kB")
    points = [(c.latency.value * factor, c.memory_bytes / size) for c in plan.front]
    own = plan.latency.value * factor, plan.memory.peak_bytes / size
    xs = [x for x, _ in (*points, own)] + ([limit * factor] if limit else [])
    plot = Plot(width, 280, _roomy(xs, 4 if width < 400 else 6), _roomy([y for _, y in (*points, own)], 5), left=50)
    plot.axes(f"{unit} for one answer, predicted", f"{bytes_} of memory")
    plot.line(sorted(points), "ks thin", steps=True)
    if limit:
        plot.upright(limit * factor)
    for c, (x, y) in zip(plan.front, points, strict=True):
        plot.dot(x, y, "f1" if (c.quality_drop or 0) > allowed else "f0", 5, _told(c))
    plot.dot(*own, "ring", 9, "chosen")
    named = [(x, y, str(i + 1)) for i, (x, y) in enumerate(points)]
    for spot, (_, _, words) in zip(label_spots(plot, named, gap=13), named, strict=True):
        if spot:
            plot.write(*spot, words, "start", "ink")
    return plot.whole


def _roomy(values: Sequence[float], ticks: int) -> Scale:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low)
    return timely([low if low > 0 and high > 10 * low else max(0.0, low - pad), high + pad], ticks)


def _is(c: Candidate, plan: Plan) -> bool:
    alike = (c.layout, c.runtime) == (plan.layout, plan.runtime)
    return (
        alike
        and abs(c.latency.value / plan.latency.value - 1) < 1e-3
        and abs(c.memory_bytes - plan.memory.peak_bytes) <= 0.001 * c.memory_bytes
    )


def _told(c: Candidate) -> str:
    lost = "" if c.quality_drop is None else f", quality lost {c.quality_drop:.2%}"
    return f"{c.layout}, {c.runtime}: {show_seconds(c.latency.value)}, {show_bytes(c.memory_bytes)}{lost}"


# ---- memory and units ---------------------------------------------------------------------------------------


def memory(plans: Sequence[Plan], reports: Sequence[tuple[str, Report]]) -> Figure | None:
    """Planned memory by parts beside what processes took."""
    stacked: list[tuple[str, list[tuple[str, float, str]]]] = []
    for plan in plans:
        m = plan.memory
        parts = [
            ("weights", m.weights_bytes, "f0"), ("packed again", m.packed_bytes, "f0 dot"), ("activations", m.activations_bytes, "f1"),
            ("caches", m.cache_bytes + m.cross_cache_bytes, "f2"), ("inputs and outputs", m.io_bytes, "f3"),
            ("inside delegates", m.delegate_bytes or 0, "f4"), ("runtime", m.runtime_bytes or 0, "f5"),
        ]  # fmt: skip
        stacked.append((f"planned: {plan.model_name} on {plan.device}", [(n, float(b), k) for n, b, k in parts if b]))
    for name, r in reports:
        if not r.peak_rss_bytes:
            continue
        before, start = r.rss_before_load_bytes or 0, r.rss_start_bytes or 0
        seen = [
            ("the program", r.peak_rss_bytes - before, "f0"),
            ("runtime", before - start, "f5"),
            ("the process before", start, "fs dot"),
        ]
        stacked.append((f"measured: {name}", [(n, float(b), k) for n, b, k in seen if b > 0]))
    if not stacked:
        return None
    size, unit = next(
        ((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if max(sum(p[1] for p in parts) for _, parts in stacked) >= s),
        (1.0, "bytes"),
    )
    scaled = [(label, [(n, b / size, k) for n, b, k in parts]) for label, parts in stacked]
    legend = list(dict.fromkeys((n, k) for _, parts in stacked for n, _, k in parts))
    rows = [[label, part, show_bytes(b)] for label, parts in stacked for part, b, _ in parts]
    said = "; ".join(f"{label}: {show_bytes(sum(b for _, b, _ in parts))}" for label, parts in stacked)
    return Figure("Memory", said, stacks(scaled, lambda v: show_bytes(v * size), unit), Table(["", "part", "size"], rows), legend)


def units(plan: Plan) -> Figure | None:
    """Predicted time of each unit's call, as operators are shown. None where the plan holds no units."""
    known = [u for u in plan.units if u.latency.value > 0]
    whole = sum(u.latency.value for u in known) or 1.0
    rows = [OperatorTime(method=u.method, unit=u.unit, op=u.op, median_s=u.latency.value, share=u.latency.value / whole) for u in known]
    return operators(rows, "predicted", f"Units: {plan.model_name} on {plan.device}") if rows else None
