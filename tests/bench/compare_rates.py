"""How often `edgesdk compare` is wrong and how often it cannot tell, on series whose effect is known. Prints the tables of docs/reports.md.

    python -m tests.bench.compare_rates [SEEDS]

A factor on all times is a shift of the logarithm, and so is what it does to an interval: the intervals of two sides that are alike
give the verdicts for every effect.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgesdk.compare import compare
from edgesdk.interval import Interval, of_runs
from tests.reports import report_of

Series = Callable[[np.random.Generator, int], NDArray[np.float64]]
EFFECTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.10)
TOLERANCE = 0.03
ERROR = 0.05


def chain(rng: np.random.Generator, n: int, one: float) -> NDArray[np.float64]:
    """A first-order process of unit variance, `one` the correlation of neighbours."""
    steps = rng.normal(0, 1, n)
    x = np.empty(n)
    x[0] = steps[0]
    for i in range(1, n):
        x[i] = one * x[i - 1] + np.sqrt(1 - one**2) * steps[i]
    return x


def modes(rng: np.random.Generator, n: int, change: float) -> NDArray[np.float64]:
    """0 or 1, changing with the chance `change` at each sample."""
    return (rng.integers(2) + np.cumsum(rng.random(n) < change)) % 2.0


KINDS: dict[str, Series] = {  # logarithms of times; spreads are those of real programs on quiet and on busy boards
    "normal 5%": lambda r, n: np.log(np.maximum(0.5, r.normal(1, 0.05, n))),
    "log-normal 20%": lambda r, n: r.normal(0, 0.2, n),
    "heavy tail": lambda r, n: np.log1p(0.03 * np.abs(r.standard_t(1.5, n))),
    "bimodal, outliers": lambda r, n: r.normal(0, 0.01, n) + 0.08 * (r.random(n) < 0.4) + (r.random(n) < 0.03) * r.exponential(1, n),
    "clock of 1%": lambda r, n: np.log(np.round(100 * np.exp(r.normal(0.3, 0.01, n)))),
    "AR(1) 0.5": lambda r, n: 0.05 * chain(r, n, 0.5),
    "AR(1) 0.9": lambda r, n: 0.05 * chain(r, n, 0.9),
    "drift, alike": lambda r, n: np.linspace(0, 0.1, n) + r.normal(0, 0.02, n),
    "drift, each its own": lambda r, n: np.linspace(0, r.normal(0, 0.1), n) + r.normal(0, 0.02, n),
    "modes that switch": lambda r, n: 0.08 * modes(r, n, 0.1) + r.normal(0, 0.01, n),
    "offset 2% a run": lambda r, n: r.normal(0, 0.02) + r.normal(0, 0.02, n),
}


def intervals(kind: str, n: int, runs: int, share: float, seeds: int) -> list[Interval]:
    """Of two sides that are alike."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, n, runs])
        a, b = ([np.exp(KINDS[kind](rng, n)).tolist() for _ in range(runs)] for _ in range(2))
        found.append(of_runs(a, b, share, ERROR))
    return found


def rates(found: list[Interval], effect: float, tolerance: float) -> dict[str, float]:
    """Shares of verdicts with the second side slower by `effect`."""
    low, high = (np.array([getattr(i, side) * (1 + effect) for i in found]) for side in ("low", "high"))
    edge = 1 + tolerance
    slower, faster = low > edge, high < 1 / edge
    same = (low >= 1 / edge) & (high <= edge)
    return {"slower": slower.mean(), "faster": faster.mean(), "same": same.mean(), "cannot tell": 1 - (slower | faster | same).mean()}


def main(seeds: int) -> None:
    """Write the tables: shares in per cent."""
    say(f"{seeds} seeds. False: faster or slower with no effect and no tolerance. Then slower / same with a tolerance of {TOLERANCE:.0%}.")
    heads = " | ".join(f"{e:.0%}" for e in EFFECTS)
    for share, sizes in ((0.5, (20, 50, 200, 1000)), (0.9, (50, 200, 1000))):
        say(f"\n| p{share * 100:.0f}, one run a side | samples | false | {heads} |\n|---|---|---|{'---|' * len(EFFECTS)}")
        for kind in KINDS:
            for n in sizes:
                say(line(kind, n, intervals(kind, n, 1, share, seeds)))
    say(f"\n| p50, runs of 50 samples | runs a side | false | {heads} |\n|---|---|---|{'---|' * len(EFFECTS)}")
    for kind in KINDS:
        for runs in (2, 3, 5, 10):
            say(line(kind, runs, intervals(kind, 50, runs, 0.5, seeds)))
    say("\n| four methods, p50 and p90, 100 samples | one run a side | three |\n|---|---|---|")
    for kind in KINDS:
        say(f"| {kind} | {100 * family(kind, 1, seeds):.1f} | {100 * family(kind, 3, seeds):.1f} |")


def family(kind: str, runs: int, seeds: int) -> float:
    """Share of whole comparisons of four methods, p50 and p90 of each, that call anything faster or slower where nothing is."""
    wrong = 0
    for seed in range(seeds):
        rng = np.random.default_rng([seed, runs, 4])
        sides = [[report_of({m: np.exp(KINDS[kind](rng, 100)).tolist() for m in "abcd"}) for _ in range(runs)] for _ in range(2)]
        wrong += any(r.verdict in ("slower", "faster") for r in compare(*sides, tolerance=0.0).rows)
    return wrong / seeds


def line(kind: str, size: int, found: list[Interval]) -> str:
    none = rates(found, 0.0, 0.0)
    cells = [f"{100 * r['slower']:.0f} / {100 * r['same']:.0f}" for e in EFFECTS if (r := rates(found, e, TOLERANCE))]
    return f"| {kind} | {size} | {100 * (none['slower'] + none['faster']):.1f} | " + " | ".join(cells) + " |"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
