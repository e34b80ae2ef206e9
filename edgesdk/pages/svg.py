"""Drawing in SVG: scales with round ticks, a plot's frame, marks. Sizes are pixels; colours are classes of `style.STYLE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgesdk.pages.html import text

FONT = 12.5
Anchor = Literal["start", "middle", "end"]


def width_of(words: str) -> float:
    """About how wide text is, in pixels: letters of system fonts are 0.56 of their size wide on average."""
    return 0.56 * FONT * len(words)


def shorten(words: str, room: float) -> str:
    """`words` with its middle left out where it is wider than `room` pixels."""
    keep = int(room / (0.56 * FONT))
    if len(words) <= keep or keep < 4:
        return words
    head = (keep - 1) // 2
    return f"{words[:head]}…{words[-(keep - 1 - head) :]}"


def number(value: float) -> str:
    """Three digits that count, without an exponent for what people meet."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


@dataclass(frozen=True)
class Scale:
    """From values to shares of an axis. `ticks` are inside `low` … `high`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    show: Callable[[float], str] = number

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(values: Iterable[float], ticks: int = 5, zero: bool = False, show: Callable[[float], str] = number) -> Scale:
    """A scale that holds `values` and ends on ticks at 1, 2 or 5 times a power of ten."""
    known = list(values)
    low, high = min(known), max(known)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - (0.0 if zero else pad), high + pad
    raw = (high - low) / max(1, ticks)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 5, 10) if m * base >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, tuple(i * step for i in range(first, last + 1)), show=show)


def logarithmic(values: Iterable[float], ticks: int = 6, show: Callable[[float], str] = number) -> Scale:
    """A logarithmic scale with a little room at both ends; decades, or 1-2-5 between them where they are few."""
    known = [v for v in values if v > 0]
    low, high = min(known), max(known)
    low, high = low / max(1.05, (high / low) ** 0.04), high * max(1.05, (high / low) ** 0.04)
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(found) <= ticks:
            break
    every = math.ceil(len(found) / ticks)
    return Scale(low, high, tuple(found[::every]), log=True, show=show)


def timely(values: Iterable[float], ticks: int = 5) -> Scale:
    """Linear, or logarithmic where the values span more than one power of ten."""
    known = list(values)
    return logarithmic(known, ticks) if min(known) > 0 and max(known) > 10 * min(known) else linear(known, ticks)


@dataclass
class Plot:
    """A frame with an x axis below and a y axis at the left; `right` has room for a second one."""

    width: int
    height: int
    x: Scale
    y: Scale
    left: float = 52
    right: float = 12
    top: float = 26
    bottom: float = 40
    marks: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        return self.left + (self.width - self.left - self.right) * self.x.share(value)

    def py(self, value: float, scale: Scale | None = None) -> float:
        return self.height - self.bottom - (self.height - self.bottom - self.top) * (scale or self.y).share(value)

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def axes(self, x_label: str, y_label: str, second: tuple[Scale, str, str] | None = None, x_ticks: bool = True) -> Plot:
        """Grid, ticks and labels. `second`: a scale at the right with its label and the class of its text."""
        end = self.width - self.right
        for tick in self.y.ticks:
            y = self.py(tick)
            self.add(f'<line x1="{self.left:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="tick"/>')
            self.write(self.left - 7, y + 4, self.y.show(tick), "end")
        self.add(f'<line x1="{self.left:.1f}" x2="{end:.1f}" y1="{self.floor:.1f}" y2="{self.floor:.1f}" class="axis"/>')
        if x_ticks:
            self._below(x_label)
        self.write(2, self.top - 13, y_label, "start", "ink")
        if second:
            scale, label, kind = second
            for tick in scale.ticks:
                self.write(end + 7, self.py(tick, scale) + 4, scale.show(tick), "start", kind)
            self.write(self.width - 2, self.top - 13, label, "end", kind)
        return self

    def _below(self, label: str) -> None:
        last = -math.inf
        for tick in self.x.ticks:
            words, x = self.x.show(tick), self.px(tick)
            half = width_of(words) / 2
            x_text = min(max(x, half + 1), self.width - half - 1)
            self.add(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.floor:.1f}" y2="{self.floor + 4:.1f}" class="axis"/>')
            if x_text - half > last + 6:
                self.write(x_text, self.floor + 17, words, "middle")
                last = x_text + half
        self.write((self.left + self.width - self.right) / 2, self.height - 6, label, "middle", "ink")

    def add(self, mark: str) -> None:
        self.marks.append(mark)

    def write(self, x: float, y: float, words: str, anchor: Anchor = "start", kind: str = "") -> None:
        named = f' class="{kind}"' if kind else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{text(words)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str, scale: Scale | None = None, steps: bool = False) -> None:
        """A line through (x, y) values; `steps`: level up to the next x."""
        at = [(self.px(x), self.py(y, scale)) for x, y in points]
        if steps:
            at = [p for i, (x, y) in enumerate(at) for p in ([(x, at[i - 1][1])] if i else []) + [(x, y)]]
        self.add(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" class="line {kind}"/>')

    def dots(self, points: Iterable[tuple[float, float]], kind: str, radius: float = 2.2) -> None:
        """Many small dots as one path: a line of no length with round ends is a dot."""
        path = "".join(f"M{self.px(x):.1f} {self.py(y):.1f}h0" for x, y in points)
        self.add(f'<path d="{path}" class="{kind}" fill="none" stroke-width="{2 * radius}" stroke-linecap="round" stroke-opacity=".6"/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 5, title: str = "") -> None:
        inner = f"<title>{text(title)}</title>" if title else ""
        self.add(f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius}" class="{kind}">{inner}</circle>')

    def upright(self, x: float, kind: str = "ref") -> None:
        self.add(f'<line x1="{self.px(x):.1f}" x2="{self.px(x):.1f}" y1="{self.top:.1f}" y2="{self.floor:.1f}" class="{kind}"/>')

    def zone(self, x0: float, x1: float, kind: str) -> None:
        """An area over the whole height, between two values of x."""
        a, b = self.px(max(x0, self.x.low)), self.px(min(x1, self.x.high))
        self.add(
            f'<rect x="{a:.1f}" y="{self.top:.1f}" width="{max(1.0, b - a):.1f}" height="{self.floor - self.top:.1f}" class="{kind}"/>'
        )

    @property
    def whole(self) -> str:
        """As `html.Figure` wants it: the height, then the marks."""
        return f"{self.height}|{''.join(self.marks)}"


def label_spots(
    plot: Plot, named: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]] = (), gap: float = 9
) -> list[tuple[float, float] | None]:
    """Where labels of points go without overlapping each other, a point or the frame: their start and baseline in pixels, or None.

    `named`: (x, y, label) and `others`: (x, y), all as values; `gap`: pixels between a point and its label.
    """
    at = [(plot.px(x), plot.py(y)) for x, y in (*((x, y) for x, y, _ in named), *others)]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    found: list[tuple[float, float] | None] = []
    for (x, y), (_, _, words) in zip(at, named, strict=False):
        wide = width_of(words) * 1.08
        beside, above = (x + gap, x - gap - wide), (x - wide / 2, x + gap, x - gap - wide)
        spots = [*((a, y + 4) for a in beside), *((a, b) for b in (y - gap - 1, y + gap + 10) for a in above)]
        found.append(next((s for s in spots if _free(plot, _box(s, wide), taken)), None))
        taken += [_box(found[-1], wide)] if found[-1] else []
    return found


Box = tuple[float, float, float, float]


def _box(spot: tuple[float, float], wide: float) -> Box:
    return spot[0] - 2, spot[1] - FONT, spot[0] + wide + 2, spot[1] + 4


def _free(plot: Plot, box: Box, taken: Sequence[Box]) -> bool:
    inside = box[0] >= plot.left + 2 and box[2] <= plot.width - plot.right and box[1] >= plot.top and box[3] <= plot.floor - 3
    return inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
