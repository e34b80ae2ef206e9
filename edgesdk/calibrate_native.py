"""Calibration of our own kernels: small sequence models as native programs, timed whole, and the same cost law fitted to all of them at once.

One rate for each precision of matrices, one for products of activations, one for everything else (which the kernels do beside the rounding
of inputs), and what a call costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from edgesdk.calibrate import LEAST_SD, PASSES, WHOLE_SD, Sample, Step, predict
from edgesdk.calibrate_places import PROGRAM, Place
from edgesdk.efficiency import Efficiency, OpRate

if TYPE_CHECKING:
    from edgesdk.device import ComputeUnit, DeviceProfile
    from edgesdk.model import ModelSpec

PRECISIONS = ("fp32", "int8-dynamic", "int4-g32")
SIZES: tuple[tuple[str, int, int, int, int, int], ...] = (
    ("encoder-decoder", 64, 1, 128, 16, 32), ("decoder-only", 96, 2, 256, 48, 64), ("encoder-decoder", 256, 2, 768, 64, 64),
    ("decoder-only", 512, 3, 1536, 64, 256), ("decoder-only", 1024, 2, 3072, 128, 512),
)  # fmt: skip
"""Layout, width, layers, width of the feed-forward, tokens of a source or prompt, slots of a cache."""


def specs() -> list[ModelSpec]:
    """Models of random weights, seeded."""
    import torch

    from edgesdk.sequence.config import SequenceConfig, Stack
    from edgesdk.sequence.export import sequence_spec
    from edgesdk.sequence.model import SequenceModel

    torch.manual_seed(0)
    found = []
    for layout, dim, layers, ffn, source, slots in SIZES:
        stack = Stack(layers=layers, dim=dim, heads=max(2, dim // 64), kv_heads=max(1, dim // 128), head=min(64, dim // 2), ffn=ffn)
        config = SequenceConfig.model_validate(
            {"layout": layout, "vocab": 8 * dim, "encoder": stack if layout == "encoder-decoder" else None, "decoder": stack}
        )
        name = f"calibration-{layout}-{dim}"
        found.append(sequence_spec(SequenceModel(config).eval(), name=name, source_lengths=(source,), cache_lengths=(slots,), start=(2,)))
    return found


def measure(profile: DeviceProfile, threads: int, step: Step, place: Place, precisions: Sequence[str] = PRECISIONS) -> list[Sample]:
    """Every method of every model in each precision."""
    from edgesdk.graph import trace
    from edgesdk.kernels.cpu import host_targets, target_of
    from edgesdk.plan.harm import one_thread

    target = host_targets()[0] if place.here else target_of(_compute(profile).isa)
    opened = []
    with one_thread():
        every = specs()
        for i, spec in enumerate(every):
            step(f"packing {spec.name}", 0.6 * i / len(every))
            graph = trace(spec)
            for precision in (p for p in precisions if p in PRECISIONS):
                choice = {(m.name, u.name): precision for m in graph.methods for u in m.units if u.op == "linear" and u.weight_elements}
                inputs = {m.name: [t.numpy() for t in spec.methods[m.name].example_inputs] for m in graph.methods}
                opened.append((spec, graph, precision, choice, place.open(_files(spec, target, choice), "native", threads, inputs)))
        best: dict[tuple[str, str, str], Sample] = {}
        for i, (turn, (spec, graph, precision, choice, timer)) in enumerate(place.turns(opened, PASSES)):
            step(f"timing {spec.name} ({turn + 1} of {PASSES})", 0.6 + 0.4 * i / (PASSES * len(opened)))
            for method in graph.methods:
                units = {u: p for (m, u), p in choice.items() if m == method.name}
                found = Sample(method, precision, units, timer(method.name, method.name, turn))
                key = (spec.name, method.name, precision)
                best[key] = min(found, best.get(key, found), key=lambda s: s.seconds)
    return list(best.values())


def _files(spec: ModelSpec, target: str, choice: Mapping[tuple[str, str], str]) -> dict[str, bytes]:
    """The program, and what a machine that compiles no kernels itself runs it with."""
    from edgesdk.native.lower import lower_native
    from edgesdk.native.shared import LIBRARY, shared_library

    program = lower_native(spec, f"native-{target}", choice)
    return {PROGRAM: program, **({LIBRARY: shared_library(program)} if target.startswith("arm") else {})}


def _compute(profile: DeviceProfile) -> ComputeUnit:
    return profile.unit(next(r.unit for r in profile.runtimes if r.name == "native"))


def fit(profile: DeviceProfile, version: str, threads: int, levels: dict[str, float], samples: Sequence[Sample]) -> Efficiency:
    """The law's parameters on log residuals, all samples at once."""
    import numpy as np
    from scipy.optimize import least_squares

    compute = _compute(profile)
    head: dict[str, Any] = {
        "device": profile.name, "runtime": "native", "runtime_version": version, "threads": threads, "origin": "calibrated",
        "bandwidth_bytes_per_s": levels, "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    start = np.log([v for _, _, first in _KINDS for v in first(compute)])
    measured = np.log([s.seconds for s in samples])

    def residuals(x: Any) -> Any:
        law = Efficiency(**head, rows=_rows(x, 0.1, len(samples)))
        predicted = [predict(s, profile, "native", law) for s in samples]
        return np.concatenate([np.log(predicted) - measured, 0.02 * (x - start)])  # a weak pull keeps what no sample tells near its start

    answer = least_squares(residuals, start, diff_step=np.full(start.size, 1e-3), max_nfev=60)
    left = residuals(answer.x)[: len(samples)]
    sd = max(LEAST_SD, math.sqrt(float(np.mean(left**2))))
    rows = _rows(answer.x, sd, len(samples))
    call = next(r.overhead_s for r in rows if r.op == "call")
    return Efficiency(**head, rows=rows, call_overhead_s=call, call_log_sd=math.hypot(WHOLE_SD, 0.5 * sd))


def _matrices(compute: ComputeUnit) -> tuple[float, float]:
    return 1e-6, 0.3 * max(compute.peak_ops_per_s.values()) / compute.cores


_KINDS: tuple[tuple[str, str, Any], ...] = (
    ("linear", "fp32", _matrices), ("linear", "int8-dynamic", _matrices), ("linear", "int4-g32", _matrices), ("matmul", "*", lambda compute: (1e-6, 1e10)),
    ("*", "*", lambda compute: (1e-7, 2e9)), ("call", "fp32", lambda compute: (5e-6, 5e-7)),
)  # fmt: skip
"""Operators, their precision, and where the fit begins: overhead in seconds, operations a second (of a call: seconds a tensor)."""


def _rows(x: Any, sd: float, n: int) -> tuple[OpRate, ...]:
    import numpy as np

    values = np.exp(np.clip(x, -32, 40))
    found = []
    for i, (op, precision, _) in enumerate(_KINDS):
        over, second = float(values[2 * i]), float(values[2 * i + 1])
        more = {"ops_per_s": 1e12, "per_tensor_s": second} if op == "call" else {"ops_per_s": second}
        found.append(OpRate(op=op, precision=precision, overhead_s=over, **more, log_sd=sd, n=n, source="calibrated here"))
    return tuple(found)
