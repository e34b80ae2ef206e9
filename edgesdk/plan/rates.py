"""Where a plan's efficiencies come from: a calibration on the device, else a fit on published measurements, else a wide prior."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgesdk.efficiency import Efficiency, OpRate
from edgesdk.errors import InputError, UnknownName

if TYPE_CHECKING:
    from edgesdk.device import ComputeUnit, DeviceProfile

PRIOR = {"linear": 0.35, "conv2d": 0.35, "conv1d": 0.3, "depthwise_conv2d": 0.08, "matmul": 0.25, "attention": 0.25, "*": 0.1}
"""Share of the peak reached where nothing was measured."""
TENSOR_CYCLES = {"executorch": 4600.0, "litert": 10600.0}
"""Cycles of a core that a call costs for each input and output, through the Python runner: `edgesdk calibrate` of an x86-64 server at 2.6 GHz,
ExecuTorch 1.4.1 and LiteRT 2.3.0. What a device that was not calibrated is taken to need; LiteRT's where a runtime has none of its own."""


def call_row(compute: ComputeUnit, runtime: str, overhead_s: float, log_sd: float) -> OpRate:
    """What a call costs on a device that was not calibrated. Calls begin on a CPU: `compute`'s clock stands for it where it is one."""
    clock = compute.clock_hz if compute.kind == "cpu" else 2e9
    each = TENSOR_CYCLES.get(runtime, TENSOR_CYCLES["litert"]) / clock
    source = "inputs and outputs: cycles measured on an x86-64 server, by the clock"
    return OpRate(op="call", precision="fp32", ops_per_s=1e12, overhead_s=overhead_s, per_tensor_s=each, log_sd=log_sd, source=source)


def calibration_path(device: DeviceProfile, runtime: str, threads: int) -> Path:
    """Where a calibration is kept: bound to the device's board, or to this machine's processor and the runtime's version, and to the threads."""
    from edgesdk.cache import cache_dir
    from edgesdk.runner import installed

    bound = f"{device.board.id}-{runtime}" if device.board else f"{_machine()}-{runtime}-{installed().get(runtime, 'none')}"
    return cache_dir("calibration") / f"{device.name}-{bound}-{threads}.json"


def calibration_of(device: DeviceProfile, runtime: str, threads: int) -> Efficiency | None:
    """What was measured on this very device; None where nothing was, or with another version of the runtime than the board had when it was read."""
    path = calibration_path(device, runtime, threads)
    if not path.exists():
        return None
    try:
        found = Efficiency.load(path)
    except InputError:
        path.unlink()  # an older form: calibrate again
        return None
    if device.board is None:
        return None if found.emulated else found
    known = device.board.runtimes.get(runtime, found.runtime_version)
    return found if found.board == device.board.id and found.emulated == device.board.emulated and found.runtime_version == known else None


def _machine() -> str:
    """A short digest of this machine's processor."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.*)$", info, re.M)
    return hashlib.sha256(f"{platform.machine()} {name[1] if name else ''} {os.cpu_count()}".encode()).hexdigest()[:12]


def efficiency_for(device: DeviceProfile, compute: ComputeUnit, runtime: str, threads: int) -> Efficiency:
    """The best there is for `runtime` on `device`."""
    if measured := calibration_of(device, runtime, threads):
        return measured
    if device.name != "host":
        from edgesdk.predict import efficiency_for as fitted

        try:
            return fitted(device, runtime)
        except UnknownName:
            pass
    return prior(device, compute, runtime, threads)


def prior(device: DeviceProfile, compute: ComputeUnit, runtime: str, threads: int) -> Efficiency:
    """Shares of peak from `PRIOR`, an overhead that scales with the clock; log sd 0.6, about a factor of two either way."""
    overhead = 3e-6 * 2.4e9 / compute.clock_hz if compute.kind == "cpu" else 1e-5
    rows = tuple(
        OpRate(op=op, precision=p, share_of_peak=share * factor, overhead_s=overhead, log_sd=0.6, source="prior")
        for op, share in PRIOR.items()
        for p, factor in (("*", 1.0), ("int8", 0.7), ("int8-weight-only", 0.9))
    )
    call = call_row(compute, runtime, 5 * overhead, 0.6)
    return Efficiency(
        device=device.name, runtime=runtime, threads=threads, origin="prior", rows=(*rows, call), call_overhead_s=5 * overhead,
        call_log_sd=0.3,
    )  # fmt: skip
