"""libedgekernels.so of one program: what an arm64 device runs it with. Products in C, everything else from LLVM IR, in one file."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from edgesdk.cache import cache_dir
from edgesdk.kernels.neon import build
from edgesdk.kernels.neon.load import TARGETS, symbol
from edgesdk.kernels.numba.library import Compiled, objects

from .machine import LIBRARY, Machine, Method

__all__ = ["LIBRARY", "TARGETS", "kernels_of", "shared_library"]


class _Asked(Compiled):
    """Writes down which kernels a tape is made of."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.names: set[str] = set()

    def address(self, name: str) -> int:
        self.names.add(name)
        return 0

    def run(self, steps: Any, threads: int) -> None:
        raise NotImplementedError("these kernels are for another machine")


def kernels_of(content: bytes) -> tuple[str, list[str]]:
    """A native program's target, and the kernels that its methods call."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.native")
        path.write_bytes(content)
        from .program import Program

        asked = _Asked(Program(str(path)).target)
        machine = Machine(str(path), kernels=asked)
        for name in machine.methods:
            Method(machine, name)
        return asked.target, sorted(asked.names)


def shared_library(content: bytes) -> bytes:
    """The library for a program whose target is an arm64 core. Raises `MissingTool` where no compiler for arm64 is here."""
    target, names = kernels_of(content)
    own = set(build.kernels())
    extra = []
    for part in objects(target, (n for n in names if n not in own), lambda name: symbol(target, name)):
        path = cache_dir("kernels") / f"{hashlib.sha256(part).hexdigest()[:40]}.o"
        if not path.exists():
            path.write_bytes(part)
        extra.append(path)
    return build.library(extra=extra).read_bytes()
