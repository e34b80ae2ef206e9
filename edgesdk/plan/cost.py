"""Roofline per unit: overhead + max(compute, traffic at the level it streams from), with an interval from residuals.

Seconds, bytes. Peaks come from the device's profile, shares of them from an `Efficiency`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesdk.native.formats import bits_and_group, is_native, like, stored_bytes
from edgesdk.plan.types import Estimate

if TYPE_CHECKING:
    from edgesdk.device import ComputeUnit, DeviceProfile, Dtype
    from edgesdk.efficiency import Efficiency, OpRate
    from edgesdk.graph.types import MethodGraph, Unit

Z80 = 1.2816
"""Standard deviations on each side of an 80% interval."""
_DTYPE: dict[str, Dtype] = {"fp16": "fp16", "int8-static": "int8", "int8-dynamic": "int8", "int4-g32": "int8", "as-is": "int8"}
_CACHE_OVER_MEMORY = {"L1": 12.0, "L2": 5.0, "L3": 2.0}
"""Read bandwidth of a level over that of memory where nothing is known: typical of one Arm or x86 core."""


@dataclass(frozen=True)
class UnitCost:
    """Seconds a call with an 80% interval; `bound` is what the time goes to; `log_sd` its residual."""

    seconds: float
    low: float
    high: float
    bound: str  # "compute", "L1", "L2", "L3", "memory", "overhead"
    log_sd: float


def operations(unit: Unit) -> float:
    """2 × MACs, or the elements read and written where there are none."""
    return 2.0 * unit.macs if unit.macs else float(unit.in_elements + unit.out_elements)


TILE = 16
"""Output channels that XNNPACK's matrix kernels on x86 compute at a time, in float and in int8; those beyond a multiple are computed, too."""


def padding(unit: Unit, efficiency: Efficiency) -> float:
    """Operations that the kernels really do over those that count. 1 where the efficiency was not calibrated with it."""
    if efficiency.tile and unit.macs and unit.rows and unit.op in ("linear", "conv2d"):
        return -(-unit.rows // efficiency.tile) * efficiency.tile / unit.rows
    return 1.0


def dtype_of(unit: Unit, precision: str) -> Dtype:
    """The arithmetic a precision runs in."""
    if precision == "as-is":
        return "int8" if unit.act_bytes == 1 else "fp32"
    return "int8" if is_native(precision) else _DTYPE.get(precision, "fp32")


def weight_traffic(unit: Unit, precision: str) -> float:
    """Bytes of weights a call reads."""
    if unit.op == "embedding":
        return 0.0  # a row or two, counted as output
    if is_native(precision):
        return stored_bytes(unit.rows, unit.cols, precision) + 4.0 * unit.bias_elements
    per = {"int4-g32": 0.5 + 2 / 32, "fp32": 4.0, "fp16": 2.0, "int8-weight-only": 4.0}.get(precision, 1.0)  # unpacked to float when loaded
    if precision == "as-is":
        per = 1.0 if unit.weight_dtype in ("int8", "uint8") else 4.0
    return unit.weight_elements * per + 4.0 * unit.bias_elements


def activation_traffic(unit: Unit, precision: str) -> float:
    """Bytes of activations a call reads and writes."""
    if unit.op == "quantize" and precision == "fp32":  # one end is int8, the other float
        return float(unit.in_elements + 4 * unit.out_elements)
    size = 1 if precision == "int8-static" or (precision == "as-is" and unit.act_bytes == 1) else 4
    return float(size * (unit.in_elements + unit.out_elements))


def traffic(unit: Unit, precision: str) -> float:
    """Bytes a call reads and writes."""
    return weight_traffic(unit, precision) + activation_traffic(unit, precision)


def level_of(working_set: float, compute: ComputeUnit) -> str:
    """The nearest level that holds `working_set` bytes: "L1", "L2", "L3" or "memory"."""
    for cache in sorted(compute.caches, key=lambda c: c.level):
        if working_set <= cache.size_bytes:
            return f"L{min(cache.level, 3)}"
    return "memory"


def bandwidth(level: str, device: DeviceProfile, efficiency: Efficiency, compute: ComputeUnit, threads: int) -> float:
    """Bytes a second `threads` threads read from a level: measured, else from the profile, else a usual ratio to memory."""
    if level in efficiency.bandwidth_bytes_per_s:
        measured = efficiency.bandwidth_bytes_per_s[level]
        return measured * (threads / efficiency.threads if level != "memory" else 1.0)
    memory = device.memory.bandwidth_bytes_per_s
    one = device.memory.one_thread_bytes_per_s or 0.5 * memory
    if level == "memory":
        return min(one * threads, memory) if compute.kind == "cpu" else 0.8 * memory
    known = next((c.bandwidth_bytes_per_s for c in compute.caches if f"L{c.level}" == level), None)
    return (known or one * _CACHE_OVER_MEMORY.get(level, 2.0)) * threads


def stream_seconds(
    size: float, working_set: float, device: DeviceProfile, efficiency: Efficiency, compute: ComputeUnit, threads: int
) -> float:
    """Seconds to read `size` bytes of weights, of a method that touches `working_set` bytes a call.

    A calibration reads arrays of half of each cache; between half and the whole of one, more and more comes from the next level: others use
    it, too, and what is read round and round does not stay in a cache that it nearly fills.
    """
    level = level_of(working_set, compute)
    near = size / bandwidth(level, device, efficiency, compute, threads)
    cache = next((c for c in sorted(compute.caches, key=lambda c: c.level) if working_set <= c.size_bytes), None)
    if efficiency.origin != "calibrated" or cache is None:
        return near
    past = max(0.0, 2.0 * working_set / cache.size_bytes - 1.0)
    far = size / bandwidth(level_of(cache.size_bytes + 1.0, compute), device, efficiency, compute, threads)
    return near + past * max(0.0, far - near)


def peak(unit: Unit, precision: str, compute: ComputeUnit, threads: int) -> float:
    """Operations a second at full use of `threads` cores (all of a GPU or NPU)."""
    rates = compute.peak_ops_per_s
    dtype = dtype_of(unit, precision)
    top = rates.get(dtype) or rates.get("fp32") or max(rates.values())
    return top * (min(threads, compute.cores) / compute.cores if compute.kind == "cpu" else 1.0)


def unit_cost(
    unit: Unit, precision: str, device: DeviceProfile, runtime: str, threads: int, efficiency: Efficiency,
    *, working_set: float | None = None,
) -> UnitCost:  # fmt: skip
    """The predicted time of one call of `unit`.

    `working_set` (bytes of the whole method's weights and activations) decides the level that weights stream from;
    the unit's own bytes when None.
    """
    entry = next(r for r in device.runtimes if r.name == runtime)
    compute = device.unit(entry.unit)
    row = _row(efficiency, unit, precision)
    read_in_place = runtime == "native" and unit.op == "quantize"  # caches of few bits become numbers inside of attention
    if read_in_place or (unit.op == "reshape" and not unit.in_elements + unit.out_elements):
        return UnitCost(0.0, 0.0, 0.0, "overhead", 0.0)
    work, weights, acts = operations(unit) * padding(unit, efficiency), weight_traffic(unit, precision), activation_traffic(unit, precision)
    touched = working_set if working_set is not None else weights + acts
    level, near = level_of(touched, compute), level_of(acts, compute)
    streaming = stream_seconds(weights, touched, device, efficiency, compute, threads)
    streaming += acts / bandwidth(near, device, efficiency, compute, threads)
    computing = work / _rate(row, unit, precision, compute, threads, efficiency)
    if row and row.weights_per_s:
        computing = max(computing, unit.weight_elements / (row.weights_per_s * math.pow(threads / efficiency.threads, 0.9)))
    overhead = row.overhead_s + row.per_output_s * unit.out_elements if row else 1e-6
    log_sd = row.log_sd if row else 1.0
    seconds = overhead + max(computing, streaming)
    terms = {"compute": computing + (row.per_output_s * unit.out_elements if row else 0.0), (level if weights >= acts else near): streaming}
    bound = max(terms, key=lambda k: terms[k])
    bound = "overhead" if row and row.overhead_s > terms[bound] else bound
    spread = math.exp(Z80 * log_sd)
    return UnitCost(seconds, seconds / spread, seconds * spread, bound, log_sd)


_LIKE = {"reshape": "elementwise", "conv1d": "conv2d", "attention": "matmul", "recurrent": "linear", "quantize": "elementwise"}
"""Operator classes that cost like another one where they have no row of their own."""


def kind_of(unit: Unit) -> str:
    """The class a unit is calibrated under: means of whole maps, averages and maxima are three kernels, and an average may not be delegated."""
    if unit.op != "pool":
        return unit.op
    name = unit.name.split("#")[0]
    if any(k in name for k in ("adaptive_avg", "mean", "sum")):
        return "pool-mean"
    return "pool-average" if any(k in name for k in ("avg", "average")) else "pool"


def _row(efficiency: Efficiency, unit: Unit, precision: str) -> OpRate | None:
    """The row of a unit; a flatbuffer's operators cost like static int8 or float ones."""
    if precision == "as-is":
        precision = "int8-static" if unit.act_bytes == 1 else "fp32"
    if found := bits_and_group(precision):  # calibrated in two forms; the others compute as fast as the nearer of them
        precision = "native-int8" if found[0] == 8 else "native-int4-g32"
        precision = like(precision) if efficiency.runtime == "native" else precision
    known = {r.op for r in efficiency.rows}
    kind = next((k for k in (kind_of(unit), unit.op, _LIKE.get(unit.op, "*")) if k in known), unit.op)
    return efficiency.row(kind, precision)


def call_seconds(method: MethodGraph, precision: str, efficiency: Efficiency) -> float:
    """What a call costs beside its operators: entering the runtime, and passing inputs and outputs (rounding them where they are int8).

    Every tensor that is passed costs something, and every element of it but those of inputs that stay where their owner keeps them.
    """
    from edgesdk.graph.memory import kept_outside

    rows = {r.precision: r for r in efficiency.rows if r.op == "call"}
    row = rows.get(precision) or rows.get("fp32")
    if row is None:
        return efficiency.call_overhead_s
    tensors = len(method.inputs) + len(method.outputs)
    moved = method.outputs if kept_outside(method, efficiency.runtime) else (*method.inputs, *method.outputs)
    held = (*method.cache_inputs, *method.cross_cache_inputs)
    bytes_of = {"int8": 1, "uint8": 1, "float16": 2}  # codes go as they are
    elements = sum(t.elements * bytes_of.get(t.dtype, 4) / 4 if t.name in held else t.elements for t in moved)
    return row.overhead_s + row.per_tensor_s * tensors + row.per_output_s * elements


_APART = ("norm", "embedding", "recurrent", "quantize", "other")
"""Operator classes that XNNPACK leaves to ExecuTorch's own kernels, in whole or in part: a delegate ends at them."""


def breaks(method: MethodGraph, native: Container[str]) -> int:
    """How many delegates more ExecuTorch enters in a call when the units `native` run outside of them; a delegate that falls away counts -1.

    Taken in the order in which units compute; views cost no delegate, and a product of activations begins a new one.
    """

    def entered(out: Container[str]) -> int:
        count, inside = 0, False
        for unit in (u for u in method.units if u.op != "reshape"):
            delegated = unit.op not in _APART and unit.name not in out
            count += delegated and (not inside or unit.op in ("matmul", "attention"))
            inside = delegated
        return count

    return entered(native) - entered(())


def breaking(efficiency: Efficiency) -> float:
    """Seconds that entering one more delegate costs."""
    return next((r.overhead_s for r in efficiency.rows if r.op == "break"), 0.0)


def method_costs(
    method: MethodGraph, precision_of: Callable[[Unit], str], device: DeviceProfile, runtime: str, threads: int, efficiency: Efficiency
) -> tuple[dict[str, UnitCost], float]:
    """The cost of each unit by name, and of the call itself, in seconds."""
    held = {u.weight: precision_of(u) for u in method.units if u.weight}
    native = {u.name for u in method.units if u.weight_elements and is_native(precision_of(u))}
    size, quiet = working_set(method, held), fused(method, native)
    nothing = UnitCost(0.0, 0.0, 0.0, "overhead", 0.0)
    costs: dict[str, UnitCost] = {}
    known: dict[tuple[object, ...], UnitCost] = {}  # the equal layers of a deep model cost the same
    for u in method.units:
        if u.name in quiet:
            costs[u.name] = nothing
            continue
        precision = precision_of(u)
        alike = (
            kind_of(u),
            u.op,
            u.weight_dtype,
            u.rows,
            u.cols,
            u.bias_elements,
            u.macs,
            u.in_elements,
            u.out_elements,
            u.act_bytes,
            precision,
        )
        if alike not in known:
            known[alike] = unit_cost(u, precision, device, runtime, threads, efficiency, working_set=size)
        costs[u.name] = known[alike]
    whole = {precision_of(u) for u in method.units if u.weight_elements} or {precision_of(u) for u in method.units}
    caches = (*method.cache_inputs, *method.cross_cache_inputs)
    int8 = whole == {"int8-static"} or any(t.dtype in ("int8", "uint8") and t.name not in caches for t in method.inputs)
    broken = breaks(method, native) * breaking(efficiency) if native else 0.0
    return costs, call_seconds(method, "int8-static" if int8 else "fp32", efficiency) + broken


def method_seconds(
    method: MethodGraph, precision_of: Callable[[Unit], str], device: DeviceProfile, runtime: str, efficiency: Efficiency
) -> float:
    """The sum over a method's units and its call."""
    costs, call = method_costs(method, precision_of, device, runtime, efficiency.threads, efficiency)
    return sum(c.seconds for c in costs.values()) + call


def _rate(row: OpRate | None, unit: Unit, precision: str, compute: ComputeUnit, threads: int, efficiency: Efficiency) -> float:
    if row and row.ops_per_s:
        return row.ops_per_s * math.pow(threads / efficiency.threads, 0.9)
    share = row.share_of_peak if row and row.share_of_peak else 0.1
    return share * peak(unit, precision, compute, threads)


def total(costs: Sequence[UnitCost], efficiency: Efficiency, call_s: float | None = None) -> Estimate:
    """The sum of a method's units and the call's own overhead (`call_s`, or the efficiency's plain one).

    Calibrated residuals are taken as independent, others as fully correlated.
    """
    value = sum(c.seconds for c in costs) + (efficiency.call_overhead_s if call_s is None else call_s)
    if value <= 0:
        return Estimate(value=0.0, low=0.0, high=0.0)
    shares = [c.seconds / value * c.log_sd for c in costs]
    own = math.sqrt(sum(s * s for s in shares)) if efficiency.origin == "calibrated" else sum(shares)
    spread = math.exp(Z80 * math.hypot(own, efficiency.call_log_sd))
    return Estimate(value=value, low=value / spread, high=value * spread)


def working_set(method: MethodGraph, precisions: dict[str, str]) -> float:
    """Bytes one call of a method touches: its weights at their precisions and its peak activations."""
    stored: dict[str, float] = {}
    for unit in method.units:
        if unit.weight:
            stored[unit.weight] = weight_traffic(unit, precisions.get(unit.weight, "fp32"))
    return sum(stored.values()) + method.peak_activation_bytes


_CLAMPS = ("relu", "hardtanh", "clamp")


def fused(method: MethodGraph, native: Container[str] = ()) -> frozenset[str]:
    """Units that every runtime here folds into the operator before them: a clamp after a convolution, a linear layer or an addition, if it is
    not one of the units `native`, which run on our kernels."""
    found, before = set(), None
    for unit in method.units:
        clamp = unit.op == "activation" and unit.name.split("#")[0].rsplit(".", 1)[-1].startswith(_CLAMPS)
        if clamp and before is not None and before.name not in native and (before.weight_elements or before.name.startswith("add")):
            found.add(unit.name)
        if unit.op != "reshape":
            before = unit
    return frozenset(found)
