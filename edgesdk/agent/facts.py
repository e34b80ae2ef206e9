"""What this machine is. Goes to the device as it is."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
from collections.abc import Callable
from typing import Any

from .look import IDENTITY, gather, identity, read, said


def cpuinfo(text: str | None = None) -> tuple[str, dict[str, str]]:
    """(the CPU's name, the keys that appear with their first value)"""
    keys: dict[str, str] = {}
    for line in (read("/proc/cpuinfo") if text is None else text).splitlines():
        name, _, value = line.partition(":")
        keys.setdefault(name.strip(), value.strip())
    here = platform.processor() if text is None else ""  # a text may be of another machine
    name = keys.get("model name") or keys.get("Hardware") or keys.get("CPU part") or here or "unknown"
    return name, keys


def emulated(read: Callable[[str], str] = read, machine: str | None = None) -> list[str]:
    """Reasons to believe that this is an emulator; empty on silicon. A virtual machine on the same kind of CPU is none."""
    reasons = []
    name, keys = cpuinfo(read("/proc/cpuinfo"))
    machine = machine or platform.machine()
    if "QEMU" in name or "TCG" in name:
        reasons.append("/proc/cpuinfo: " + name)
    if machine.startswith(("aarch64", "arm")) and "vendor_id" in keys and "flags" in keys:
        reasons.append("/proc/cpuinfo is of another kind of CPU than " + machine)
    for path in ("/proc/device-tree/compatible", "/sys/firmware/devicetree/base/compatible"):
        if "dummy-virt" in read(path):
            reasons.append("device tree: linux,dummy-virt")
            break
    vendor = read("/sys/class/dmi/id/sys_vendor")
    if "QEMU" in vendor and machine.startswith(("aarch64", "arm")):
        reasons.append("DMI: " + vendor)
    return reasons


def board_id(texts: dict[str, str] | None = None) -> tuple[str | None, str]:
    """(a digest of what tells this very board from every other one, where that is written); (None, "") where nothing does."""
    if texts is None:
        texts = gather((*IDENTITY, "/proc/cpuinfo"))
        texts["!getprop"] = said(("getprop",))
    value, where = identity(texts)
    return (hashlib.sha256(b"edgesdk board " + value.encode()).hexdigest()[:16], where) if value else (None, "")


def memory_bytes(key: str) -> int | None:
    for line in read("/proc/meminfo").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def own_bytes(key: str) -> int | None:
    """VmRSS or VmHWM of this process, in bytes, or None."""
    for line in read("/proc/self/status").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def facts() -> dict[str, Any]:
    runtimes: dict[str, str] = {}
    numpy = None
    try:
        import numpy as np

        numpy = np.__version__
        runner = importlib.import_module("runner")
        runtimes = runner.installed()
    except ImportError:
        pass
    return {
        "machine": platform.machine(),
        "system": platform.system() + " " + platform.release(),
        "board_id": board_id()[0],
        "board": read("/proc/device-tree/model") or read("/sys/class/dmi/id/product_name") or None,
        "python": platform.python_version(),
        "numpy": numpy,
        "cpu": cpuinfo()[0],
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes("MemTotal"),
        "memory_available_bytes": memory_bytes("MemAvailable"),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "runtimes": runtimes,
        "emulated": emulated(),
    }
