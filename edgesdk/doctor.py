"""What is installed, what is missing, and the command that fixes it. Imports nothing it looks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "wrong", "optional"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `need` is what it serves; `fix` is the command that changes a state other than ok."""

    name: str
    state: State
    found: str
    need: str
    fix: str = ""


@dataclass(frozen=True)
class _Package:
    dist: str
    module: str
    extra: str  # "" for the core
    need: str
    series: str = ""  # the version prefix that is known to work


_PACKAGES = (
    _Package("torch", "torch", "", "tracing and reference outputs", "2.13"),
    _Package("numpy", "numpy", "", "everything that runs a model"),
    _Package("scipy", "scipy", "", "the planner's solver (HiGHS)"),
    _Package("executorch", "executorch", "executorch", "lowering to .pte and running it here", "1.4"),
    _Package("torchao", "torchao", "executorch", "quantization for .pte", "0.18"),
    _Package("litert-torch", "litert_torch", "litert", "lowering to .tflite", "0.10"),
    _Package("ai-edge-litert", "ai_edge_litert", "litert", "running .tflite here", "2."),
    _Package("ai-edge-quantizer", "ai_edge_quantizer", "litert", "quantizing .tflite", "0.10"),
    _Package("transformers", "transformers", "hub", "--model with a Hugging Face id or folder"),
    _Package("matplotlib", "matplotlib", "plots", "--plot"),
    _Package("scikit-learn", "sklearn", "examples", "training the digits example again"),
    _Package("numba", "numba", "kernels", "Numba kernels"),
    _Package("pyserial", "serial", "serial", "serial links"),
    _Package("paho-mqtt", "paho", "mqtt", "rollouts over a broker"),
    _Package("esptool", "esptool", "boards", "flash --to esp32:"),
    _Package("smpclient", "smpclient", "boards", "flash --to smp:"),
)
_PROGRAMS = (
    ("ssh", "ssh:// links", "apt-get install openssh-client"),
    ("qemu-system-aarch64", "the emulated board of the tests", ".ci/board-packages (as root)"),
    ("adb", "adb:// links", "apt-get install adb"),
    ("cc", "nothing yet but kernels built on this machine", "apt-get install gcc"),
)


def _package(p: _Package) -> Finding:
    fix = f"pip install -c constraints.txt 'edgesdk[{p.extra}]'" if p.extra else "pip install -c constraints.txt edgesdk"
    if importlib.util.find_spec(p.module) is None:
        return Finding(p.dist, "optional" if p.extra else "missing", "not installed", p.need, fix)
    try:
        version = importlib.metadata.version(p.dist)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    if p.series and not version.startswith(p.series):
        return Finding(p.dist, "wrong", version, f"{p.need}; {p.series}* is what is tested", fix)
    return Finding(p.dist, "ok", version, p.need)


def _torch_build() -> Finding | None:
    try:
        requires = importlib.metadata.requires("torch") or []
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    cuda = "+cpu" not in version and importlib.util.find_spec("nvidia") is not None
    found = f"{version}, " + ("with CUDA packages" if cuda else "CPU build")
    fix = "install torch from PyTorch's CPU index to save several GB" if cuda else ""
    return Finding("torch build", "ok", found, f"{len(requires)} requirements declared", fix)


def _python() -> Finding:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Finding(
        "python", "ok" if good else "wrong", version, "3.11 to 3.13; 3.11 is what is tested", "" if good else "install Python 3.11"
    )


def _cache() -> Finding:
    from edgesdk.cache import cache_dir

    root = cache_dir("doctor").parent
    if not os.access(root, os.W_OK):
        return Finding(
            "cache", "wrong", str(root), "plans and lowered programs are kept here", "set EDGESDK_CACHE to a folder you can write to"
        )
    free = shutil.disk_usage(root).free
    state: State = "ok" if free > 2 * 10**9 else "wrong"
    return Finding(
        "cache",
        state,
        f"{root} ({free / 1e9:.0f} GB free)",
        "plans and lowered programs are kept here",
        "" if state == "ok" else "free some space",
    )


def _calibration() -> Finding:
    from edgesdk.cache import cache_dir

    files = list(Path(cache_dir("calibration")).glob("*.json"))
    if files:
        return Finding("calibration", "ok", f"{len(files)} saved", "tight predictions for this host")
    return Finding("calibration", "optional", "none yet", "tight predictions for this host", "edgesdk calibrate")


def doctor() -> list[Finding]:
    """Look at everything once, the core first. Reads metadata only; nothing heavy is imported."""
    findings = [_python(), *(_package(p) for p in _PACKAGES)]
    build = _torch_build()
    if build:
        findings.insert(2, build)
    for program, need, fix in _PROGRAMS:
        path = shutil.which(program)
        findings.append(Finding(program, "ok" if path else "optional", path or "not found", need, "" if path else fix))
    return [*findings, _cache(), _calibration()]


def healthy(findings: list[Finding]) -> bool:
    """True when nothing that edgesdk needs is missing or wrong."""
    return all(f.state in ("ok", "optional") for f in findings)


def to_dict(findings: list[Finding]) -> dict[str, object]:
    return {"kind": "doctor", "schema_version": 1, "healthy": healthy(findings), "findings": [asdict(f) for f in findings]}
