"""How much slower is one series of times than another, and how sure is that? Statistics of `edgesdk compare`; numpy inside, no reports.

All of it is on logarithms, so that a ratio is a difference. One run a side: each side's quantile is drawn anew by a bootstrap whose size is
the number of samples that are worth something: neighbours in time resemble each other. n samples drawn from n are, for a quantile, the order
statistic at a Beta-distributed rank (Efron, An Introduction to the Bootstrap, 1993, ch. 19); with m effective samples the rank has m in place of n.
What runs differ in from one start to the next is in no single run: with several runs a side the run is the sample, and Student's t takes the
place of resampling, as two to five runs cannot be resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 4000
LEAST = {0.5: 10, 0.9: 40}  # samples of a run without which a quantile is not compared
DRIFTING = 2.0  # standard errors of the rank correlation with time (5% of steady runs reach it)
MARGIN = 1.2  # drifts are estimated, too


@dataclass(frozen=True)
class Quantile:
    """One run's quantile, as a logarithm, and what may be said of it."""

    log_value: float
    draws: NDArray[Any]  # of the logarithm
    effective: float  # samples that are worth something
    drift: float  # of the logarithm from the run's start to its end; 0 where none shows
    tick: float  # the clock's resolution over the value; 0 where samples are not on a grid


@dataclass(frozen=True)
class Interval:
    """A ratio (second over first) with its simultaneous interval, and how it is known."""

    ratio: float
    low: float
    high: float
    effective: tuple[float, float] | None = None  # samples worth something, of one run a side
    freedom: float | None = None  # degrees of freedom, of several runs

    @property
    def half(self) -> float:
        """Half the interval's width on the logarithm."""
        return math.log(self.high / self.low) / 2


def correlation_time(samples: Sequence[float] | NDArray[Any]) -> float:
    """How many neighbouring samples are worth one (1: all are independent). On ranks, so that outliers do not hide it.

    The larger of two estimates: sums of pairs of autocorrelations while they are positive (Geyer, Statistical Science 7, 1992, section 3.3), and
    that of a first-order process, its correlation corrected for the bias of short series (Kendall, Biometrika 41, 1954) and, where it is
    clearly there, taken one standard error higher.
    """
    import numpy as np

    ranks = _ranks(np.asarray(samples, dtype=float))
    n, spread = len(ranks), float((ranks**2).mean())
    if spread == 0 or n < 5:
        return 1.0
    spectrum = np.fft.rfft(ranks, 2 * n)
    auto = np.fft.irfft(spectrum * np.conj(spectrum))[:n] / (n * spread)
    pairs = auto[: n // 2 * 2].reshape(-1, 2).sum(axis=1)[: max(1, n // 4)]
    stop = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else len(pairs)
    first = float(auto[1])
    corrected = (n * first + 1) / (n - 3)
    if first > 2 / math.sqrt(n):
        corrected += math.sqrt(max(0.0, 1 - first**2) / n)
    corrected = min(corrected, 0.98)
    return max(1.0, 2 * float(pairs[:stop].sum()) - 1, (1 + corrected) / (1 - corrected))


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    """Ranks less their mean; equal values share theirs."""
    import numpy as np

    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: NDArray[Any] = (last - (counts - 1) / 2)[where] - (len(values) + 1) / 2
    return shared


def drift_of(logs: NDArray[Any]) -> float:
    """Change of the logarithm over the run, were it a straight line; 0 where ranks do not move with time beyond chance."""
    import numpy as np

    n = len(logs)
    ranks, time = _ranks(logs), np.arange(n) - (n - 1) / 2
    scale = math.sqrt(float((ranks**2).sum() * (time**2).sum()))
    if scale == 0 or abs(float((ranks * time).sum())) / scale <= DRIFTING / math.sqrt(n):
        return 0.0
    third = max(1, n // 3)
    return 1.5 * float(np.median(logs[-third:]) - np.median(logs[:third]))


def quantile(samples: Sequence[float], share: float, seed: int = 0) -> Quantile:
    """The `share` quantile of one run's samples (seconds, in order of time), drawn anew `DRAWS` times."""
    import numpy as np

    values = np.asarray(samples, dtype=float)
    logs = np.log(values)
    n = len(logs)
    drift = drift_of(logs)
    effective = max(2.0, n / correlation_time(logs - drift * np.arange(n) / n))
    ranks = np.random.default_rng(seed).beta((effective + 1) * share, (effective + 1) * (1 - share), DRAWS)
    different = np.unique(values)
    gap = float(np.diff(different).min()) if 1 < len(different) <= n / 2 else 0.0
    return Quantile(
        float(np.quantile(logs, share)), np.quantile(logs, ranks), effective, drift, gap / float(np.quantile(values, share))
    )  # fmt: skip


def of_runs(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], share: float, error: float) -> Interval:
    """The ratio of the `share` quantiles; each side is one run or several. `error`: chance that the interval misses the truth.

    Several runs: the mean of their logarithms; their scatter is one for both sides (the same device, the same harness).
    """
    import numpy as np

    a = [quantile(run, share, seed) for seed, run in enumerate(first)]
    b = [quantile(run, share, seed + len(a)) for seed, run in enumerate(second)]
    if len(a) == len(b) == 1:
        return _of_two(a[0], b[0], share, error)
    within = float(np.mean([np.var(q.draws) for q in (*a, *b)]))
    return of_figures([q.log_value for q in a], [q.log_value for q in b], error, within)


def _of_two(a: Quantile, b: Quantile, share: float, error: float) -> Interval:
    """One run a side: the bootstrap's percentiles, widened as few samples ask (Hesterberg, The American Statistician 69, 2015, section 5.3).

    Where runs drift, the ratio is not the same at their start, middle and end: the interval holds all three.
    """
    import numpy as np
    from scipy import stats

    middle, draws = b.log_value - a.log_value, b.draws - a.draws
    va, vb = float(np.var(a.draws)), float(np.var(b.draws))
    low, high = (float(v) for v in np.quantile(draws, [error / 2, 1 - error / 2]))
    if va + vb > 0:
        freedom = max(1.0, (va + vb) ** 2 / (va**2 / (a.effective - 1) + vb**2 / (b.effective - 1)))
        wider = float(stats.t.ppf(1 - error / 2, freedom) / stats.norm.ppf(1 - error / 2))
        low, high = middle + wider * (low - middle), middle + wider * (high - middle)
    moved = abs(b.drift - a.drift) / 2 + (share - 0.5) * abs(abs(b.drift) - abs(a.drift))
    more = MARGIN * moved + (a.tick + b.tick) / 2
    return Interval(math.exp(middle), math.exp(low - more), math.exp(high + more), effective=(a.effective, b.effective))


def of_figures(first: Sequence[float], second: Sequence[float], error: float, least: float = 0.0) -> Interval:
    """The ratio from one logarithm a run, at least three in all. `least`: a variance that a run has for sure."""
    import numpy as np
    from scipy import stats

    na, nb = len(first), len(second)
    freedom = na + nb - 2
    squares = sum(float(((np.asarray(side) - np.mean(side)) ** 2).sum()) for side in (first, second))
    scatter = math.sqrt(max(squares / freedom, least) * (1 / na + 1 / nb))
    middle = float(np.mean(second) - np.mean(first))
    half = float(stats.t.ppf(1 - error / 2, freedom)) * scatter
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), freedom=freedom)


def of_uncertain(first: tuple[float, float], second: tuple[float, float], error: float) -> Interval:
    """The ratio of two figures that come with a standard error each: (value, error), in the same unit."""
    from scipy import stats

    (a, ea), (b, eb) = first, second
    middle, half = math.log(b / a), float(stats.norm.ppf(1 - error / 2)) * math.hypot(ea / a, eb / b)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def times_more(found: Interval, tolerance: float, runs: tuple[int, int], error: float) -> float | None:
    """How many times as many samples (one run a side) or runs would decide, if the ratio stays what it is. None: more than 100 times."""
    from scipy import stats

    edge = math.log1p(tolerance)
    room = min(abs(math.log(found.ratio) - edge), abs(math.log(found.ratio) + edge))
    if room == 0:
        return None
    if found.freedom is None:
        needed = (found.half / room) ** 2
        return needed if needed <= 100 else None
    now = float(stats.t.ppf(1 - error / 2, found.freedom))
    for more in (1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100):
        then = float(stats.t.ppf(1 - error / 2, max(1.0, sum(runs) * more - 2)))
        if found.half * then / (now * math.sqrt(more)) < room:
            return more
    return None
