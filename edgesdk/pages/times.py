"""Figures of times: latency over time beside temperature and clocks, distributions, watts over time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median

from edgesdk.pages.html import Figure, Table
from edgesdk.pages.svg import Plot, Scale, linear, timely
from edgesdk.report import MethodSamples, Moment, Report
from edgesdk.trust import percentile
from edgesdk.units import show_joules, show_seconds

MANY = 500  # samples from which on a method is drawn as medians and a band of pieces of time
PIECES, PIECE = 120, 15  # at most so many, of at least so many samples


def unit_of(largest_s: float) -> tuple[float, str]:
    """(units in a second, name) in which `largest_s` reads well."""
    return next(((f, n) for f, n in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")) if largest_s * f >= 1), (1e9, "ns"))


# ---- over time ----------------------------------------------------------------------------------------------


def over_time(report: Report, m: MethodSamples, name: str, ends: tuple[float, float] | None = None) -> Figure:
    """Each call's latency in order of time. `ends`: the span of figures that stand side by side."""
    timed = len(m.starts_s) == len(m.samples_s)
    start = m.starts_s[0] if timed else 0.0
    second, clock = unit_of(m.starts_s[-1] - start) if timed else (1.0, "call")
    xs = [(t - start) * second for t in m.starts_s] if timed else [float(i + 1) for i in range(len(m.samples_s))]
    moments = _within([((t.at_s - start) * second, t) for t in report.moments], xs[-1]) if timed else []
    warm = _hottest([moment for _, moment in moments])
    clocks = _clusters([moment for _, moment in moments])
    low_s, high_s = span([m])
    low_s, top_s = (min(low_s, ends[0]), max(high_s, ends[1])) if ends else (low_s, high_s)
    factor, unit = unit_of(top_s)
    words = f"time, {clock}" if timed else clock
    changed = (m.steady.changed_at_s - start) * second if m.steady and m.steady.changed_at_s is not None and timed else None
    beyond = sum(1 for s in m.samples_s if s > top_s)

    def draw(width: int) -> str:
        tall = 250 if not clocks else 330
        x = linear([xs[0], xs[-1]], 4 if width < 400 else 7)
        y = linear([low_s * factor, top_s * factor], 5)
        plot = Plot(width, tall, x, y, left=46, right=44 if warm else 12, bottom=40 if not clocks else 128)
        right = None
        if warm:
            degrees = linear([v for _, moment in moments if (v := moment.temperatures_c.get(warm)) is not None], 4)
            right = (degrees, "°C", "f1")
        plot.axes(words, unit, right, x_ticks=not clocks)
        for low, high in _held_back(moments):
            plot.zone(low, high, "zone")
        _samples(plot, xs, [min(s, top_s) * factor for s in m.samples_s])
        if right and warm:
            plot.line(
                [(min(max(t, x.low), x.high), v) for t, moment in moments if (v := moment.temperatures_c.get(warm)) is not None],
                "k1 dash",
                right[0],
            )
        if changed is not None:
            plot.upright(min(max(changed, x.low), x.high))
        if clocks:
            _strip(plot, tall, x, words, moments, clocks)
        return plot.whole

    legend = _time_legend(len(xs), warm, clocks, any(_held_back(moments)), changed is not None)
    note = " ".join(filter(None, (_steady(m), f"{beyond} of {len(xs)} calls took longer and are drawn at the top." if beyond else "")))
    temperature = "" if warm else " The device told no temperature over time." if timed else ""
    said = f"{len(m.samples_s)} calls of {m.method}: median {show_seconds(m.p50_s)}, 90% below {show_seconds(m.p90_s)}.{temperature}"
    return Figure(f"Latency over time: {name}", said, draw, _by_tenths(xs, m, moments, warm, clocks, words), legend, note)


def _time_legend(count: int, warm: str | None, clocks: Sequence[str], held: bool, changed: bool) -> list[tuple[str, str]]:
    found = [("a call", "f0")] if count <= MANY else [("median", "k0"), ("p5 to p95", "f0 faint")]
    found += [(f"temperature ({warm})", "k1 dash")] if warm else []
    found += [(f"clock ({name})", f"k{2 + i} thin") for i, name in enumerate(clocks)]
    found += [("held back by the device", "zone")] if held else []
    return found + ([("where it changed most", "ref")] if changed else [])


def span(methods: Sequence[MethodSamples]) -> tuple[float, float]:
    """Seconds that an axis of samples holds, a tenth around the median at least; a few outliers must not flatten the rest."""
    low = min(min(m.samples_s) for m in methods)
    ends = []
    for m in methods:
        p50, p90 = percentile(m.samples_s, 0.5), percentile(m.samples_s, 0.9)
        low = min(low, 0.95 * p50)
        ends.append(min(max(*m.samples_s, 1.05 * p50), max(1.05 * p50, p90 + 4 * (p90 - p50))))
    return low, max(ends)


def _within(moments: Sequence[tuple[float, Moment]], end: float) -> list[tuple[float, Moment]]:
    """Moments from 0 to `end`, and the nearest on both sides."""
    before = [t for t, _ in moments if t <= 0]
    after = [t for t, _ in moments if t >= end]
    low, high = max(before, default=0.0), min(after, default=end)
    return [(t, moment) for t, moment in moments if low <= t <= high]


def _samples(plot: Plot, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Dots, or of many samples the median and a band of pieces."""
    if len(xs) <= MANY:
        plot.dots(list(zip(xs, ys, strict=True)), "k0")
        return
    size = max(PIECE, math.ceil(len(xs) / PIECES))
    pieces = [(xs[i : i + size], ys[i : i + size]) for i in range(0, len(xs), size)]
    middle = [(median(x), median(y)) for x, y in pieces]
    low, high = ([(median(x), percentile(y, q)) for x, y in pieces] for q in (0.05, 0.95))
    points = " ".join(f"{plot.px(x):.1f},{plot.py(y):.1f}" for x, y in [*low, *reversed(high)])
    plot.add(f'<polygon points="{points}" class="f0 faint"/>')
    plot.line(middle, "k0")


def _strip(plot: Plot, tall: int, x: Scale, words: str, moments: Sequence[tuple[float, Moment]], clocks: Sequence[str]) -> None:
    """Clocks below the samples, on the same axis of time."""
    values = [moment.clocks_hz[c] / 1e6 for _, moment in moments for c in clocks if c in moment.clocks_hz]
    below = Plot(plot.width, tall, x, linear(values, 2), left=plot.left, right=plot.right, top=tall - 94, bottom=40)
    below.axes(words, "MHz")
    for i, name in enumerate(clocks):
        points = [(min(max(t, x.low), x.high), moment.clocks_hz[name] / 1e6) for t, moment in moments if name in moment.clocks_hz]
        below.line(points, f"k{2 + i} thin")
    plot.marks += below.marks


def _hottest(moments: Sequence[Moment]) -> str | None:
    """The thermal zone that gets warmest, of those read at least twice."""
    seen: dict[str, list[float]] = {}
    for moment in moments:
        for zone, degrees in moment.temperatures_c.items():
            seen.setdefault(zone, []).append(degrees)
    known = {zone: max(v) for zone, v in seen.items() if len(v) > 1}
    return max(known, key=lambda z: known[z]) if known else None


def _clusters(moments: Sequence[Moment]) -> list[str]:
    """Clocks that were read at least twice; at most three."""
    names = [name for moment in moments for name in moment.clocks_hz]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1][:3]


def _held_back(moments: Sequence[tuple[float, Moment]]) -> list[tuple[float, float]]:
    """Stretches of time between moments in which the device says that something holds it back."""
    pairs = itertools.pairwise(moments)
    return [(a, b) for (a, one), (b, other) in pairs if one.throttle or other.throttle]


def _steady(m: MethodSamples) -> str:
    if m.steady is None:
        return ""
    s = m.steady
    return f"{show_seconds(s.burst_p50_s)} at first, {show_seconds(s.sustained_p50_s)} sustained (×{s.ratio:.2f})."


def _by_tenths(
    xs: Sequence[float], m: MethodSamples, moments: Sequence[tuple[float, Moment]], warm: str | None, clocks: Sequence[str], words: str
) -> Table:
    """The run in ten pieces."""
    size = max(1, math.ceil(len(xs) / 10))
    head = [f"from {words}", "calls", "median", "p90", *(["°C"] if warm else []), *(f"MHz {c}" for c in clocks)]
    rows = []
    for i in range(0, len(xs), size):
        piece = m.samples_s[i : i + size]
        near = min(moments, key=lambda t: abs(t[0] - xs[i]))[1] if moments else None
        row = [f"{xs[i]:.3g}", str(len(piece)), show_seconds(percentile(piece, 0.5)), show_seconds(percentile(piece, 0.9))]
        if warm and near:
            row.append(f"{near.temperatures_c[warm]:.0f}" if warm in near.temperatures_c else "–")
        rows.append(row + [f"{near.clocks_hz[c] / 1e6:.0f}" if near and c in near.clocks_hz else "–" for c in clocks])
    return Table(head, rows)


# ---- distributions ------------------------------------------------------------------------------------------


def distribution(method: str, sides: Sequence[tuple[str, MethodSamples]]) -> Figure:
    """How long the slowest calls take: latency over the share of calls that are faster, the tail drawn wide; one line a report."""
    known = [(name, m) for name, m in sides if m.samples_s]
    factor, unit = unit_of(max(percentile(m.samples_s, 0.99) for _, m in known))
    most = max(len(m.samples_s) for _, m in known)
    shares = [s for s in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999) if (1 - s) * most >= 1]

    def draw(width: int) -> str:
        x = Scale(0.0, math.log10(most) + 0.2, tuple(-math.log10(1 - s) for s in shares), show=lambda v: f"{100 * (1 - 10**-v):.4g}%")
        y = timely([percentile(m.samples_s, q) * factor for _, m in known for q in (0.0, 1 - 1 / len(m.samples_s))], 5)
        plot = Plot(width, 330, x, y, left=46).axes("of calls are faster", unit)
        for i, (_, m) in enumerate(known):
            ordered, end = sorted(s * factor for s in m.samples_s), math.log10(len(m.samples_s))
            steps = [end * j / 200 for j in range(201)] if end else [0.0]
            plot.line([(v, percentile(ordered, 1 - 10**-v)) for v in steps], f"k{i % 6}{' dash' if i % 2 else ''}")
            for q, key in ((0.5, m.p50_s), (0.9, m.p90_s), (0.99, m.p99_s)):
                if key and len(ordered) >= 1 / (1 - q):
                    plot.dot(-math.log10(1 - q), key * factor, f"f{i % 6}", 4.5, f"p{q * 100:.0f} {show_seconds(key)}")
        return plot.whole

    heads = ["", "first call", "p50", "p90", "p99", "fastest", "slowest", "calls"]
    rows = [
        [name, *(show_seconds(v) for v in (m.cold_s, m.p50_s, m.p90_s, m.p99_s, min(m.samples_s), max(m.samples_s))), str(len(m.samples_s))]
        for name, m in known
    ]
    said = "; ".join(f"{name}: p50 {show_seconds(m.p50_s)}, p90 {show_seconds(m.p90_s)}, p99 {show_seconds(m.p99_s)}" for name, m in known)
    legend = [(name, f"k{i % 6}{' dash' if i % 2 else ''}") for i, (name, _) in enumerate(known)] if len(known) > 1 else []
    return Figure(f"Percentiles: {method}", said, draw, Table(heads, rows), legend, "Dots stand at p50, p90 and p99.")


# ---- watts --------------------------------------------------------------------------------------------------


def watts(report: Report, name: str) -> Figure | None:
    """Power over time with the chunks of calls, or None where no sensor was read."""
    p = report.power
    if p is None or len(p.watts) < 2:
        return None
    start = p.times_s[0]
    chunks = [(c.start_s - start, c.end_s - start) for m in report.methods for c in m.chunks]

    def draw(width: int) -> str:
        x = linear([t - start for t in p.times_s], 4 if width < 400 else 7)
        plot = Plot(width, 220, x, linear(p.watts, 4, zero=True), left=46).axes("seconds", "W")
        for low, high in chunks:
            plot.zone(low, high, "band")
        every = max(1, len(p.watts) // 800)
        plot.line([(t - start, w) for t, w in zip(p.times_s[::every], p.watts[::every], strict=True)], "k2 thin")
        if p.idle_w is not None:
            y = plot.py(p.idle_w)
            plot.add(f'<line x1="{plot.left}" x2="{width - plot.right}" y1="{y:.1f}" y2="{y:.1f}" class="ref"/>')
        return plot.whole

    rows = [
        [
            e.method,
            show_joules(e.gross_j),
            show_joules(e.net_j) if e.net_j is not None else "–",
            f"± {show_joules(e.uncertainty_j)}",
            str(e.calls),
        ]
        for e in report.energy
    ]
    idle = f", idle {p.idle_w:.2f} W" if p.idle_w is not None else ""
    said = f"{p.sensor} ({p.covers}), {len(p.watts)} readings, mean {sum(p.watts) / len(p.watts):.2f} W{idle}."
    table = Table(["method", "a call", "less idle", "uncertain by", "calls"], rows)
    legend = [("power", "k2 thin"), ("calls", "band"), *([("idle", "ref")] if p.idle_w is not None else [])]
    return Figure(f"Power: {name}", said, draw, table, legend, f"{p.sensor}, covers the {p.covers}")
