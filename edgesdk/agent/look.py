"""What a device tells of itself in files and by commands, as texts: nothing is judged here. Goes to the device as it is.

A device without Python answers the same through `edgesdk.probe.gather.LOOK`, a plain shell script that is given the same names.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import shutil
import subprocess
from typing import Any

IDENTITY = (
    "/proc/device-tree/serial-number", "/sys/firmware/devicetree/base/serial-number", "/etc/machine-id", "/sys/class/net/*/address",
    "/sys/class/net/*/device/uevent",
)  # fmt: skip
_CPU = "/sys/devices/system/cpu/"
FILES = (
    *IDENTITY, "/proc/cpuinfo", "/proc/meminfo", "/proc/mounts", "/proc/device-tree/model", "/proc/device-tree/compatible",
    "/etc/os-release", "/etc/nv_tegra_release", "/usr/local/cuda/version.json", "/sys/class/dmi/id/sys_vendor", "/sys/class/dmi/id/product_name",
    _CPU + "cpu[0-9]*/cpufreq/cpuinfo_m??_freq", _CPU + "cpu[0-9]*/cpufreq/scaling_m??_freq", _CPU + "cpu[0-9]*/cpufreq/scaling_governor",
    _CPU + "cpu[0-9]*/cache/index*/level", _CPU + "cpu[0-9]*/cache/index*/type", _CPU + "cpu[0-9]*/cache/index*/size",
    _CPU + "cpu[0-9]*/cache/index*/shared_cpu_list", _CPU + "cpu[0-9]*/topology/thread_siblings_list",
    _CPU + "cpu[0-9]*/regs/identification/midr_el1", "/sys/class/thermal/thermal_zone*/type", "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/hwmon/hwmon*/name", "/sys/class/hwmon/hwmon*/in*_label", "/sys/class/hwmon/hwmon*/in*_input",
    "/sys/class/hwmon/hwmon*/curr*_input", "/sys/class/hwmon/hwmon*/power*_input", "/sys/class/hwmon/hwmon*/power*_average",
    "/sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*", "/sys/bus/i2c/drivers/ina3221x/*/iio:device*/in_power*_input",
    "/sys/class/powercap/*/name", "/sys/class/powercap/*/energy_uj", "/sys/class/power_supply/*/type",
    "/sys/class/power_supply/*/voltage_now", "/sys/class/power_supply/*/current_now", "/sys/class/power_supply/*/power_now",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "uname": ("uname", "-srm"), "getprop": ("getprop",), "pmic": ("vcgencmd", "pmic_read_adc"), "nvpmodel": ("nvpmodel", "-q"),
    "nvcc": ("nvcc", "--version"),
}  # fmt: skip
PROGRAMS = ("executor_runner", "benchmark_model", "trtexec", "llama-bench")
FOLDERS = ("/data/local/tmp", "/usr/local/bin", "/usr/src/tensorrt/bin")
"""Where programs are looked for beside PATH."""
PACKAGES = {
    "executorch": "executorch", "litert": "ai-edge-litert", "tflite-runtime": "tflite-runtime", "native": "numba", "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt", "ncnn": "ncnn", "numpy": "numpy",
}  # fmt: skip
"""Runtime (and numpy, which runs need) → its Python package."""
COMMAND_S = 10.0


def read(path: str) -> str:
    """A file's text, a megabyte at most; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def sha256(path: str) -> str | None:
    """A file's digest in hex, or None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def gather(patterns: tuple[str, ...]) -> dict[str, str]:
    """Path → text of every file there that says something."""
    found = {path: read(path) for pattern in patterns for path in sorted(glob.glob(pattern))}
    return {path: text for path, text in found.items() if text}


def said(argv: tuple[str, ...]) -> str:
    """What a command says, nothing where it is not there or fails."""
    if shutil.which(argv[0]) is None:
        return ""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def packages() -> dict[str, str]:
    """The runtimes that this Python has, with their versions; nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for runtime, package in PACKAGES.items():
        try:
            found[runtime] = version(package)
        except PackageNotFoundError:
            continue
    return found


def storage(folder: str) -> dict[str, str]:
    """The disk that a folder is on or will be on (as `df -Pk` says it), and whether it can be written."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return {"!df": said(("df", "-Pk", folder)), "!writable": "yes" if os.access(folder, os.W_OK) else "no"}


def look(root: str) -> dict[str, Any]:
    """Everything, as texts by name: a file's path, or `!` and what was asked. `root`: edgesdk's folder here."""
    texts = gather(FILES)
    texts.update({"!" + name: said(argv) for name, argv in COMMANDS.items()})
    for name in PROGRAMS:
        texts["!program " + name] = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS])) or ""
    texts.update({"!package " + name: version for name, version in packages().items()})
    texts["!python"] = platform.python_version()
    texts.update(storage(root))
    return {"texts": {name: text for name, text in texts.items() if text}}


def properties(text: str) -> dict[str, str]:
    """Android's `[name]: [value]` lines."""
    pairs = (line.strip().partition("]: [") for line in text.splitlines())
    return {name[1:]: value[:-1] for name, mark, value in pairs if mark and name.startswith("[") and value.endswith("]")}


def identity(texts: dict[str, str]) -> tuple[str, str]:
    """(what tells this very board from every other one, where it is written); ("", "") where nothing does."""
    asked = [(path, texts.get(path, "")) for path in IDENTITY[:2]]
    serial = [line.partition(":")[2] for line in texts.get("/proc/cpuinfo", "").splitlines() if line.startswith("Serial")]
    asked += [("/proc/cpuinfo: Serial", text) for text in serial]
    known = properties(texts.get("!getprop", ""))
    asked += [("getprop " + name, known.get(name, "")) for name in ("ro.serialno", "ro.boot.serialno")]
    asked.append(("/etc/machine-id", texts.get("/etc/machine-id", "")))
    for path in sorted(texts):  # of interfaces that are hardware
        if path.startswith("/sys/class/net/") and path.endswith("/address") and path[:-7] + "device/uevent" in texts:
            asked.append((path, texts[path]))
    for where, text in asked:
        value = text.strip().lower()
        if value.strip("0:") and value not in ("unknown", "none", "0123456789abcdef", "uninitialized"):
            return value, where
    return "", ""
