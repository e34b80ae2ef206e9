"""Reports against each other: faster, slower, the same within a tolerance, or not to be told from so few samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgesdk.errors import InputError
from edgesdk.interval import LEAST, Interval, of_figures, of_runs, of_uncertain, times_more
from edgesdk.noun import Noun, Part
from edgesdk.report import Energy, MethodSamples, Report
from edgesdk.trust import CLOCK_DROP
from edgesdk.units import show_bytes, show_joules, show_seconds

ERROR = 0.05  # chance of a wrong verdict over all rows of one comparison
Said = Literal["slower", "faster", "more", "less", "same", "cannot tell", "not comparable"]
WORSE: tuple[Said, ...] = ("slower", "more")
SHOW: dict[str, Callable[[float | None], str]] = {"s": show_seconds, "J": show_joules, "bytes": show_bytes}


class Row(Part):
    """One figure of both sides. `ratio` is second over first, its interval one of all rows together."""

    method: str  # "" for what belongs to the whole program
    metric: Literal["p50", "p90", "mean", "energy", "memory peak", "memory PSS"]
    unit: Literal["s", "J", "bytes"]
    first: float
    second: float
    ratio: float
    low: float | None = None
    high: float | None = None
    verdict: Said
    not_worse: bool = False  # the whole interval is below 1 + tolerance
    why: str | None = None  # it cannot be told
    times_more: float | None = None  # so many times the samples, or runs, would decide; None: decided, or more than 100

    @property
    def name(self) -> str:
        return f"{self.method} {self.metric}".strip()


class Verdicts(Noun):
    KIND: ClassVar[str] = "comparison"
    VERSION: ClassVar[int] = 2

    verdict: Said  # of the whole: slower where any row is, else what the medians say
    methods: dict[str, Said]
    tolerance: float
    confidence: float  # of all intervals together
    runs: tuple[int, int]  # reports a side
    rows: tuple[Row, ...]
    regressions: tuple[str, ...]
    not_comparable: tuple[str, ...]
    differs: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def not_worse(self) -> bool:
        """Of times: no row can be slower. (Memory of one run a side has no interval.)"""
        return not self.not_comparable and all(r.not_worse for r in self.rows if r.unit == "s")


def compare(first: Report | Sequence[Report], second: Report | Sequence[Report], *, tolerance: float = 0.03) -> Verdicts:
    """What `second` is against `first`, each one report or several runs of the same bundle.

    A row is slower where its whole interval is above 1 + `tolerance`, faster where it is below 1 / (1 + `tolerance`), the same where it is
    between the two. `not_comparable` says why the sides may not be compared; no verdict is given then. Raises `InputError`
    for a tolerance that is none, and where the sides share no method.
    """
    a, b = ([side] if isinstance(side, Report) else list(side) for side in (first, second))
    if not a or not b:
        raise InputError("a side without reports", "give at least one report on each side")
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance = {tolerance}", "give a share from 0 to below 1: 3%")
    stops, others = differences(a, b)
    made = _figures(a, b)
    error = ERROR / max(1, sum(1 for f in made if f.interval is not None))
    rows = tuple(f.row(tolerance, error, (len(a), len(b)), bool(stops)) for f in made)
    methods = {name: _method([r for r in rows if r.method == name]) for name in dict.fromkeys(r.method for r in rows if r.method)}
    return Verdicts(
        verdict="not comparable" if stops else _whole(rows, list(methods.values())), methods=methods, tolerance=tolerance,
        confidence=1 - ERROR, runs=(len(a), len(b)), rows=rows,
        regressions=tuple(f"{r.name} ×{r.ratio:.2f}" for r in rows if r.verdict in WORSE), not_comparable=tuple(stops),
        differs=tuple(others), warnings=tuple(_warnings(a, b)),
    )  # fmt: skip


def _method(rows: Sequence[Row]) -> Said:
    """Slower where any row is; else what the first row, the median, says."""
    return next((r.verdict for r in rows if r.verdict in WORSE), rows[0].verdict)


def _whole(rows: Sequence[Row], methods: Sequence[Said]) -> Said:
    for worse in WORSE:
        if any(r.verdict == worse for r in rows):
            return worse
    if "cannot tell" in methods:
        return "cannot tell"
    return "faster" if "faster" in methods else "same"


def _warnings(a: Sequence[Report], b: Sequence[Report]) -> list[str]:
    if len(a) == len(b) == 1:
        return ["one run a side: what changes from one start to the next is in no interval; three runs a side, taken in turns, tell"]
    if len(a) == 1 or len(b) == 1:
        return ["one side is a single run: how runs scatter is taken from the other"]
    return []


# ---- figures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Figure:
    """A row before its verdict. `interval`: error → interval, None where there can be none, and `why`."""

    method: str
    metric: Literal["p50", "p90", "mean", "energy", "memory peak", "memory PSS"]
    unit: Literal["s", "J", "bytes"]
    first: float
    second: float
    interval: Callable[[float], Interval] | None
    why: str | None = None

    def row(self, tolerance: float, error: float, runs: tuple[int, int], stopped: bool) -> Row:
        found = self.interval(error) if self.interval else None
        verdict, why, more = self._judge(found, tolerance, runs, error)
        return Row(
            method=self.method, metric=self.metric, unit=self.unit, first=self.first, second=self.second,
            ratio=found.ratio if found else self.second / self.first, low=found.low if found else None, high=found.high if found else None,
            verdict="not comparable" if stopped else verdict, not_worse=bool(found and not stopped and found.high <= 1 + tolerance),
            why=why, times_more=more,
        )  # fmt: skip

    def _judge(
        self, found: Interval | None, tolerance: float, runs: tuple[int, int], error: float
    ) -> tuple[Said, str | None, float | None]:
        if found is None:
            return "cannot tell", self.why, None
        words: tuple[Said, Said] = ("slower", "faster") if self.unit == "s" else ("more", "less")
        edge = 1 + tolerance
        if found.low > edge:
            return words[0], None, None
        if found.high < 1 / edge:
            return words[1], None, None
        if found.low >= 1 / edge and found.high <= edge:
            return "same", None, None
        why = None
        if found.effective and min(found.effective) < 10:
            why = f"neighbouring samples resemble each other: a run is worth {min(found.effective):.0f} of its samples"
        return "cannot tell", why, times_more(found, tolerance, runs, error)


def _figures(a: Sequence[Report], b: Sequence[Report]) -> list[_Figure]:
    theirs = {m.method for m in b[0].methods}
    names = [m.method for m in a[0].methods if m.method in theirs]
    if not names:
        raise InputError("the reports share no method", f"{[m.method for m in a[0].methods]} against {sorted(theirs)}")
    found = []
    for name in names:
        found += _times(name, _of(name, a), _of(name, b))
        spent = [[e for r in side for e in r.energy if e.method == name and e.gross_j > 0] for side in (a, b)]
        if len(spent[0]) == len(a) and len(spent[1]) == len(b):
            found.append(_energy(name, spent[0], spent[1]))
    bytes_: tuple[tuple[Literal["memory peak", "memory PSS"], Callable[[Report], int | None]], ...] = (
        ("memory peak", lambda r: r.peak_rss_bytes),
        ("memory PSS", lambda r: r.memory.peak_pss_bytes),
    )
    for metric, read in bytes_:
        sides = [[float(v) for r in side if (v := read(r))] for side in (a, b)]
        if len(sides[0]) == len(a) and len(sides[1]) == len(b):
            found.append(_single("", metric, "bytes", sides[0], sides[1]))
    return found


def _of(name: str, side: Sequence[Report]) -> list[MethodSamples]:
    found = [m for r in side for m in r.methods if m.method == name]
    if len(found) != len(side):
        raise InputError(f"not every report of a side has the method {name}", "give runs of the same bundle")
    return found


def _times(name: str, a: Sequence[MethodSamples], b: Sequence[MethodSamples]) -> list[_Figure]:
    """Median and p90 out of samples; the mean where a tool kept no samples."""
    if not all(m.samples_s for m in (*a, *b)):
        means = [[m.summary.mean_s for m in side if m.summary and m.summary.mean_s] for side in (a, b)]
        known = len(means[0]) == len(a) and len(means[1]) == len(b)
        return [_single(name, "mean", "s", means[0], means[1])] if known else []
    if any(s <= 0 for m in (*a, *b) for s in m.samples_s):
        raise InputError(f"{name}: a call of 0 s", "the clock is too coarse for this method: nothing can be compared")
    found = []
    runs = [[m.samples_s for m in side] for side in (a, b)]
    fewest = min(len(run) for side in runs for run in side)
    metrics: tuple[tuple[float, Literal["p50", "p90"]], ...] = ((0.5, "p50"), (0.9, "p90"))
    for share, metric in metrics:
        values = [_mean([v for m in side if (v := getattr(m, f"{metric}_s"))]) for side in (a, b)]

        def interval(error: float, share: float = share) -> Interval:
            return of_runs(runs[0], runs[1], share, error)

        enough = fewest >= LEAST[share]
        why = None if enough else f"{fewest} samples, {LEAST[share]} are the least for a {metric}"
        found.append(_Figure(name, metric, "s", values[0], values[1], interval if enough else None, why))
    return found


def _energy(name: str, a: Sequence[Energy], b: Sequence[Energy]) -> _Figure:
    """Net of idle where both sides have it."""
    net = all(e.net_j and e.net_j > 0 for e in (*a, *b))
    values = [[(e.net_j if net and e.net_j else e.gross_j, e.uncertainty_j) for e in side] for side in (a, b)]
    if len(a) + len(b) > 2:
        return _single(name, "energy", "J", [v for v, _ in values[0]], [v for v, _ in values[1]])
    (first,), (second,) = values
    return _Figure(name, "energy", "J", first[0], second[0], lambda error: of_uncertain(first, second, error))


def _single(
    name: str, metric: Literal["mean", "energy", "memory peak", "memory PSS"], unit: Literal["s", "J", "bytes"],
    a: Sequence[float], b: Sequence[float],
) -> _Figure:  # fmt: skip
    """One reading a run: it takes several runs to know how it scatters."""
    if len(a) + len(b) < 3:
        return _Figure(name, metric, unit, _mean(a), _mean(b), None, "one reading a side: several runs are needed")
    logs = [[math.log(v) for v in side] for side in (a, b)]
    return _Figure(name, metric, unit, _mean(a), _mean(b), lambda error: of_figures(logs[0], logs[1], error))


def _mean(values: Sequence[float]) -> float:
    """Geometric: ratios of means are means of ratios."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


# ---- may they be compared? -----------------------------------------------------------------------------------


def differences(a: Sequence[Report], b: Sequence[Report]) -> tuple[list[str], list[str]]:
    """(why the sides may not be compared, what else differs between them)"""
    stops: list[str] = []
    first = a[0]
    for other in (*a[1:], *b):
        stops += _unlike(first, other)
    for words, side in (("first", a), ("second", b)):
        if len({r.bundle_digest for r in side}) > 1:
            stops.append(f"the {words} side holds runs of different bundles: {', '.join(sorted({r.bundle_digest[:12] for r in side}))}")
        stops += [f"the {words} was throttled: {r.trust.reasons[0]}" for r in side if r.trust.verdict == "throttled"]
    others = [
        f"the {words} is noisy: {r.trust.reasons[0]}" for words, r in (("first", a[0]), ("second", b[0])) if r.trust.verdict == "noisy"
    ]
    ca, cb = a[0].conditions, b[0].conditions
    rest: tuple[tuple[str, object, object], ...] = (
        ("runtime", f"{ca.runtime} {ca.runtime_version}", f"{cb.runtime} {cb.runtime_version}"),
        ("threads", ca.threads, cb.threads),
        ("bundle", a[0].bundle_digest[:12], b[0].bundle_digest[:12]),
        ("system", ca.system, cb.system),
    )
    others += [f"{name}: {before} against {after}" for name, before, after in rest if before != after]
    return list(dict.fromkeys(stops)), others


def _unlike(a: Report, b: Report) -> list[str]:
    ca, cb = a.conditions, b.conditions
    found = [
        f"{name}: {x} against {y}"
        for name, x, y in (
            ("model", a.model_name, b.model_name),
            ("device", ca.device, cb.device),
            ("machine", ca.machine, cb.machine),
            ("emulated", ca.emulated, cb.emulated),
            ("power mode", ca.power_mode, cb.power_mode),
            ("governor", ca.governor, cb.governor),
            ("mode", a.how.mode, b.how.mode),
            ("calls a second", a.how.rate_hz, b.how.rate_hz),
        )
        if x != y
    ]
    clock_a, clock_b = ca.clock_after_hz, cb.clock_after_hz
    if clock_a and clock_b and abs(clock_a / clock_b - 1) > CLOCK_DROP and not ca.emulated:
        found.append(f"clock: {clock_a / 1e6:.0f} against {clock_b / 1e6:.0f} MHz")
    return found
