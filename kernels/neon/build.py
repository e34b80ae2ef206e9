"""libedgekernels.so: every kernel for every kind of arm64 core, cross-compiled here, kept in the cache by content.

Each core has objects of its own, so that no instruction of a newer core is in an older one's kernels. The library needs glibc 2.31
(Debian 11) or newer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from edgesdk.errors import CheckFailed, MissingTool

from .load import symbol

__all__ = ["CORES", "Compiler", "compiler", "compilers", "kernels", "library", "objects", "program", "symbol"]
SOURCES = Path(__file__).parent / "src"
GLIBC = "2.31"
COMMON = ("-O3", "-std=c11", "-Wall", "-Wextra", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=default")
CORES = {
    "arm-neon": ("plain.h", "armv8-a", "cortex_a53-aes-sha2-crc"),  # what an A53 does in order, an A72 sorts out by itself
    "arm-dotprod": ("dot.h", "armv8.2-a+dotprod", "generic+dotprod"),
    "arm-i8mm": ("matrix.h", "armv8.2-a+dotprod+i8mm", "generic+dotprod+i8mm"),
}
"""Target → the file of its inner loops, gcc's -march, zig's -mcpu."""
FORMS = tuple(f"{bits}_{scales}{zeros}" for bits in (8, 4, 3, 2) for scales in ("row", "block") for zeros in ("", "_zeros"))


def kernels() -> list[str]:
    """The kernels that every core has."""
    return ["round", *(f"{how}_{form}" for form in FORMS for how in ("gemv", "gemm"))]


@dataclass(frozen=True)
class Compiler:
    """A C compiler for arm64 Linux. `kind`: zig or gcc."""

    kind: str
    command: tuple[str, ...]
    version: str

    def flags(self, target: str) -> list[str]:
        _, march, mcpu = CORES[target]
        return [f"-mcpu={mcpu}"] if self.kind == "zig" else [f"-march={march}", *(["-mtune=cortex-a53"] if target == "arm-neon" else [])]

    def run(self, args: Sequence[str]) -> None:
        """Raises `CheckFailed` with the compiler's words."""
        done = subprocess.run([*self.command, *args], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise CheckFailed(f"{' '.join(self.command[-2:])} failed: {lines[0] if lines else done.returncode}", "\n".join(lines[1:12]))


@lru_cache(maxsize=1)
def compilers() -> tuple[Compiler, ...]:
    """The compilers for arm64 that are here, best first; may be empty."""
    found = []
    if importlib.util.find_spec("ziglang"):
        from importlib.metadata import version

        command = (sys.executable, "-m", "ziglang", "cc", "-target", f"aarch64-linux-gnu.{GLIBC}", "-fno-sanitize=undefined")
        found.append(Compiler("zig", command, version("ziglang")))
    for name in ("aarch64-linux-gnu-gcc", *(["gcc"] if platform.machine() == "aarch64" else [])):
        if path := shutil.which(name):
            asked = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True)
            found.append(Compiler("gcc", (path,), asked.stdout.strip()))
    return tuple(found)


def compiler() -> Compiler:
    if not compilers():
        raise MissingTool("no C compiler for arm64 is here", "pip install ziglang   (or on Debian: apt-get install gcc-aarch64-linux-gnu)")
    return compilers()[0]


@lru_cache(maxsize=8)
def objects(by: Compiler | None = None, shared: bool = True) -> tuple[Path, ...]:
    """The object files of all kernels and of the runner of steps."""
    by = by or compiler()
    made = []
    for target, (core, _, _) in CORES.items():
        here = ["-DCORE=" + target.replace("-", "_"), f'-DCORE_FILE="{core}"', *by.flags(target)]
        made += [_object(by, name, here) for name in ("products.c", "round.c")]
    old = ["-DOLD_GLIBC"] if shared and by.kind == "gcc" and by.command[0].endswith("aarch64-linux-gnu-gcc") else []
    return (*made, _object(by, "run.c", [*old, *by.flags("arm-neon")]))


def library(by: Compiler | None = None, extra: Sequence[Path] = ()) -> Path:
    """libedgekernels.so for the device, with more object files in it."""
    by = by or compiler()
    parts = (*objects(by), *extra)
    return kept(by, "libedgekernels.so", [*map(str, parts), "-shared", "-pthread", "-Wl,-soname,libedgekernels.so", "-s"], parts)


def program(sources: Sequence[Path], extra: Sequence[Path] = (), by: Compiler | None = None, flags: Sequence[str] = ()) -> Path:
    """A static program of these C files with all kernels in it, and of more object files: what emulators run."""
    by = by or compiler()
    if by.kind == "zig":  # glibc is only linked dynamically there; musl has no such limit
        by = Compiler("zig", tuple(w.replace(f"gnu.{GLIBC}", "musl") for w in by.command), by.version)
    parts = (*objects(by, shared=False), *extra)
    return kept(
        by, "program", [*map(str, sources), *map(str, parts), "-O2", "-std=c11", "-static", "-pthread", "-lm", *flags], (*sources, *parts)
    )


def _object(by: Compiler, name: str, flags: Sequence[str]) -> Path:
    return kept(by, Path(name).stem + ".o", [*COMMON, *flags, "-c", str(SOURCES / name)], sorted(SOURCES.iterdir()))


def kept(by: Compiler, name: str, args: Sequence[str], made_of: Sequence[Path], version: str = "") -> Path:
    """The output of a compiler run, from the cache where it ran on the same contents before; `version`: of what it reads beside `made_of`."""
    from edgesdk.cache import cache_dir

    flags = [a for a in args if not os.path.isabs(a)]
    content = hashlib.sha256(repr((by.kind, by.version, by.command[2:], flags, version)).encode())
    for path in made_of:
        content.update(hashlib.sha256(path.read_bytes()).digest())
    path = cache_dir("kernels") / content.hexdigest()[:32] / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{os.getpid()}-{name}")
        by.run([*args, "-o", str(part)])
        part.replace(path)
    return path
