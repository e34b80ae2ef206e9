"""What each weight at each precision costs in quality.

Measured: one weight at a time is rounded, the outputs' divergence taken on calibration data; whole models at one precision are evaluated, and
that drop is shared out by squared divergence. Without `evaluate` the divergence itself stands for it; for a flatbuffer the weights' rounding error.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgesdk.native.formats import like
from edgesdk.noun import Noun, Part

if TYPE_CHECKING:
    from edgesdk.plan.subject import Subject

Step = Callable[[str, float], None]
PRECISIONS = ("int8-static", "int8-dynamic", "int8-weight-only", "int4-g32")
TIME_LIMIT_S = 60.0
"""Divergences that would take longer are replaced by the weights' rounding error."""


class HarmRow(Part):
    weight: str
    precision: str
    divergence: float  # relative output error with this weight alone at this precision
    harm: float  # share of the quality drop, 0..1; of the proxy where `kind` is not "evaluated"


class Harm(Noun):
    KIND: ClassVar[str] = "harm"

    model_digest: str
    kind: Literal["evaluated", "divergence", "rounding"]
    quality: float | None  # of the reference
    rows: tuple[HarmRow, ...]

    def of(self, weight: str, precision: str) -> float:
        precision = like(precision)
        return next((r.harm for r in self.rows if r.weight == weight and r.precision == precision), 0.0)

    def table(self) -> dict[tuple[str, str], float]:
        return {(r.weight, r.precision): r.harm for r in self.rows}


class Quality(Noun):
    KIND: ClassVar[str] = "quality"

    value: float


def harm_of(subject: Subject, step: Step) -> Harm:
    """The harm table of a model, kept in the cache by its content."""
    from edgesdk import __version__
    from edgesdk.cache import cached

    return cached("harm", f"{subject.facts.model_digest[:32]}-{__version__}", Harm, lambda: _measure(subject, step))


def quality_of(subject: Subject, choice: Mapping[str, str], step: Step) -> float | None:
    """Evaluated quality of the fake-quantized model (weight → precision), kept in the cache; None where the model has no `evaluate`."""
    from edgesdk import __version__
    from edgesdk.cache import cached

    if not subject.facts.has_evaluate or subject.graph.source != "torch":
        return None
    lowered = sorted((w, p) for w, p in choice.items() if p not in ("fp32", "as-is"))
    key = hashlib.sha256(json.dumps([subject.facts.model_digest, __version__, lowered]).encode()).hexdigest()[:40]

    def make() -> Quality:
        from edgesdk.plan.fake_quant import observe, quantized, run

        step(f"measuring {subject.facts.quality_name}" + (" of the rounded model" if lowered else ""), 0.5)
        spec, graph = subject.spec, subject.graph
        assert spec.evaluate is not None
        with one_thread(), quantized(spec, graph, choice, observe(spec, graph)):
            return Quality(value=float(spec.evaluate(run(spec))))

    return cached("quality", key, Quality, make).value


@contextmanager
def one_thread() -> Iterator[None]:
    """Small models run faster on one thread, and leave the machine to others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weights(subject: Subject) -> dict[str, Any]:
    return {name: unit for name, unit in subject.graph.weights().items() if unit.weight_elements}


def _allowed(unit: Any, precision: str) -> bool:
    if unit.op == "embedding":
        return precision == "int8-weight-only"
    return precision != "int4-g32" or (unit.op == "linear" and unit.cols % 32 == 0)


def _measure(subject: Subject, step: Step) -> Harm:
    digest = subject.facts.model_digest
    if subject.graph.source == "tflite":
        rows = _shared(_tflite_rounding(subject), None)
        return Harm(model_digest=digest, kind="rounding", quality=None, rows=rows)
    with one_thread():
        found = _divergences(subject, step)
    kind: Literal["divergence", "rounding"] = "divergence"
    if found is None:
        kind, found = "rounding", _torch_rounding(subject)
    quality = quality_of(subject, {}, step)
    if quality is None:
        return Harm(model_digest=digest, kind=kind, quality=None, rows=_shared(found, None))
    drops = {}
    for i, precision in enumerate(PRECISIONS):
        if precision == "int8-static" and (not subject.facts.has_calibration or subject.facts.layout != "plain"):
            continue
        step(f"measuring {subject.facts.quality_name} with every weight {precision}", 0.5 + 0.1 * i)
        value = quality_of(subject, {w: p for w, p in found if p == precision}, step)
        drops[precision] = max(0.0, quality - (value if value is not None else quality))
    return Harm(model_digest=digest, kind="evaluated", quality=quality, rows=_shared(found, drops))


def _shared(found: dict[tuple[str, str], float], drops: dict[str, float] | None) -> tuple[HarmRow, ...]:
    """A precision's whole drop, shared out by squared divergence; without drops, the root of the sum of squares stands for it."""
    rows = []
    for precision in PRECISIONS:
        mine = {w: d for (w, p), d in found.items() if p == precision}
        squares = sum(d * d for d in mine.values()) or 1.0
        whole = drops.get(precision, 0.0) if drops is not None else min(1.0, squares**0.5)
        rows += [HarmRow(weight=w, precision=precision, divergence=d, harm=whole * d * d / squares) for w, d in mine.items()]
    return tuple(rows)


def _divergences(subject: Subject, step: Step, cases: int = 4) -> dict[tuple[str, str], float] | None:
    """(weight, precision) → relative output error over all methods; None where it would take too long."""
    import torch

    from edgesdk.plan.fake_quant import observe, quantized, samples

    spec, graph = subject.spec, subject.graph
    wanted = [(w, p) for w, u in _weights(subject).items() for p in PRECISIONS if _allowed(u, p)]
    inputs = {m: samples(spec, m, cases) for m in spec.methods}

    def outputs() -> torch.Tensor:
        parts = []
        with torch.no_grad():
            for method, lists in inputs.items():
                for sample in lists:
                    out = spec.methods[method].module(*sample)
                    parts += [o.double().flatten() for o in (out if isinstance(out, tuple | list) else (out,)) if o.is_floating_point()]
        return torch.cat([part.clamp(-1e3, 1e3) for part in parts])

    start = time.perf_counter()
    reference = outputs()
    if (time.perf_counter() - start) * len(wanted) > TIME_LIMIT_S:
        return None
    ranges, norm = observe(spec, graph), float(reference.norm()) or 1.0
    found = {}
    for i, (weight, precision) in enumerate(wanted):
        step(f"sensitivity of {subject.facts.name}", 0.1 + 0.4 * i / len(wanted))
        with quantized(spec, graph, {weight: precision}, ranges):
            found[weight, precision] = float((outputs() - reference).norm()) / norm
    return found


def _torch_rounding(subject: Subject) -> dict[tuple[str, str], float]:
    from edgesdk.plan.fake_quant import round_weight

    found = {}
    units = _weights(subject)
    for method in subject.spec.methods.values():
        for name, parameter in method.module.named_parameters(remove_duplicate=False):
            if name in units and parameter.dim() >= 2:
                for p in PRECISIONS:
                    if _allowed(units[name], p):
                        found[name, p] = float(
                            (round_weight(parameter.data, p) - parameter.data).norm() / parameter.data.norm().clamp_min(1e-12)
                        )
    return _averaged(found)


def _averaged(found: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Rounding errors scaled so that the root of the sum of squares of a precision is their mean: errors of layers do not add up to more."""
    answer = {}
    for precision in PRECISIONS:
        mine = {k: v for k, v in found.items() if k[1] == precision}
        scale = 1.0 / max(1, len(mine)) ** 0.5
        answer.update({k: v * scale for k, v in mine.items()})
    return answer


def _tflite_rounding(subject: Subject) -> dict[tuple[str, str], float]:
    """Relative rounding error of each float weight of a flatbuffer."""
    import numpy as np

    from edgesdk.graph.tflite_read import Table

    assert subject.spec.flatbuffer is not None
    data = subject.spec.flatbuffer.read_bytes()
    model = Table(data, struct.unpack_from("<I", data, 0)[0])
    buffers, units, found = model.tables(4), _weights(subject), {}
    for tensor in (t for graph in model.tables(2) for t in graph.tables(0)):
        unit = units.get(tensor.text(3))
        if unit is None or unit.weight_dtype != "float32":
            continue
        start, count = buffers[tensor.number(2, "<I")]._vector(0)
        weight = np.frombuffer(data, np.float32, count // 4, start)
        last = unit.op == "depthwise_conv2d"
        flat = weight.reshape(-1, unit.rows).T if last else weight.reshape(unit.rows, -1)
        scale = np.maximum(np.abs(flat).max(1, keepdims=True), 1e-12) / 127.0
        error = float(np.linalg.norm(np.round(flat / scale) * scale - flat) / max(float(np.linalg.norm(flat)), 1e-12))
        found.update({(unit.weight, p): error for p in PRECISIONS if p.startswith("int8") and _allowed(unit, p)})
    return _averaged(found)
