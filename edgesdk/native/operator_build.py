"""libedgeoperators.so: `edgesdk::linear` for ExecuTorch with the kernels of one target, compiled here against the headers of the wheel that is
installed, kept in the cache by content. The device compiles nothing, and needs the same version of ExecuTorch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from edgesdk.cache import cache_dir
from edgesdk.errors import MissingTool
from edgesdk.kernels.cpu import TARGETS
from edgesdk.kernels.neon import build as neon
from edgesdk.runner import OPERATORS, installed

from .operator import MACROS

__all__ = ["OPERATORS", "compilers", "missing", "operator_library"]
SOURCE = Path(__file__).with_name("operator.cpp")
_FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-DNDEBUG",
    "-DET_LOG_ENABLED=0", "-DC10_USING_CUSTOM_GENERATED_MACROS",
)  # fmt: skip


@lru_cache(maxsize=8)
def compilers(machine: str) -> tuple[neon.Compiler, ...]:
    """The C++ compilers for Linux on `machine` ("x86_64", "aarch64") that are here, best first; may be empty."""
    found = []
    if importlib.util.find_spec("ziglang"):
        from importlib.metadata import version

        command = (sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.{neon.GLIBC}")
        found.append(neon.Compiler("zig", command, version("ziglang")))
    for name in (f"{machine}-linux-gnu-g++", *(["g++"] if platform.machine() == machine else [])):
        if path := shutil.which(name):
            found.append(neon.Compiler("gcc", (path,), os.path.realpath(path)))
    return tuple(found)


def missing(target: str) -> str:
    """Why operators for a target cannot be compiled here; "" where they can."""
    if "executorch" not in installed():
        return "executorch, whose headers they are compiled against, is not installed"
    machine = TARGETS[target][0] or platform.machine()
    if not compilers(machine):
        return f"no C++ compiler for {machine} is here"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite, which compiles the kernels, is not installed"
    return ""


def operator_library(target: str, forms: Iterable[str], by: neon.Compiler | None = None) -> bytes:
    """The library with the kernels of these forms ("4_block", …: `kernels.library.form`). Raises `MissingTool`."""
    if by is None and (why := missing(target)):
        raise MissingTool(
            f"operators of our kernels for {target}: {why}", "pip install -c constraints.txt 'edgesdk[executorch,kernels]' ziglang"
        )
    names = sorted(set(forms))
    machine, features = TARGETS[target]
    by = by or compilers(machine or platform.machine())[0]
    prefix, objects = _objects(target, [f"{kind}_{form}" for form in names for kind in ("gemv", "gemm")])
    version = installed()["executorch"].partition("+")[0]
    macros = {
        **MACROS, "EDGE_PREFIX": prefix, "EDGE_TARGET": f'"{target}"', "EDGE_VERSION": f'"{version}"',
        "EDGE_FEATURES": f'"{" ".join(sorted(features))}"', "EDGE_FORMS": " ".join(f"FORM({n})" for n in names),
    }  # fmt: skip
    headers = _headers()
    places = [f for folder in (headers, headers / "executorch/runtime/core/portable_type/c10") for f in ("-isystem", str(folder))]
    made = neon.kept(by, "operator.o", [*_FLAGS, *(f"-D{k}={v}" for k, v in macros.items()), *places, "-c", str(SOURCE)], [SOURCE], version)
    parts = [made, *objects]
    linked = neon.kept(
        _linker(by), OPERATORS, [*map(str, parts), "-shared", "-Wl,-Bsymbolic", f"-Wl,-soname,{OPERATORS}", "-s"], parts, version
    )
    return linked.read_bytes()


def _headers() -> Path:
    found = importlib.util.find_spec("executorch")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "include"


def _linker(by: neon.Compiler) -> neon.Compiler:
    """The C compiler of a C++ one: the library needs no C++ standard library."""
    command = tuple("cc" if word == "c++" else word.replace("g++", "gcc") if i == 0 else word for i, word in enumerate(by.command))
    return neon.Compiler(by.kind, command, by.version)


def _objects(target: str, kernels: Sequence[str]) -> tuple[str, list[Path]]:
    """What the kernels' names begin with, and object files that have them."""
    if target in neon.CORES:
        return target.replace("-", "_"), list(neon.objects())
    from edgesdk.kernels.numba.library import objects

    found = []
    for content in objects(target, ["round", *kernels], lambda name: f"edge_{name}"):
        path = cache_dir("kernels") / f"{hashlib.sha256(content).hexdigest()[:40]}.o"
        if not path.exists():
            part = path.with_name(f"{path.stem}.{os.getpid()}")
            part.write_bytes(content)
            part.replace(path)
        found.append(path)
    return "edge", found
