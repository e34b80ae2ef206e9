"""Which instructions a CPU offers to the kernels, from its own features (`/proc/cpuinfo`): the targets of the registry, best first."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

TARGETS: dict[str, tuple[str, frozenset[str]]] = {
    "x86-avx512vnni": ("x86_64", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "f16c", "fma"})),
    "x86-avxvnni": ("x86_64", frozenset({"avx_vnni", "avx2", "f16c", "fma"})),
    "x86-avx2": ("x86_64", frozenset({"avx2", "f16c", "fma"})),
    "arm-i8mm": ("aarch64", frozenset({"i8mm", "asimddp"})),
    "arm-dotprod": ("aarch64", frozenset({"asimddp"})),
    "arm-neon": ("aarch64", frozenset({"asimd"})),
    "plain": ("", frozenset()),
}
"""Target → architecture ("" for any) and the features it needs, named as Linux names them. In order of preference."""


def targets_of(machine: str, features: Iterable[str]) -> tuple[str, ...]:
    """The targets that a CPU of `machine` ("x86_64", "aarch64", …) with these features runs, best first; "plain" is always the last."""
    have = frozenset(features)
    return tuple(name for name, (arch, needs) in TARGETS.items() if arch in ("", machine) and needs <= have)


_ISA = {
    "avx512": "avx512f", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "avx2": "avx2", "neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm",
}  # fmt: skip
"""What a device profile calls an instruction set → the feature of that name on Linux."""
_TOLD_BY = {"avx2": ("f16c", "fma"), "avx512_vnni": ("avx512bw", "avx512vl", "f16c", "fma")}
"""Features that no CPU with the first one is without."""


def target_of(isa: Iterable[str]) -> str:
    """The best target of a CPU with the instruction sets of a device profile."""
    features = {_ISA[name] for name in isa if name in _ISA}
    features |= {more for name in features for more in _TOLD_BY.get(name, ())}
    machine = "aarch64" if features & {"asimd", "asimddp"} else "x86_64"
    return targets_of(machine, features)[0]


@lru_cache(maxsize=1)
def host_targets() -> tuple[str, ...]:
    """The targets of this machine. `EDGESDK_KERNELS=<target>` leaves out those that are better, to compare or to find a fault."""
    found = targets_of(platform.machine(), host_features())
    asked = os.environ.get("EDGESDK_KERNELS", "")
    return found[found.index(asked) :] if asked in found else found


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """This machine's, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.lower().startswith(("flags", "features")) for word in line.partition(":")[2].split())
