"""How well the calibrated cost law predicts whole models on this machine: none of them was used to calibrate it.

    python tests/bench/host_prediction.py [--threads 2] [--out samples.json] [--runtime litert] [--seed 2026] [--named]

The models are drawn from a seed (tests/bench/seeded_models.py). 2026 is the frozen one: the cost law and the micro-programs were tuned
on others (7, 11), and nothing was changed after it was looked at. `--named` takes the MLPerf Tiny models and the built-in CNN instead.
Needs `edgesdk calibrate` first (it is run when absent; `--fresh` runs it in any case). Prints predicted, measured and the error a case,
then the median and the share inside the 80% interval, by runtime and in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgesdk.calibrate import calibrate
from edgesdk.devices import load_device
from edgesdk.graph import trace
from edgesdk.intake import load_model
from edgesdk.lower import lower
from edgesdk.model import ModelSpec
from edgesdk.plan.cost import method_costs, total
from edgesdk.plan.options import options
from edgesdk.plan.rates import efficiency_for
from edgesdk.runner import installed, open_program
from tests.bench.seeded_models import precisions, seeded_models

MODELS = Path(__file__).parents[2].parent / "shared" / "data" / "models"
FROZEN = 2026
COUNT = 5


def named(runtimes: list[str]) -> list[tuple[ModelSpec, str, str]]:
    """MLPerf Tiny's models as they come and quantized, and the built-in CNN: (model, runtime, precision)."""
    found = []
    if "litert" in runtimes:
        for path in sorted(MODELS.glob("*.tflite")):
            kinds = ["as-is"] if "int8" in path.stem else ["fp32", "int8-dynamic"]
            found += [(load_model(str(path)), "litert", p) for p in kinds]
    digits = load_model("example:digits-cnn")
    return found + [(digits, runtime, p) for runtime in runtimes for p in ("fp32", "int8-static")]


def seeded(runtimes: list[str], seed: int, count: int) -> list[tuple[ModelSpec, str, str]]:
    """(model, runtime, precision) of the models drawn from `seed`."""
    return [(spec, runtime, p) for spec in seeded_models(seed, count) for runtime in runtimes for p in precisions(spec, runtime)]


class Case:
    """One model at one precision on one runtime, lowered and opened."""

    def __init__(self, spec: ModelSpec, runtime: str, precision: str, threads: int, folder: Path) -> None:
        device, graph = load_device("host"), trace(spec)
        self.name, self.runtime, self.precision = spec.name, runtime, precision
        self.method = graph.methods[0]
        offered = {u.name: options(u, self.method.name, runtime, device, source=graph.source) for u in self.method.units}
        self.takes = {name: precision if precision in kinds else "fp32" for name, kinds in offered.items()}
        choice = {(self.method.name, u.name): self.takes[u.name] for u in self.method.units if u.weight_elements}
        path = folder / f"{spec.name}-{runtime}-{precision}"
        path.write_bytes(lower(spec, runtime, {k: p for k, p in choice.items() if p not in ("fp32", "as-is")}))
        self.runner = open_program(str(path), runtime, threads)
        self.arrays = [torch.randn(shape).numpy() for shape, _ in self.runner.inputs(self.runner.methods[0])]
        self.stretches: list[list[float]] = []

    def run(self) -> None:
        """One call."""
        self.runner.run(self.runner.methods[0], self.arrays)

    def row(self, threads: int) -> dict[str, Any]:
        """Predicted and measured seconds of a call, with the raw samples of the calmest stretch."""
        device = load_device("host")
        law = efficiency_for(device, device.units[0], self.runtime, threads)
        costs, call = method_costs(self.method, lambda u: self.takes[u.name], device, self.runtime, threads, law)
        estimate = total(list(costs.values()), law, call)
        samples = min(self.stretches, key=statistics.median)
        measured = statistics.median(samples)
        return {
            "model": self.name, "runtime": self.runtime, "precision": self.precision, "threads": threads,
            "predicted_s": estimate.value, "low_s": estimate.low, "high_s": estimate.high, "measured_s": measured,
            "error": abs(estimate.value - measured) / measured, "inside": estimate.low <= measured <= estimate.high,
            "samples_s": samples, "stretch_medians_s": [statistics.median(s) for s in self.stretches],
        }  # fmt: skip


def stretch(call: Callable[[], Any], seconds: float) -> list[float]:
    """Raw times of the calls that fit in `seconds`; at least eleven."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 11 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def summary(rows: list[dict[str, Any]], what: str) -> str:
    """Median error, the share within 10% and 25%, and the share inside the 80% interval."""
    errors = [row["error"] for row in rows]
    shares = [sum(e <= limit for e in errors) / len(rows) for limit in (0.10, 0.25)]
    inside = sum(row["inside"] for row in rows) / len(rows)
    bias = statistics.median(row["predicted_s"] / row["measured_s"] for row in rows)
    return (
        f"{what}: {len(rows)} cases, median error {statistics.median(errors):.1%}, within 10% {shares[0]:.0%}, within 25% {shares[1]:.0%}, "
        f"inside the 80% interval {inside:.0%}, median predicted/measured {bias:.2f}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write every raw sample here, as JSON")
    parser.add_argument("--runtime", choices=("litert", "executorch"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=FROZEN)
    parser.add_argument("--count", type=int, default=COUNT, help="models drawn from the seed")
    parser.add_argument("--named", action="store_true", help="MLPerf Tiny's models and the built-in CNN instead of seeded ones")
    parser.add_argument("--fresh", action="store_true", help="calibrate anew")
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on a case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = [r for r in ("litert", "executorch") if r in installed() and args.runtime in (None, r)]
    device = load_device("host")
    for runtime in here:
        if args.fresh or efficiency_for(device, device.units[0], runtime, args.threads).origin != "calibrated":
            calibrate(runtime=runtime, threads=args.threads)
    drawn = named(here) if args.named else seeded(here, args.seed, args.count)
    with tempfile.TemporaryDirectory() as folder:
        made = [Case(spec, runtime, precision, args.threads, Path(folder)) for spec, runtime, precision in drawn]
        for _ in range(5):  # stretches apart in time: a busy one spoils one of five
            for case in made:
                case.stretches.append(stretch(case.run, args.seconds / 5))
    rows = [case.row(args.threads) for case in made]
    for row in rows:
        sys.stdout.write(
            f"{row['model']:28} {row['runtime']:11} {row['precision']:13} predicted {row['predicted_s'] * 1e6:9.1f} µs"
            f"  measured {row['measured_s'] * 1e6:9.1f} µs  error {row['error']:6.1%}  {'inside' if row['inside'] else 'outside'}\n"
        )
    for runtime in here if len(here) > 1 else []:
        sys.stdout.write(summary([row for row in rows if row["runtime"] == runtime], runtime))
    what = "named" if args.named else f"seed {args.seed}"
    sys.stdout.write(summary(rows, f"held out ({what}), {args.threads} thread{'s' if args.threads > 1 else ''}"))
    if args.out:
        Path(args.out).write_text(json.dumps({"kind": "host-prediction", "schema_version": 1, "seed": args.seed, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
