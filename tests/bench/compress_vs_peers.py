"""Quality at equal bytes: `edgesdk.compress` against the specialists, one run.

    python tests/bench/compress_vs_peers.py --quick                 two models, three budgets
    python tests/bench/compress_vs_peers.py --setup --out FOLDER     everything; installs the peers (CPU builds) into the cache folder first

Every contender gets the same float weights and the same calibration inputs. It gives back dequantized weights and the bytes it stores for every
weight matrix (scales, zero points, tables, indices); all of them are put into the same float model and scored in one place. At every budget each
contender is represented by the setting of least calibration loss among those that fit: held-out cases choose nothing.
Finished work is kept in `--cache` by content, so a run goes on where one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peers import chart
from peers.points import Point, Store, environment, exact, fetch, ours, run_peer, score, silence
from peers.subjects import SUBJECTS, Subject
from peers.tools import PEERS

BUDGETS = (8.0, 6.0, 4.5, 4.0, 3.5, 3.0, 2.5)
QUICK = (4.5, 3.5, 3.0)
SLACK = 1.01  # a budget is met within a hundredth
START = time.monotonic()


def say(text: str) -> None:
    sys.stderr.write(f"[{time.monotonic() - START:6.0f} s] {text}\n")
    sys.stderr.flush()


def chosen(store: Store, subject: Subject, points: list[Point], budget: float, count: str) -> Point | None:
    """The point of least calibration loss whose bytes fit."""
    limit = budget * SLACK * subject.elements / 8
    for point in sorted((p for p in points if not p.error), key=lambda p: p.loss):
        near = 1.06 if count == "coded" and not point.counted else 1  # the packer may write a little less than the plain entropy
        if chart.size_of(point, count) <= limit * near:
            if count == "coded":
                exact(store, subject, point)
            if chart.size_of(point, count) <= limit:
                return point
    return None


def compare(store: Store, subject: Subject, found: dict[str, list[Point]], budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row for every budget, way of counting and contender."""
    rows = []
    for count in chart.COUNTS:
        for budget in budgets:
            best = {name: chosen(store, subject, points, budget, count) for name, points in found.items()}
            us = best["edgesdk"]
            for name, point in best.items():
                row: dict[str, Any] = {"count": count, "budget": budget, "contender": name, "quality": None, "bits": None, "setting": ""}
                if point is None:
                    reasons = {p.error for p in found[name] if p.error}
                    row["reason"] = sorted(reasons)[0] if reasons and all(p.error for p in found[name]) else "nothing of it is this small"
                else:
                    cases, far = score(store, subject, point)
                    row |= {
                        "quality": float(cases.mean()),
                        "distance": float(far.mean()),
                        "bits": 8 * chart.size_of(point, count) / subject.elements,
                        "setting": point.label(),
                    }
                    row |= {"loss": point.loss, "bytes": chart.size_of(point, count)}
                    if us is not None and name != "edgesdk":
                        our_cases, our_far = score(store, subject, us)
                        row |= {"quality_verdict": chart.versus(our_cases, cases), "distance_verdict": chart.versus(-our_far, -far)}
                rows.append(row)
    return rows


def bench(store: Store, subject: Subject, options: argparse.Namespace, budgets: tuple[float, ...]) -> dict[str, Any]:
    with silence():
        reference = float(subject.scores({})[0].mean())
    found = {"edgesdk": ours(store, subject, budgets, say)}
    reasons = {f"edgesdk {p.label()}": p.error for p in found["edgesdk"] if p.error}
    for peer in PEERS:
        if options.peers and not any(p in peer.name for p in options.peers.split(",")):
            continue
        python, why = environment(store, peer, options.setup, say)
        found[peer.name] = run_peer(store, subject, peer, python, options.quick, say)
        for point in found[peer.name]:
            if point.error:
                reasons[f"{peer.name} {point.label()}"] = why or point.error
    say(f"{subject.name}: scoring")
    rows = compare(store, subject, found, budgets)
    arrays = ("scores", "distances")
    points = [{k: v.tolist() if k in arrays and v is not None else v for k, v in p.__dict__.items()} for ps in found.values() for p in ps]
    return {
        "model": subject.name, "weights": subject.elements, "metric": subject.metric, "cases": subject.cases, "float": reference, "rows": rows,
        "reasons": reasons, "points": points,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer settings a peer; digits and normalizer at three budgets where nothing else is said"
    )
    parser.add_argument("--budgets", default="", help="bits a weight, comma separated")
    parser.add_argument("--setup", action="store_true", help="install the peers' environments into the cache folder (pip)")
    parser.add_argument("--models", default="", help="comma separated; all by default")
    parser.add_argument("--peers", default="", help="comma separated parts of names; all by default")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "edgesdk-bench", help="where finished work and environments are kept"
    )
    parser.add_argument("--out", type=Path, default=Path("compress-vs-peers"), help="folder of the table, the JSON and the plots")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("EDGESDK_BENCH_EXTRAS", str(options.cache / "extras"))
    names = options.models.split(",") if options.models else ["digits-cnn", "normalizer"] if options.quick else list(SUBJECTS)
    budgets, store = (
        tuple(map(float, options.budgets.split(","))) if options.budgets else QUICK if options.quick else BUDGETS,
        Store(options.cache),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.setup:
        fetch(options.cache / "extras", say)
    unknown = [n for n in names if n not in SUBJECTS]
    if unknown:
        parser.error(f"unknown model {unknown[0]}: there are {', '.join(SUBJECTS)}")
    for name in names:
        try:
            subject = SUBJECTS[name]()
        except FileNotFoundError as error:
            say(f"{name} is left out: {error}")
            continue
        result = bench(store, subject, options, budgets)
        (options.out / f"{name}.json").write_text(json.dumps(result))
        chart.plot(name, subject.metric, result["float"], result["rows"], options.out / f"{name}.png")
        text = chart.text(result)
        (options.out / f"{name}.md").write_text(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    results = [json.loads(path.read_text()) for name in SUBJECTS if (path := options.out / f"{name}.json").exists()]
    whole = chart.summary(results)
    (options.out / "summary.md").write_text(whole)
    sys.stdout.write(whole)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
