"""What `scripts.FACTS` printed, in the shape of the agent's `facts`."""

from __future__ import annotations

import re
from typing import Any

Pairs = list[tuple[str, str]]


def read_facts(text: str) -> dict[str, Any]:
    """machine, system, board, cpu, emulated (reasons), clock_hz, temperature_c, throttled and governor; None where the device does not tell."""
    pairs: Pairs = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines()) if rest.strip()]
    one = dict(reversed(pairs))
    cpu: dict[str, str] = {}
    for name, rest in pairs:
        if name == "cpuinfo":
            key, _, value = rest.partition(":")
            cpu.setdefault(key.strip(), value.strip())
    android = " ".join(one[k] for k in ("ro.product.manufacturer", "ro.product.model") if k in one)
    board = android or one.get("/proc/device-tree/model") or one.get("/sys/class/dmi/id/product_name")
    release = one.get("ro.build.version.release")
    clocks = [float(v) * 1e3 for v in _numbers(pairs, "khz")]
    temperatures = [t for t in (float(v) / 1e3 for v in _numbers(pairs, "millicelsius")) if -40 < t < 200]
    governors = sorted({rest for name, rest in pairs if name == "governor"})
    return {
        "machine": one.get("machine", "unknown"),
        "system": (f"Android {release}, " if release else "") + one.get("system", "unknown"),
        "board": board or None,
        "cpu": cpu.get("model name") or cpu.get("Hardware") or cpu.get("CPU part") or "unknown",
        "emulated": _emulated(one, cpu),
        "clock_hz": max(clocks, default=None),
        "temperature_c": max(temperatures, default=None),
        "throttled": None,
        "governor": ", ".join(governors) or None,
    }


def _numbers(pairs: Pairs, name: str) -> list[str]:
    return [word for n, rest in pairs if n == name and re.fullmatch("-?[0-9]{1,12}", word := rest.split()[0])]


def _emulated(one: dict[str, str], cpu: dict[str, str]) -> list[str]:
    """Reasons to believe that this is an emulator, by the signs that the agent looks for and Android's own."""
    reasons = [f"{p} = 1" for p in ("ro.kernel.qemu", "ro.boot.qemu") if one.get(p) == "1"]
    name, machine = cpu.get("model name", ""), one.get("machine", "")
    if "QEMU" in name or "TCG" in name:
        reasons.append(f"/proc/cpuinfo: {name}")
    if machine.startswith(("aarch64", "arm")) and "vendor_id" in cpu and "flags" in cpu:
        reasons.append(f"/proc/cpuinfo is of another kind of CPU than {machine}")
    if "dummy-virt" in one.get("/proc/device-tree/compatible", ""):
        reasons.append("device tree: linux,dummy-virt")
    if "QEMU" in one.get("/sys/class/dmi/id/sys_vendor", "") and machine.startswith(("aarch64", "arm")):
        reasons.append("DMI: QEMU")
    return reasons
