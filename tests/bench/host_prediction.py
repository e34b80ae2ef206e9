"""How well the calibrated cost law predicts whole models on this machine: none of them was used to calibrate it.

    python tests/bench/host_prediction.py [--out samples.json] [--runtime litert]

Needs `edgesdk calibrate` first (it is run when absent). Prints predicted, measured and the error a case, then the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgesdk.calibrate import calibrate
from edgesdk.devices import load_device
from edgesdk.graph import trace
from edgesdk.intake import load_model
from edgesdk.lower import lower
from edgesdk.model import Method, ModelSpec
from edgesdk.plan.cost import method_costs, total
from edgesdk.plan.options import options
from edgesdk.plan.rates import efficiency_for
from edgesdk.runner import installed, open_program

MODELS = Path(__file__).parents[2].parent / "shared" / "data" / "models"


def mlp() -> ModelSpec:
    """784 → 300 → 120 → 10."""
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 120), nn.ReLU(), nn.Linear(120, 10))
    return _spec("mlp", net, (1, 784))


def wide_mlp() -> ModelSpec:
    """A batch of 16 rows through 512 → 768 → 512."""
    return _spec("wide-mlp", nn.Sequential(nn.Linear(512, 768), nn.ReLU(), nn.Linear(768, 512)), (16, 512))


def small_cnn() -> ModelSpec:
    """A separable CNN on 3 × 64 × 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU()]
    for a, b, stride in ((24, 48, 1), (48, 96, 2), (96, 96, 1), (96, 192, 2)):
        layers += [nn.Conv2d(a, a, 3, stride, 1, groups=a), nn.ReLU(), nn.Conv2d(a, b, 1), nn.ReLU()]
    return _spec("separable-cnn", nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(192, 20)), (1, 3, 64, 64))


def _spec(name: str, net: nn.Module, shape: tuple[int, ...]) -> ModelSpec:
    torch.manual_seed(1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    inputs = (torch.randn(shape),)
    method = Method(net.eval().requires_grad_(False), inputs)
    return ModelSpec(name=name, digest=f"bench-{name}-1", methods={"forward": method}, calibration=lambda _: [inputs])


def cases(runtimes: list[str]) -> list[tuple[str, ModelSpec, str, str]]:
    """(label, model, runtime, precision)"""
    found = []
    if "litert" in runtimes:
        for path in sorted(MODELS.glob("*.tflite")):
            spec = load_model(str(path))
            kinds = ["as-is"] if "int8" in path.stem else ["fp32", "int8-dynamic"]
            found += [(path.stem, spec, "litert", p) for p in kinds]
    for spec in (load_model("example:digits-cnn"), mlp(), wide_mlp(), small_cnn()):
        for runtime in runtimes:
            kinds = ["fp32", "int8-static"] + (["int8-dynamic"] if "mlp" in spec.name else [])
            kinds += ["int4-g32"] if spec.name == "wide-mlp" else []
            found += [(spec.name, spec, runtime, p) for p in kinds if p != "int4-g32" or runtime == "executorch"]
    return found


def run_case(spec: ModelSpec, runtime: str, precision: str, seconds: float) -> dict[str, Any]:
    """Predicted and measured seconds of one call, with the raw samples."""
    device, graph = load_device("host"), trace(spec)
    method = graph.methods[0]
    law = efficiency_for(device, device.units[0], runtime, 1)
    offered = {u.name: options(u, method.name, runtime, device, source=graph.source) for u in method.units}
    takes = {name: precision if precision in kinds else "fp32" for name, kinds in offered.items()}
    if precision == "as-is":
        takes = {u.name: "as-is" for u in method.units}
    costs, call = method_costs(method, lambda u: takes[u.name], device, runtime, 1, law)
    estimate = total(list(costs.values()), law, call)
    choice = {(method.name, u.name): takes[u.name] for u in method.units if u.weight_elements}
    with tempfile.NamedTemporaryFile() as file:
        file.write(lower(spec, runtime, {} if precision in ("fp32", "as-is") else choice))
        file.flush()
        runner = open_program(file.name, runtime, 1)
        arrays = [torch.randn(shape).numpy() for shape, _ in runner.inputs(runner.methods[0])]
        samples = sample(lambda: runner.run(runner.methods[0], arrays), seconds)
    return {
        "predicted_s": estimate.value, "low_s": estimate.low, "high_s": estimate.high,
        "measured_s": statistics.median(samples), "samples_s": samples,
    }  # fmt: skip


def sample(call: Any, seconds: float) -> list[float]:
    """Raw call times of the calmest of five stretches (the one with the least median)."""
    stretches = []
    for _ in range(5):
        for _ in range(3):
            call()
        times: list[float] = []
        end = time.perf_counter() + seconds / 5
        while len(times) < 11 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        stretches.append(times)
    return min(stretches, key=statistics.median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write every raw sample here, as JSON")
    parser.add_argument("--runtime", choices=("litert", "executorch"))
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on a case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = [r for r in ("litert", "executorch") if r in installed() and args.runtime in (None, r)]
    device = load_device("host")
    for runtime in here:
        if efficiency_for(device, device.units[0], runtime, 1).origin != "calibrated":
            calibrate(runtime=runtime)
    rows = []
    for label, spec, runtime, precision in cases(here):
        row = {"model": label, "runtime": runtime, "precision": precision, **run_case(spec, runtime, precision, args.seconds)}
        row["error"] = abs(row["predicted_s"] - row["measured_s"]) / row["measured_s"]
        row["inside"] = row["low_s"] <= row["measured_s"] <= row["high_s"]
        rows.append(row)
        sys.stdout.write(
            f"{label:28} {runtime:11} {precision:13} predicted {row['predicted_s'] * 1e6:9.1f} µs"
            f"  measured {row['measured_s'] * 1e6:9.1f} µs  error {row['error']:6.1%}  {'inside' if row['inside'] else 'outside'}\n"
        )
        sys.stdout.flush()
    errors = [row["error"] for row in rows]
    inside = sum(row["inside"] for row in rows) / len(rows)
    sys.stdout.write(f"{len(rows)} held-out cases: median error {statistics.median(errors):.1%}, inside the 80% interval {inside:.0%}\n")
    if args.out:
        Path(args.out).write_text(json.dumps({"kind": "host-prediction", "schema_version": 1, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
