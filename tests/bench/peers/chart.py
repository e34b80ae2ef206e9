"""The answer as a table, as JSON and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 4000
COUNTS = {
    "coded": "edgesdk as stored (entropy-coded) against the peers' integers entropy-coded by edgesdk's packer",
    "stored": "edgesdk as stored (entropy-coded) against the peers' own storage",
    "fixed": "nobody entropy-coded: edgesdk's fixed-rate bytes against the peers' own storage",
}


def size_of(point: Any, count: str) -> int:
    """The bytes that a point counts with: in the column `stored` only edgesdk is entropy-coded, as it ships."""
    coded = count == "coded" or (count == "stored" and point.contender == "edgesdk")
    return int(point.coded if coded else point.stored)


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a - b over paired cases with its 95% bootstrap interval."""
    d = a - b
    if not d.any():
        return 0.0, 0.0, 0.0
    rng = np.random.default_rng(0)
    values, counts = np.unique(d, return_counts=True)
    if len(values) <= 200:
        means = rng.multinomial(len(d), counts / len(d), DRAWS) @ values / len(d)
    else:
        means = np.array([d[rng.integers(0, len(d), len(d))].mean() for _ in range(DRAWS)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(d.mean()), float(low), float(high)


def versus(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Whether paired cases, higher is better, put edgesdk ahead: the interval of the mean difference is all on one side of 0."""
    mean, low, high = interval(ours, theirs)
    return {"edgesdk_is": "ahead" if low > 0 else "behind" if high < 0 else "level", "difference": mean, "low": low, "high": high}


def text(result: dict[str, Any]) -> str:
    """Tables of one model: quality and distance for every way of counting, then what did not run."""
    parts = [f"## {result['model']} ({result['weights']} weights; {result['metric']} over {result['cases']})\n"]
    for count, meaning in COUNTS.items():
        for figure, higher in (("quality", True), ("distance", False)):
            what = f"{result['metric']}, float32 {result['float']:.4f}" if higher else "distance of the outputs from float32's"
            parts.append(f"### {what}; {meaning}\n\n{_table(result['rows'], count, figure, higher)}")
    failed: dict[str, list[str]] = {}
    for who, why in sorted(result["reasons"].items()):
        failed.setdefault(why, []).append(who)
    return "\n".join(parts) + "".join(f"\n- did not run: {', '.join(who)}: {why}" for why, who in failed.items()) + "\n"


def _table(rows: list[dict[str, Any]], count: str, figure: str, higher: bool) -> str:
    contenders, budgets = (list(dict.fromkeys(r[k] for r in rows)) for k in ("contender", "budget"))
    lines = ["| bits | " + " | ".join(contenders) + " | edgesdk against the best peer |", "|---" * (len(contenders) + 2) + "|"]
    form = "{:.4f} ({:.2f})" if higher else "{:.2e} ({:.2f})"
    for budget in budgets:
        here = {r["contender"]: r for r in rows if r["budget"] == budget and r["count"] == count}
        cells = ["–" if here[c]["quality"] is None else form.format(here[c][figure], here[c]["bits"]) for c in contenders]
        lines.append(f"| {budget:g} | " + " | ".join(cells) + f" | {_against(here, figure, higher)} |")
    return "\n".join(lines) + "\n"


def _against(here: dict[str, dict[str, Any]], figure: str, higher: bool) -> str:
    """The verdict against the peer that did best on the held-out cases."""
    rivals = [r for r in here.values() if f"{figure}_verdict" in r]
    if not rivals:
        return "no peer is this small" if here["edgesdk"]["quality"] is not None else "edgesdk has nothing this small"
    best = max(rivals, key=lambda r: r[figure] if higher else -r[figure])
    found, form = best[f"{figure}_verdict"], "{:+.4f} [{:+.4f}, {:+.4f}]" if higher else "{:+.1e} [{:+.1e}, {:+.1e}]"
    return f"**{found['edgesdk_is']}** {form.format(found['difference'], found['low'], found['high'])} ({best['contender']})"


def summary(results: list[dict[str, Any]]) -> str:
    """One line a model and way of counting: the verdict on quality / on distance at every budget, against the best peer of that budget."""
    budgets = sorted({r["budget"] for result in results for r in result["rows"]}, reverse=True)
    lines = ["| model | counted | " + " | ".join(f"{b:g}" for b in budgets) + " |", "|---" * (len(budgets) + 2) + "|"]
    for result in results:
        for count in COUNTS:
            cells = []
            for budget in budgets:
                here = {r["contender"]: r for r in result["rows"] if r["budget"] == budget and r["count"] == count}
                both = [
                    _against(here, figure, higher).split(" ")[0].strip("*") for figure, higher in (("quality", True), ("distance", False))
                ]
                cells.append(
                    "" if not here else "no peer" if both[0] == "no" else "none of ours" if both[0] == "edgesdk" else " / ".join(both)
                )
            lines.append(f"| {result['model']} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(name: str, metric: str, reference: float, rows: list[dict[str, Any]], path: Path) -> None:
    """Quality against stored bits a weight, a line for every contender (the answer at each budget)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, count in zip(axes, ("coded", "stored"), strict=True):
        contenders = list(dict.fromkeys(r["contender"] for r in rows))
        for contender in contenders:
            found = sorted(
                {
                    (r["bits"], r["quality"])
                    for r in rows
                    if r["contender"] == contender and r["count"] == count and r["quality"] is not None
                }
            )
            if found:
                bold = contender == "edgesdk"
                axis.plot(
                    *zip(*found, strict=True),
                    marker="o",
                    markersize=4,
                    linewidth=2.5 if bold else 1,
                    zorder=3 if bold else 2,
                    label=contender,
                )
        axis.axhline(reference, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel("bits a weight, all weight matrices")
        axis.set_title("peers entropy-coded by us" if count == "coded" else "peers in their own storage", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{name} (dashed: float32)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
