"""What really runs: the precisions a unit may take on a device with a runtime, as `edgesdk.lower` builds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgesdk.errors import InputError
from edgesdk.plan.types import Precision

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile, RuntimeSupport
    from edgesdk.graph.types import ModelGraph, Unit

_EXECUTORCH: dict[str, tuple[Precision, ...]] = {
    "linear": ("fp32", "int8-static", "int8-dynamic", "int4-g32"),
    "conv2d": ("fp32", "int8-static"),
    "depthwise_conv2d": ("fp32", "int8-static"),
    "embedding": ("fp32", "int8-weight-only"),
}
SMALL_TABLE = 1 << 18
"""Elements of an embedding below which ExecuTorch's int8 form, three operators in place of one, gains nothing that counts."""
_LITERT: dict[str, tuple[Precision, ...]] = {
    "linear": ("fp32", "int8-static", "int8-dynamic", "int8-weight-only"),
    "conv2d": ("fp32", "int8-static", "int8-dynamic", "int8-weight-only"),
    "depthwise_conv2d": ("fp32", "int8-static", "int8-dynamic", "int8-weight-only"),
    "embedding": ("fp32", "int8-weight-only"),
}
_TFLITE_RUNTIME: dict[str, tuple[Precision, ...]] = {
    # 2.14, its last release: int8-dynamic gives wrong outputs without an error, int4 is refused
    op: tuple(p for p in kinds if p != "int8-dynamic")
    for op, kinds in _LITERT.items()
}
_TFLITE_MICRO: dict[str, tuple[Precision, ...]] = {
    # its kernels take floats, or int8 with ranges known beforehand; LiteRT's mixed ones are refused
    op: tuple(p for p in kinds if p in ("fp32", "int8-static"))
    for op, kinds in _LITERT.items()
}
_NATIVE: dict[str, tuple[Precision, ...]] = {"linear": ("fp32", "int8-dynamic", "int4-g32"), "embedding": ("fp32", "int8-weight-only")}
_NATIVE_CUDA: dict[str, tuple[Precision, ...]] = {**_NATIVE, "linear": ("int8-dynamic", "int4-g32")}
"""Weights as these say; a GPU's inputs stay float16, which is nearer than the 8 bits that the names promise."""
_STATIC_FOLLOWS = {"activation", "elementwise", "pool", "reshape", "softmax", "matmul"}
"""Operators without weights that run in int8 when everything around them does."""


def support(device: DeviceProfile, runtime: str) -> RuntimeSupport:
    """The device's entry for a runtime. Raises `InputError` naming what the device has."""
    for entry in device.runtimes:
        if entry.name == runtime:
            return entry
    known = ", ".join(r.name for r in device.runtimes)
    raise InputError(f"{device.name} has no runtime '{runtime}'", f"choose one of: {known}")


def table(runtime: str) -> dict[str, tuple[Precision, ...]]:
    """Operator class → precisions that `edgesdk.lower` builds for a runtime."""
    if runtime in ("executorch", "executorch-vulkan", "executorch-coreml", "executorch-ethos-u"):
        if runtime == "executorch":
            return _EXECUTORCH
        return {op: ("fp32", "int8-static") if "int8-static" in kinds else ("fp32",) for op, kinds in _EXECUTORCH.items()}
    if runtime == "native":
        return _NATIVE
    if runtime == "native-cuda":
        return _NATIVE_CUDA
    if runtime == "tflite-micro":
        return _TFLITE_MICRO
    return _TFLITE_RUNTIME if runtime == "tflite-runtime" else _LITERT if runtime.startswith("litert") else {}


def _own_module(unit: Unit) -> bool:
    """Whether the weight belongs to a module of the unit's own name: what ExecuTorch's quantizers can find."""
    return unit.weight == f"{unit.name.split('#')[0]}.weight"


def options(
    unit: Unit, method: str, runtime: str, device: DeviceProfile, *, source: str = "torch", static: bool = True, native: Sequence[Precision] = ()
) -> list[Precision]:  # fmt: skip
    """Precisions that `unit` can take; never empty. `static`: whether there is data to set static ranges from; `native`: what linear layers of
    this program may take on our own kernels.

    Raises `InputError` when the device has no such runtime.
    """
    allowed = set(support(device, runtime).precisions)
    if source == "tflite" and (unit.act_bytes == 1 or unit.weight_dtype in ("int8", "uint8", "int4")):
        return ["as-is"]
    if not unit.weight_elements:
        return ["fp32", "int8-static"] if static and unit.op in _STATIC_FOLLOWS and "int8-static" in allowed else ["fp32"]
    found: list[Precision] = []
    for precision in table(runtime).get(unit.op, ("fp32",)):
        if precision == "int8-static" and not static:
            continue
        if precision == "int4-g32" and unit.cols % 32:
            continue
        if precision != "fp32" and runtime.startswith("executorch") and not _own_module(unit):
            continue
        if runtime == "executorch" and precision != "fp32" and unit.op == "embedding" and unit.weight_elements < SMALL_TABLE:
            continue
        if precision in allowed or (runtime == "executorch" and unit.op == "embedding"):  # int8 tables are made of plain operators
            found.append(precision)
    if unit.op == "linear" and runtime == "executorch" and _own_module(unit):
        found += native
    return found or ["fp32"]


def refuse_source(graph: ModelGraph, runtime: str) -> str | None:
    """Why a runtime cannot take this model, or None."""
    if graph.source == "tflite" and runtime.startswith("executorch"):
        return "a .tflite cannot become a .pte"
    return None
