"""Figures in rows: ratios with their intervals, bars, parts of a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgesdk.pages.html import Figure, Table, text
from edgesdk.pages.svg import Plot, Scale, linear, logarithmic, number, shorten, width_of
from edgesdk.report import OperatorTime, Report
from edgesdk.units import show_bytes, show_seconds

EMPTY = Scale(0, 1, ())
BARS = 10
COLOURED = ("linear", "conv2d", "depthwise_conv2d", "attention", "matmul", "norm")  # the same colour in every figure


@dataclass(frozen=True)
class Ratio:
    label: str
    value: float
    low: float | None
    high: float | None
    shown: str
    kind: str = "0"  # of its colour


def ratios(rows: Sequence[Ratio], around: float | None = None, axis: str = "ratio") -> Callable[[int], str]:
    """One row each: a dot and its interval on a logarithmic axis with 1 marked, `around`: a band of 1 ± so much."""
    ends = [v for r in rows for v in (r.value, r.low, r.high) if v] + [1 / 1.1, 1.1]

    def draw(width: int) -> str:
        x = logarithmic(ends, 4 if width < 400 else 7)
        plot = Plot(width, 46 * len(rows) + 54, x, EMPTY, left=12, right=14, top=8)
        for tick in x.ticks:
            plot.upright(tick, "tick")
        if around:
            plot.zone(1 / (1 + around), 1 + around, "band")
        plot.upright(1.0)
        plot.axes(axis, "")
        for i, r in enumerate(rows):
            y = plot.top + 46 * i
            wide = width_of(r.shown)
            plot.write(12, y + 13, shorten(r.label, width - 44 - wide), "start", "strong")
            plot.write(width - 14, y + 13, r.shown, "end", "ink")
            if r.low and r.high:
                plot.add(
                    f'<line x1="{plot.px(r.low):.1f}" x2="{plot.px(r.high):.1f}" y1="{y + 29}" y2="{y + 29}" class="line k{r.kind}" stroke-width="4"/>'
                )
                for end in (r.low, r.high):
                    plot.add(f'<line x1="{plot.px(end):.1f}" x2="{plot.px(end):.1f}" y1="{y + 24}" y2="{y + 34}" class="line k{r.kind}"/>')
            plot.add(f'<circle cx="{plot.px(r.value):.1f}" cy="{y + 29}" r="5" class="f{r.kind}"/>')
        return plot.whole

    return draw


def predicted(report: Report, name: str) -> Figure | None:
    """Predicted against measured, as a ratio: different units on one axis."""
    known = [c for c in report.comparisons if c.predicted and c.measured]
    if not known:
        return None
    rows, cells = [], []
    for c in known:
        assert c.predicted and c.measured
        show = show_seconds if c.unit == "s" else show_bytes
        interval = c.predicted_low is not None and c.predicted_high is not None
        low, high = ((c.predicted_low or 0) / c.measured, (c.predicted_high or 0) / c.measured) if interval else (None, None)
        inside = low is None or high is None or low <= 1 <= high
        rows.append(Ratio(c.name, c.predicted / c.measured, low, high, f"{c.predicted / c.measured - 1:+.0%}", "0" if inside else "1"))
        span = f"{show(c.predicted_low)} to {show(c.predicted_high)}" if interval else "none"
        cells.append([c.name, show(c.predicted), span, show(c.measured), f"{c.predicted / c.measured - 1:+.0%}"])
    said = "; ".join(f"{c[0]}: predicted {c[1]}, measured {c[3]}" for c in cells)
    legend = [("prediction with its 80% interval", "f0")] + (
        [("measured outside of the interval", "f1")] if any(r.kind == "1" for r in rows) else []
    )
    table = Table(["", "predicted", "80% interval", "measured", "off by"], cells)
    return Figure(f"Predicted against measured: {name}", said, ratios(rows, axis="predicted ÷ measured"), table, legend)


def bars(rows: Sequence[tuple[str, float, str, str]], kinds: Sequence[str]) -> Callable[[int], str]:
    """(label, value, what is written, title) each, the label above its bar; `kinds`: classes of fill."""
    top = max(v for _, v, _, _ in rows) or 1.0

    def draw(width: int) -> str:
        plot = Plot(width, 36 * len(rows) + 8, EMPTY, EMPTY, left=2, right=2, top=4)
        for i, ((label, value, shown, title), kind) in enumerate(zip(rows, kinds, strict=True)):
            y = 36 * i + 4
            plot.write(2, y + 12, shorten(label, width - 24 - width_of(shown)), "start", "ink")
            plot.write(width - 2, y + 12, shown, "end", "ink")
            bar = max(2.0, (width - 4) * value / top)
            plot.add(f'<rect x="2" y="{y + 18}" width="{bar:.1f}" height="10" rx="2" class="{kind}"><title>{text(title)}</title></rect>')
        return plot.whole

    return draw


def pattern(name: str) -> str:
    """A unit's name with * for numbers of layers and without that of a call: what alike units share."""
    return re.sub(r"(?<![a-z\d])\d+", "*", re.sub(r"_\d+$", "", name))


def operators(rows: Sequence[OperatorTime], route: str, title: str) -> Figure:
    """The slowest operators as bars, all of them in the table; many are summed over what differs by a number in their names alone."""
    several = len({o.method for o in rows}) > 1
    sums: dict[tuple[str, str], list[OperatorTime]] = {}
    for o in rows:
        name = f"{o.method}: {o.unit}" if several else o.unit
        sums.setdefault((pattern(name) if len(rows) > BARS else name, o.op), []).append(o)
    ordered = sorted(((sum(o.median_s for o in group), *key, group) for key, group in sums.items()), key=lambda g: -g[0])
    kinds = {op for _, _, op, _ in ordered}
    colour = {op: f"f{COLOURED.index(op)}" if op in COLOURED else "fs" for op in kinds}
    shown = []
    for seconds, name, op, group in ordered[:BARS]:
        count = f" ({len(group)})" if len(group) > 1 else ""
        share = sum(o.share for o in group)
        shown.append(
            (name + count, seconds, f"{show_seconds(seconds)}  {share:.0%}", f"{name}{count}, {op}: {show_seconds(seconds)}, {share:.1%}")
        )
    legend = [(op, colour[op]) for op in COLOURED if op in kinds] + ([("other operators", "fs")] if kinds - set(COLOURED) else [])
    said = "; ".join(title for _, _, _, title in shown[:5])
    note = route + (f"; the {BARS} slowest groups of {len(rows)}, * stands for a number" if len(rows) > BARS else "")
    cells = [[o.method, o.unit, o.op, show_seconds(o.median_s), f"{o.share:.1%}"] for o in sorted(rows, key=lambda o: -o.median_s)]
    table = Table(["method", "unit", "operator", "a call", "share"], cells)
    return Figure(title, said, bars(shown, [colour[op] for _, _, op, _ in ordered[:BARS]]), table, legend, note)


def stacks(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], unit: Callable[[float], str], axis: str) -> Callable[[int], str]:
    """Rows of parts put one behind another: (label, [(part, size, class)])."""
    top = max(sum(size for _, size, _ in parts) for _, parts in rows)

    def draw(width: int) -> str:
        x = linear([0.0, top], 3 if width < 400 else 5, zero=True, show=number)
        plot = Plot(width, 48 * len(rows) + 50, x, EMPTY, left=12, right=16, top=6)
        for tick in x.ticks:
            plot.upright(tick, "tick")
        plot.axes(axis, "")
        for i, (label, parts) in enumerate(rows):
            y, at = plot.top + 48 * i, 0.0
            whole = unit(sum(size for _, size, _ in parts))
            plot.write(12, y + 13, shorten(label, width - 44 - width_of(whole)), "start", "strong")
            plot.write(width - 14, y + 13, whole, "end", "ink")
            for part, size, kind in parts:
                a, b = plot.px(at), plot.px(at + size)
                plot.add(
                    f'<rect x="{a:.1f}" y="{y + 20}" width="{max(0.5, b - a):.1f}" height="18" class="{kind}"><title>{text(f"{part}: {unit(size)}")}</title></rect>'
                )
                at += size
        return plot.whole

    return draw
