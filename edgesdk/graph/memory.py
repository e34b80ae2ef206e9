"""Exact bytes of weights by precision and runtime, and the memory answer before a program is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgesdk.graph.arena import Held, greedy_by_size
from edgesdk.native.formats import is_native, stored_bytes
from edgesdk.plan.types import MemoryAnswer

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile
    from edgesdk.graph.memory_plan import RuntimePlan
    from edgesdk.graph.types import MethodGraph, ModelGraph, TensorInfo, Unit

_WIDTH = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "uint8": 1.0, "int16": 2.0, "int4": 0.5, "int32": 4.0, "int64": 8.0}
GROUP = 32


def weight_bytes(unit: Unit, precision: str, runtime: str) -> int:
    """Stored bytes of a unit's weight, scales, zero points and bias.

    int8: one byte, and a float32 scale a channel (LiteRT's flatbuffer adds an int64 zero point a channel; XNNPACK's static int8 stores
    the bias' scale, too); int4-g32: half a byte, and a bfloat16 scale for each 32 along the reduction; native-…: as panels hold it.
    """
    n, bias = unit.weight_elements, unit.bias_elements * 4
    if n == 0:
        return bias
    executorch = runtime.startswith("executorch")
    if precision in ("int8-static", "int8-dynamic", "int8-weight-only"):
        scales = unit.rows * (4 if executorch else 12)
        return n + scales + bias * (2 if executorch and precision == "int8-static" else 1)
    if is_native(precision):
        return stored_bytes(unit.rows, unit.cols, precision) + bias
    if precision == "int4-g32":
        return unit.rows * -(-unit.cols // 2) + -(-unit.cols // GROUP) * unit.rows * 2 + bias
    if precision == "fp16":
        return n * 2 + bias
    return int(n * _WIDTH.get(unit.weight_dtype, 4.0)) + bias


def stored_weights(graph: ModelGraph, precisions: Mapping[tuple[str, str], str], runtime: str) -> int:
    """Bytes of all weights of a graph, each once, as `weight_bytes` counts them."""
    total, seen = 0, set()
    for method in graph.methods:
        for unit in method.units:
            if unit.weight and unit.weight not in seen:
                seen.add(unit.weight)
                total += weight_bytes(unit, precisions.get((method.name, unit.name), "fp32"), runtime)
    return total


_PACKED = ("linear", "conv1d", "conv2d", "depthwise_conv2d")


def packed_again(graph: ModelGraph, runtime: str) -> dict[str, int]:
    """Weight → how many of its users pack a copy of their own beside the first one's, for the weights of which some do.

    XNNPACK packs the weights of matrices and convolutions for each method that uses them: one method needs them once, about as large as they
    are stored; each further method needs them again. ExecuTorch lets go what it read from the program; LiteRT leaves the file mapped, whose
    pages count as resident but are the system's to take back: they are not counted.
    """
    if runtime not in ("executorch", "litert", "tflite-runtime"):
        return {}
    users = [{u.weight for u in m.units if u.weight and u.op in _PACKED} for m in graph.methods]
    return {w: n - 1 for w in set().union(*users) if (n := sum(w in used for used in users)) > 1}


def _size(tensor: TensorInfo, alignment: int) -> int:
    return -(-int(tensor.elements * _WIDTH.get(tensor.dtype, 4.0)) // alignment) * alignment


def _bytes(method: MethodGraph, names: tuple[str, ...], alignment: int) -> int:
    return sum(_size(t, alignment) for t in method.inputs if t.name in names)


def runtime_bytes(device: DeviceProfile, runtime: str) -> int | None:
    """Resident bytes of the runtime itself, where the profile knows them."""
    return next((r.overhead_bytes for r in device.runtimes if r.name == runtime), None)


XNNPACK_PADDING = 64
"""Bytes that ExecuTorch adds to each method's buffer when it has an XNNPACK delegate, which reads past the end (exir/memory_planning.py)."""

_DELEGATED = ("linear", "conv2d", "depthwise_conv2d", "activation", "pool", "reshape")


def _all_delegated(method: MethodGraph) -> bool:
    """Whether XNNPACK surely takes every operator of a method as one: plain networks of layers, clamps, pools and sums of tensors."""

    def takes(unit: Unit) -> bool:
        called = unit.name.split("#")[0].rsplit(".", 1)[-1]
        if unit.op == "activation":
            return called.startswith(("relu", "hardtanh"))
        if unit.op == "pool":
            return called.startswith(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"))
        if unit.op == "reshape":
            return called.startswith(("view", "reshape", "flatten"))
        return unit.op in _DELEGATED[:3] or (unit.op == "elementwise" and called.startswith("add") and not unit.weight)

    return all(takes(u) for u in method.units)


def kept_outside(method: MethodGraph, runtime: str) -> bool:
    """Whether a program leaves its inputs where their owner keeps them: on ExecuTorch, where caches are among them (`lower.executorch`),
    and on our own kernels."""
    return runtime.startswith(("native", "executorch")) and bool(method.cache_inputs or method.cross_cache_inputs)


def planned_bytes(method: MethodGraph, runtime: str, kinds: frozenset[str]) -> tuple[int, bool]:
    """What the runtime sets aside for a method whose weights have the precisions `kinds`, and whether that is exact.

    Inputs, outputs and, where it is not surely all one delegate, every tensor alive between them at once (at least what lies between
    delegates, except for a few small tensors that an exporter may add).
    """
    ends, whole = (*(() if kept_outside(method, runtime) else method.inputs), *method.outputs), _all_delegated(method)
    if runtime.startswith("executorch"):
        io = sum(_size(t, 16) for t in ends)
        if whole and runtime == "executorch":
            return io + XNNPACK_PADDING, True
        return io + method.peak_activation_bytes, False
    static = kinds == {"int8-static"}  # then a flatbuffer's inputs and outputs are int8, too
    hybrid = kinds & {"int8-dynamic", "int8-weight-only"} and any(u.op == "depthwise_conv2d" for u in method.units)
    sizes = [Held(t.elements if static else _size(t, 1), 0, 1) for t in ends]
    size = greedy_by_size(sizes)[0]
    sure = whole and not hybrid and (static or "int8-static" not in kinds)
    return (size, True) if sure else (size + method.peak_activation_bytes, False)


def _kinds(method: MethodGraph, precisions: Mapping[tuple[str, str], str]) -> frozenset[str]:
    return frozenset(precisions.get((method.name, u.name), "fp32") for u in method.units if u.weight_elements)


def in_flash(runtime: str) -> bool:
    """Whether weights are read where they lie in flash, and take no memory."""
    return runtime == "tflite-micro"


def memory_answer(
    graph: ModelGraph, precisions: Mapping[tuple[str, str], str], runtime: str, device: DeviceProfile, ahead: RuntimePlan | None = None
) -> MemoryAnswer:
    """What must fit, before lowering. `precisions`: (method, unit) → precision; `ahead`: the runtime's own plan where it is known already.

    Every method keeps its own inputs, outputs, caches and activations (each is loaded once and stays). What is inside a delegate is in no
    runtime's plan: `delegate_bytes` is the most that the methods have alive at a time, as an estimate.
    """
    weights = stored_weights(graph, precisions, runtime) + (ahead.constants_bytes if ahead else 0)
    guesses = {m.name: planned_bytes(m, runtime, _kinds(m, precisions)) for m in graph.methods}
    planned = sum(ahead.planned.values()) if ahead else sum(size for size, _ in guesses.values())
    exact = ahead is not None or all(sure for _, sure in guesses.values())
    own = runtime_bytes(device, runtime)
    missing = () if own is not None else (f"the runtime itself (not measured on {device.name})",)
    if not exact:
        missing = ("activations between delegates: an estimate by liveness until the program is built", *missing)
    inside = sum(m.peak_activation_bytes for m in graph.methods)
    copies = packed_again(graph, runtime)
    held = {
        u.weight: 0 if is_native(p := precisions.get((m.name, u.name), "fp32")) else weight_bytes(u, p, runtime)
        for m in graph.methods
        for u in m.units
        if u.weight in copies
    }
    fields = {**_split(graph, planned, runtime), "packed_bytes": sum(n * held[w] for w, n in copies.items())}
    return MemoryAnswer(
        weights_bytes=weights, **fields, runtime_bytes=own, delegate_bytes=inside,
        peak_bytes=weights * (not in_flash(runtime)) + sum(fields.values()) + inside + (own or 0),
        from_runtime=ahead is not None, not_counted=graph.not_counted + missing,
    )  # fmt: skip


def _split(graph: ModelGraph, planned: int, runtime: str) -> dict[str, int]:
    """A runtime's planned bytes as caches, cross caches, inputs and outputs, and the rest: activations. Their sum is `planned`, even where
    the runtime lets an output take a dead input's place; and behind it the caches that are kept outside, once for all methods."""
    alignment = 16 if runtime.startswith("executorch") else 64
    own = [m for m in graph.methods if not kept_outside(m, runtime)]
    left, fields = planned, {}
    for name in ("cache", "cross_cache"):
        want = sum(_bytes(m, getattr(m, f"{name}_inputs"), alignment) for m in own)
        fields[f"{name}_bytes"] = min(want, left)
        left -= fields[f"{name}_bytes"]
    held = [t for m in own for t in m.inputs if t.name not in m.cache_inputs + m.cross_cache_inputs]
    io = min(left, sum(_size(t, alignment) for t in (*held, *(t for m in graph.methods for t in m.outputs))))
    for name in ("cache", "cross_cache"):
        outside = (_bytes(m, getattr(m, f"{name}_inputs"), 1) for m in graph.methods if m not in own)
        fields[f"{name}_bytes"] += max(outside, default=0)
    return {**fields, "io_bytes": io, "activations_bytes": left - io}


def with_runtime_plan(answer: MemoryAnswer, program: Path, plan: Mapping[str, int], graph: ModelGraph | None = None) -> MemoryAnswer:
    """The answer with the lowered program's own numbers: `plan` holds `program` and `planned:<method>:<i>` in bytes (see `lower.executorch.memory_plan`,
    `lower.litert.memory_plan`).

    The program file is mapped as it is, so its size stands for the weights; planned buffers hold activations, inputs and outputs together:
    with the `graph` they are told apart.
    """
    planned = sum(v for k, v in plan.items() if k.startswith("planned:"))
    size = plan.get("program", program.stat().st_size if program.exists() else answer.weights_bytes)
    fields: dict[str, object] = {"weights_bytes": size, "from_runtime": True}
    nothing = {"io_bytes": 0, "cache_bytes": 0, "cross_cache_bytes": 0, "activations_bytes": planned}
    parts = _split(graph, planned, "litert" if program.name.endswith(".tflite") else "executorch") if graph else nothing
    left = tuple(n for n in answer.not_counted if "until the program is built" not in n)
    return answer.model_copy(
        update={
            **fields,
            **parts,
            "not_counted": left,
            "peak_bytes": size + answer.packed_bytes + sum(parts.values()) + (answer.delegate_bytes or 0) + (answer.runtime_bytes or 0),
        }
    )
