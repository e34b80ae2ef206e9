"""Why a native runner did not run on the device, in two lines."""

from __future__ import annotations

import re

from edgesdk.errors import DeviceError
from edgesdk.transport.base import Result

MACHINES = {3: "32-bit x86", 40: "32-bit Arm", 62: "x86-64", 183: "64-bit Arm", 243: "RISC-V"}
RUNS: dict[str, tuple[int, ...]] = {
    "x86_64": (62, 3), "i686": (3,), "i386": (3,), "aarch64": (183, 40), "arm64": (183, 40), "armv8l": (40,), "armv7l": (40,),
    "armv6l": (40,), "riscv64": (243,),
}  # fmt: skip
"""What `uname -m` says → ELF machines that may run there."""
ET_ERRORS = {
    "0x01": "an internal error", "0x10": "not supported", "0x12": "an invalid argument", "0x14": "an operator is missing",
    "0x20": "not found: a backend or a method that this runner was built without", "0x21": "out of memory", "0x22": "a file cannot be read",
    "0x23": "the program is damaged, or of another version", "0x25": "out of resources", "0x30": "a backend of another version",
    "0x31": "out of memory in a backend", "0x32": "an invalid handle in a backend",
}  # fmt: skip
"""executorch/runtime/core/error.h."""
_BUILD = "build it for this device (its ABI: `uname -m`, on Android `getprop ro.product.cpu.abi`)"
_OPERATORS = (
    "build the runner with that operator or backend (-DEXECUTORCH_BUILD_XNNPACK=ON …), of the version that the bundle was built with"
)
_SIGNS: tuple[tuple[str, str, str], ...] = (
    (r"not executable: (\d+-bit \S+ file)", "the runner is a {0} that this device does not run", _BUILD),
    (r"[Ee]xec format error|cannot execute binary file", "the runner is not for this device's CPU", _BUILD),
    (
        r"CANNOT LINK EXECUTABLE[^\n]*library \"?([^\"\s]+?)\"? not found",
        "the runner needs {0}, which the device does not have",
        "put it beside the runner on the device, or link it statically (-DANDROID_STL=c++_static)",
    ),
    (r"CANNOT LINK EXECUTABLE[^\n]*cannot locate symbol \"?([^\"\s]+?)\"?[\s,]", "the runner needs {0} of a newer Android", "build it with a lower ANDROID_PLATFORM"),
    (r"error while loading shared libraries: ([^:\s]+)", "the runner needs {0}, which the device does not have", "put it beside the runner on the device, or link it statically"),
    (r"version `?(GLIBC\w*_[\d.]+)'? not found", "the runner needs {0} of a newer C library than the device's", "build it on an older system, or link it statically"),
    (r"avc: +denied|SELinux", "SELinux does not let it run", "keep the runner below /data/local/tmp, where adb's shell may run files"),
    (
        r"Didn't find op for builtin opcode '(\w+)' version '(\d+)'",
        "the model needs {0} version {1}, which this runner is too old for",
        "take a newer benchmark_model, or convert for an older one",
    ),
    (r"Select TensorFlow op", "the model has TensorFlow ops", "take benchmark_model_plus_flex"),
    (r"Encountered unresolved custom op: ?(\S+?)\.?\s", "the model has the custom op {0}", "build the runner with it"),
    (r"Missing operator: (?:\[\d+\] )?(\S+)", "the runner was built without the operator {0}", _OPERATORS),
    (r"Backend (\w+) is not (?:registered|available)", "the runner was built without {0}", _OPERATORS),
    (r"Program identifier '(\w+)' != expected '(\w+)'", "the program has the format {0}, the runner reads {1}", "build both with one version of ExecuTorch"),
    (r"Failed to allocate|out of memory|std::bad_alloc", "the device's memory is too small", "free some there, or build a smaller plan (--memory)"),
    (r"unknown command line flag '(\w+)'", "the runner does not know --{0}, although its --help lists it", "take the runner of one build, with its own libraries"),
)  # fmt: skip


def machine_of(head: bytes) -> int | None:
    """The ELF machine that a file's first 20 bytes are for; None if it is no ELF file."""
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")


def wrong_machine(head: bytes, uname: str) -> str:
    """What is wrong with a program of this head for a device of this `uname -m`, or nothing."""
    machine = machine_of(head)
    if machine is None or uname not in RUNS or machine in RUNS[uname]:
        return ""
    return f"is for {MACHINES.get(machine, f'ELF machine {machine}')}, the device is {uname}"


def explain(link: str, runner: str, result: Result, facts: dict[str, str]) -> DeviceError:
    """The error for a run that failed. `facts`: what `scripts.DIAGNOSE` told, by name."""
    said = (result.err + b"\n" + result.out).decode(errors="replace")
    name = runner.rpartition("/")[2]
    for pattern, what, hint in _SIGNS:
        if found := re.search(pattern, said):
            return DeviceError(f"{link}: {name}: {what.format(*found.groups())}", hint)
    return _by_code(link, runner, result, facts, said)


def _by_code(link: str, runner: str, result: Result, facts: dict[str, str], said: str) -> DeviceError:
    name, last = runner.rpartition("/")[2], _last(said, result)
    if result.code == 126 and "noexec" in facts.get("options", ""):
        where = facts.get("mount", "its file system")
        return DeviceError(
            f"{link}: {name}: {where} is mounted noexec: no program there runs", "give another root: ?root=/data/local/tmp/edgesdk"
        )
    if result.code == 126:
        hint = "chmod 755 it; on Android keep it below /data/local/tmp" + (
            "; SELinux is enforcing" if facts.get("selinux") == "Enforcing" else ""
        )
        return DeviceError(f"{link}: {name}: it may not be run ({last})", hint)
    if result.code == 127 and facts.get("there") == "yes":
        return DeviceError(
            f"{link}: {name}: it is there, but its loader or C library is not ({last})",
            "link it statically, or build it for this system (glibc, musl or Android)",
        )
    if result.code == 127:
        return DeviceError(f"{link}: no runner at {runner} ({last})", "give a path on the device or a file here: --runner PATH")
    if result.code == 137:
        killer = (
            " (Android's lmkd, or the kernel, is short of memory)" if facts.get("lmkd") else ", which is what systems short of memory do"
        )
        return DeviceError(f"{link}: {name} was killed{killer}", "end other programs there, or build a smaller plan (--memory)")
    if found := re.search(r"status (0x[0-9a-f]+)|failed: (0x[0-9a-f]+)", said):
        status = f"0x{int(found[1] or found[2], 16):02x}"
        return DeviceError(f"{link}: {name}: {last}", f"{ET_ERRORS.get(status, 'see executorch/runtime/core/error.h')}; {_OPERATORS}")
    what = {132: "an illegal instruction: it is built for a newer CPU", 134: "it gave up", 139: "it crashed"}.get(
        result.code, f"exit code {result.code}"
    )
    return DeviceError(f"{link}: {name}: {what} ({last})", "run it by hand on the device with the same program and look at what it says")


def _last(said: str, result: Result) -> str:
    """The line that says most: the last error, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"^[EF] |ERROR|[Ee]rror|denied|not found|[Ff]ailed", line)]
    return (errors or lines or [f"exit code {result.code}"])[-1][:200]
