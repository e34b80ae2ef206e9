"""Exact bytes of weights by precision and runtime, and the memory answer before a program is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgesdk.plan.types import MemoryAnswer

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile
    from edgesdk.graph.types import MethodGraph, ModelGraph, Unit

_WIDTH = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "uint8": 1.0, "int16": 2.0, "int4": 0.5, "int32": 4.0, "int64": 8.0}
GROUP = 32


def weight_bytes(unit: Unit, precision: str, runtime: str) -> int:
    """Stored bytes of a unit's weight, scales, zero points and bias.

    int8: one byte, and a float32 scale a channel (LiteRT's flatbuffer adds an int64 zero point a channel); int4-g32: half a byte, and a
    float32 scale for each 32 along the reduction (ExecuTorch keeps a float32 a group in its program).
    """
    n, bias = unit.weight_elements, unit.bias_elements * 4
    if n == 0:
        return bias
    if precision in ("int8-static", "int8-dynamic", "int8-weight-only"):
        scales = unit.rows * (4 if runtime.startswith("executorch") else 12)
        return n + scales + bias
    if precision == "int4-g32":
        return -(-n // 2) + -(-unit.cols // GROUP) * unit.rows * 4 + bias
    if precision == "fp16":
        return n * 2 + bias
    return int(n * _WIDTH.get(unit.weight_dtype, 4.0)) + bias


def _align(n: int) -> int:
    return -(-n // 16) * 16


def _bytes(method: MethodGraph, names: tuple[str, ...]) -> int:
    return sum(_align(int(t.elements * _WIDTH.get(t.dtype, 4.0))) for t in method.inputs if t.name in names)


def runtime_bytes(device: DeviceProfile, runtime: str) -> int | None:
    """Resident bytes of the runtime itself, where the profile knows them."""
    return next((r.overhead_bytes for r in device.runtimes if r.name == runtime), None)


def memory_answer(graph: ModelGraph, precisions: Mapping[tuple[str, str], str], runtime: str, device: DeviceProfile) -> MemoryAnswer:
    """What must fit, before lowering. `precisions`: (method, unit) → precision. Methods run one after another: activations are the largest method's,
    inputs and outputs of all methods stay allocated."""
    weights, seen = 0, set()
    for method in graph.methods:
        for unit in method.units:
            if unit.weight and unit.weight not in seen:
                seen.add(unit.weight)
                weights += weight_bytes(unit, precisions.get((method.name, unit.name), "fp32"), runtime)
    cache = max((_bytes(m, m.cache_inputs) for m in graph.methods), default=0)
    cross = max((_bytes(m, m.cross_cache_inputs) for m in graph.methods), default=0)
    io = 0
    for m in graph.methods:
        plain = tuple(t.name for t in m.inputs if t.name not in m.cache_inputs + m.cross_cache_inputs)
        io += _bytes(m, plain) + sum(_align(int(t.elements * _WIDTH.get(t.dtype, 4.0))) for t in m.outputs)
    activations = max(m.peak_activation_bytes for m in graph.methods)
    own = runtime_bytes(device, runtime)
    missing = () if own is not None else (f"the runtime itself (not measured on {device.name})",)
    return MemoryAnswer(
        weights_bytes=weights, activations_bytes=activations, cache_bytes=cache, cross_cache_bytes=cross, io_bytes=io, runtime_bytes=own,
        peak_bytes=weights + activations + cache + cross + io + (own or 0), not_counted=graph.not_counted + missing,
    )  # fmt: skip


def with_runtime_plan(answer: MemoryAnswer, program: Path, plan: Mapping[str, int]) -> MemoryAnswer:
    """The answer with the lowered program's own numbers: `plan` holds `program` and `planned:<method>:<i>` in bytes (see `lower.executorch.memory_plan`).

    The program file is mapped as it is, so its size stands for the weights; planned buffers hold activations, inputs and outputs together.
    """
    planned = sum(v for k, v in plan.items() if k.startswith("planned:"))
    size = plan.get("program", program.stat().st_size if program.exists() else answer.weights_bytes)
    fields = {
        "weights_bytes": size,
        "activations_bytes": planned,
        "io_bytes": 0,
        "cache_bytes": 0,
        "cross_cache_bytes": 0,
        "from_runtime": True,
    }
    return answer.model_copy(update={**fields, "peak_bytes": size + planned + (answer.runtime_bytes or 0)})
