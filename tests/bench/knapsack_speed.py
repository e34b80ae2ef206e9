"""How fast, and how near to the best, options are chosen under several budgets at once: 196 units of 10 options.

    python tests/bench/knapsack_speed.py [--instances 20] [--budgets 3] [--highs] [--out samples.json]

Kinds of instances: `rate` (loss falls by 4 a bit, as with quantized weights; latencies of units differ), `forms` (stored bytes by code, memory and time
by one of three forms), `uncorrelated`, `weak` and `strong` (loss follows the mean of the uses), `inverse` (loss is the mean of 1/use). Times are seconds
of this process; each gap is certified by the answer itself. `--highs` solves each instance with HiGHS alone to the same gap, for the ratio of times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from edgesdk.compress.knapsack import choose

KINDS = ("rate", "forms", "uncorrelated", "weak", "strong", "inverse")


def instance(kind: str, seed: int, budgets: int, units: int = 196, options: int = 10) -> tuple[Any, Any, Any]:
    """Losses [units, options], uses [budgets, units, options] and limits [budgets], about half way between the least and what no budget asks for."""
    rng = np.random.default_rng([seed, budgets, KINDS.index(kind)])
    bits, size, shape = np.linspace(2, 8, options), np.exp(rng.normal(10, 1, units))[:, None], (units, options)
    base = np.exp(rng.normal(0, 2, units))[:, None] * 4.0**-bits
    if kind == "rate":
        loss = base * np.exp(rng.normal(0, 0.3, shape))
        more = [size * rng.uniform(0.3, 3, (units, 1)) * rng.uniform(0.5, 1, shape) * (1 + bits / 8) for _ in range(budgets - 1)]
        use = np.stack([size * bits / 8, *more])
    elif kind == "forms":
        form = rng.integers(0, 3, shape)
        loss = base * (1 + 0.3 * (2 - form)) * np.exp(rng.normal(0, 0.1, shape))
        times = [size * rng.uniform(0.5, 2, (units, 1)) * np.array([0.4, 0.5, 1.0])[form] for _ in range(budgets)]
        use = np.stack([size * bits / 8, size * np.array([0.5625, 1, 4])[form], *times][:budgets])
    elif kind == "uncorrelated":
        loss, use = rng.uniform(0, 1, shape), rng.uniform(0, 1, (budgets, *shape))
    else:
        use = rng.uniform(0.1, 1, (budgets, *shape))
        mean = 1.2 - use.mean(0)
        loss = (1 / use).mean(0) if kind == "inverse" else np.maximum(mean + rng.uniform(-0.1, 0.1, shape), 0) if kind == "weak" else mean
    rows = np.arange(units)
    least, free = use.min(2).sum(1), use[:, rows, loss.argmin(1)].sum(1)
    limits = least + 0.5 * (free - least) * rng.uniform(0.8, 1.2, budgets)
    joint = use[:, rows, (use / limits[:, None, None]).sum(0).argmin(1)].sum(1)  # a choice that holds all budgets somehow
    return loss, use, np.maximum(limits, joint + 0.3 * np.abs(free - joint))


def highs(loss: Any, use: Any, limits: Any, gap: float = 1e-3) -> float:
    """Seconds of the plain integer program, given up after a minute."""
    units, options = loss.shape
    start = time.process_time()
    one = csr_matrix((np.ones(loss.size), (np.repeat(np.arange(units), options), np.arange(loss.size))))
    rows = use.reshape(len(use), -1) / limits[:, None]
    milp(
        loss.ravel() / loss.max(), constraints=[LinearConstraint(one, 1, 1), LinearConstraint(rows, -np.inf, 1)], bounds=Bounds(0, 1),
        integrality=np.ones(loss.size), options={"mip_rel_gap": gap, "time_limit": 60.0},
    )  # fmt: skip
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--budgets", type=int, default=3)
    parser.add_argument("--highs", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for count in (1, 2, args.budgets):  # loops are compiled at their first call
        choose(*instance("rate", 10**6, count))
    samples: list[dict[str, Any]] = []
    write = sys.stdout.write
    write(
        f"{'kind':<13} {'median':>9} {'p90':>9} {'most':>9} {'worst gap':>10} {'by HiGHS':>9}"
        + ("   HiGHS alone" if args.highs else "")
        + "\n"
    )
    for kind in KINDS:
        mine = []
        for seed in range(args.instances):
            problem = instance(kind, seed, args.budgets)
            start = time.process_time()
            found = choose(*problem)
            row = {"kind": kind, "seed": seed, "seconds": time.process_time() - start, "gap": found.gap, "by": found.by}
            mine.append(row | ({"highs_s": highs(*problem)} if args.highs else {}))
        samples += mine
        times = sorted(r["seconds"] * 1e3 for r in mine)
        line = f"{kind:<13} {statistics.median(times):>6.1f} ms {times[int(0.9 * len(times))]:>6.0f} ms {times[-1]:>6.0f} ms"
        line += f" {max(r['gap'] for r in mine):>10.2e} {sum(r['by'] == 'HiGHS' for r in mine):>6} of {len(mine)}"
        if args.highs:
            line += f"   {statistics.median(r['highs_s'] / r['seconds'] for r in mine):.0f}x the time (median)"
        write(line + "\n")
    whole = [r["seconds"] * 1e3 for r in samples]
    write(f"all           {statistics.median(whole):>6.1f} ms, {sum(t < 50 for t in whole)} of {len(whole)} under 50 ms\n")
    if args.out:
        args.out.write_text(json.dumps({"budgets": args.budgets, "samples": samples}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
