"""The fitted efficiencies in the planner's terms."""

from __future__ import annotations

from math import exp, log

from edgesdk.device import DeviceProfile
from edgesdk.efficiency import Efficiency, OpRate
from edgesdk.errors import UnknownName

# runtime of a profile → (engine, variant) of the fit
_ENGINES = {
    "executorch": ("cpu", "tflite"), "litert": ("cpu", "tflite"), "tflite-runtime": ("cpu", "tflite"), "onnxruntime": ("cpu",
    "onnxruntime"), "ncnn": ("cpu", "ncnn"),
    "ncnn-vulkan": ("vulkan", "ncnn"), "executorch-vulkan": ("vulkan", "ncnn"), "litert-gpu": ("vulkan", "ncnn"), "tensorrt": ("gpu",
    "tensorrt"),
    "executorch-cuda": ("gpu", "torch"), "qnn": ("npu", "qnn_dlc"), "executorch-qnn": ("npu", "qnn_dlc"), "litert-qnn": ("npu",
    "tflite"), "llama.cpp": ("llm-cpu", "llama.cpp"),
}  # fmt: skip
# operator class of the planner's graph → class of the fit
_OPS = {
    "conv2d": "conv", "conv1d": "conv", "depthwise_conv2d": "dw", "linear": "pw", "recurrent": "fc", "attention": "bmm", "matmul": "bmm",
    "norm": "elem", "softmax": "elem", "activation": "elem", "elementwise": "elem", "pool": "elem", "*": "elem",
}  # fmt: skip

TYPICAL_CHANNELS = 128  # the fitted efficiency falls with few channels; the planner's rows have no channel count


def efficiency(device: DeviceProfile, runtime: str) -> Efficiency:
    """Shares of peak per (operator class, precision) with the residual spread of whole devices left out of the fit.

    Raises `UnknownName` for a runtime that no published row tells about.
    """
    from edgesdk.plan.rates import call_row
    from edgesdk.predict import fitted
    from edgesdk.predict.machines import find_machine
    from edgesdk.predict.physics import prior

    if runtime not in _ENGINES:
        raise UnknownName("runtime with published measurements", runtime, _ENGINES)
    engine, variant = _ENGINES[runtime]
    shipped = fitted()
    p = shipped["parameters"].get(engine) or {k: v[0] for k, v in prior(engine).items()}
    half = shipped["device_half_widths"]
    sd = half.get(engine, half["*"]) / 1.2816  # an interval claims 80%
    machine = find_machine(device.name.replace("-", " ")) or find_machine(device.title)
    whole = p.get(f"variant:{variant}", 0.0) + (p.get(f"device:{machine.name}", 0.0) if machine else 0.0)
    core = machine.core if machine else "?"
    whole += p.get(f"core-program:{core}:{variant}", 0.0)
    groups = (f"program-part:{variant}", f"core-part:{core}", f"device-part:{machine.name if machine else '?'}")
    rows = []
    for op, mine in _OPS.items():
        part = sum(p.get(f"{group}:{mine}", 0.0) for group in groups)
        for precision in ("fp32", "int8", "*"):
            width = "integer" if precision == "int8" else "float"
            own = p.get(f"width-part:{width}:{mine}", 0.0) + p.get(f"program-width-part:{variant}:{width}:{mine}", 0.0)
            rows.append(_rate(p, op, mine, precision, (whole, part + own), sd))
    call = exp(p["fixed"] + whole)
    rows.append(call_row(device.unit(next(r.unit for r in device.runtimes if r.name == runtime)), runtime, call, sd))
    bandwidth = device.memory.bandwidth_bytes_per_s * min(exp(p["bandwidth"] - whole), 1.0)
    note = f"fitted on {shipped['points']} published measurements; spread from devices left out of the fit"
    return Efficiency(
        device=device.name, runtime=runtime, origin="fitted", rows=tuple(rows), bandwidth_bytes_per_s={"memory": bandwidth},
        call_overhead_s=call, call_log_sd=sd, notes=(note,),
    )  # fmt: skip


def _rate(p: dict[str, float], op: str, mine: str, precision: str, slower: tuple[float, float], sd: float) -> OpRate:
    """`slower`: what the effects add to the log time, on everything and on this operator."""
    whole, part = slower
    share = p[f"eff:{mine}"] - whole - part - log(1 + exp(p["lanes"]) / TYPICAL_CHANNELS)
    if precision == "int8":
        share += p.get(f"int8:{mine}", p["int8:other"]) - p.get("precision:int8", 0.0)
    else:
        share -= p.get("precision:fp32", 0.0)
    return OpRate(
        op=op, precision=precision, share_of_peak=min(exp(share), 1.0), overhead_s=exp(p["op"] + whole), log_sd=sd, n=0,
        source="edgesdk.predict: fitted to published measurements",
    )  # fmt: skip
