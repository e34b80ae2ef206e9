"""This machine as a DeviceProfile, detected live. Its peaks are derived from instruction set and clock; `edgesdk calibrate` measures what is reached."""

from __future__ import annotations

import importlib.util
import platform
import re
from pathlib import Path
from typing import Any

from edgesdk.device import DeviceProfile

FLAGS = {
    "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod",
    "i8mm": "i8mm", "sve2": "sve2",
}  # fmt: skip
RUNTIMES = (
    ("litert", "ai_edge_litert", ("fp32", "int8-static", "int8-dynamic", "int8-weight-only", "as-is")),
    ("executorch", "executorch", ("fp32", "int8-static", "int8-dynamic", "int4-g32")),
    ("native", "numba", ("fp32", "int8-dynamic", "int8-weight-only", "int4-g32")),
)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _clock_hz(cpuinfo: str) -> float:
    """The highest clock the system tells of; 1 GHz when it tells none."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if path.exists():
        return float(path.read_text()) * 1e3
    found = [float(m) for m in re.findall(r"cpu MHz\s*:\s*([\d.]+)", cpuinfo)]
    return max(found) * 1e6 if found else 1e9


def _caches() -> list[dict[str, Any]]:
    caches = []
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if entry.joinpath("type").read_text().strip() == "Instruction":
                continue
            text = entry.joinpath("size").read_text().strip()
            size = int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]]
            caches.append({"level": int(entry.joinpath("level").read_text()), "size_bytes": size})
        except (OSError, KeyError, ValueError):
            continue
    return caches


def operations_per_cycle(isa: list[str]) -> tuple[int, int]:
    """(fp32, int8) operations a cycle and core: two vector units; a multiply and an add are two."""
    lanes = 16 if "avx512" in isa else 8 if "avx2" in isa else 4
    fp32 = 2 * 2 * lanes
    dot = any(f in isa for f in ("avx512_vnni", "avx_vnni", "dotprod"))
    return fp32, fp32 * (4 if dot else 2)


def detect_host() -> DeviceProfile:
    """Facts of this machine; memory bandwidth is a careful guess until it is calibrated, and says so."""
    import psutil

    info = _cpuinfo()
    flags = set(re.findall(r"\S+", " ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", info, re.M)[:1])))
    isa = sorted({name for flag, name in FLAGS.items() if flag in flags})
    cores, clock = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1, _clock_hz(info)
    fp32, int8 = operations_per_cycle(isa)
    model = re.search(r"model name\s*:\s*(.*)", info)
    runtimes = [{"name": n, "unit": "cpu", "precisions": p} for n, module, p in RUNTIMES if importlib.util.find_spec(module) is not None]
    peaks = {"fp32": cores * clock * fp32, "int8": cores * clock * int8}
    unit = {
        "name": "cpu", "kind": "cpu", "core": (model[1].strip() if model else platform.machine()).lower(), "cores": cores, "clock_hz": clock,
        "isa": isa, "peak_ops_per_s": peaks, "caches": _caches(),
    }  # fmt: skip
    memory = psutil.virtual_memory()
    derived = f"derived: {cores} cores × {clock / 1e9:.2f} GHz × {fp32} fp32 or {int8} int8 operations a cycle"
    raw = {
        "name": "host", "title": f"this machine ({platform.node()})", "family": "host", "os": "linux",
        "arch": {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}.get(platform.machine(), "armv7"),
        "units": [unit], "runtimes": runtimes,
        "memory": {"size_bytes": memory.total, "usable_share": max(0.01, memory.available / memory.total), "bandwidth_bytes_per_s": 2e10},
        "sources": {"units": "/proc/cpuinfo, /sys/devices/system/cpu", "units.cpu.peak_ops_per_s": derived, "memory": "/proc/meminfo",
                    "memory.bandwidth_bytes_per_s": "derived: a common two-channel DDR4 machine, until `edgesdk calibrate` measures it"},
    }  # fmt: skip
    return DeviceProfile.check(raw, "host")
