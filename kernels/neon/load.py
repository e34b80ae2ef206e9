"""libedgekernels.so on the device: ctypes, the standard library and numpy (Python 3.9 and later)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from ..cpu import host_targets

TARGETS = ("arm-i8mm", "arm-dotprod", "arm-neon")
"""The kinds of cores that the library has kernels for, best first."""


def symbol(target: str, kernel: str) -> str:
    """The name of a kernel in the library: ("arm-neon", "gemv_4_block") → "arm_neon_gemv_4_block"."""
    return f"{target.replace('-', '_')}_{kernel}"


class Neon:
    """`library.Library` of kernels compiled ahead of time. Raises `ImportError` where the file cannot be loaded here."""

    lanes = 4
    together = 2
    half = True

    def __init__(self, path: Path, target: str = "") -> None:
        """`target`: "" for the best one that this CPU runs."""
        self.target = target or next((t for t in host_targets() if t in TARGETS), "")
        if self.target not in TARGETS:
            raise ImportError(f"{path} has no kernels for {target or 'this CPU'}\nit has them for {', '.join(TARGETS)}")
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(f"{path} cannot be loaded: {error}\nit is made for arm64 Linux with glibc 2.31 or newer") from None
        self._run = self._library.edge_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._run.restype = None

    def address(self, name: str) -> int:
        """Raises `KeyError` for a kernel that it has not."""
        try:
            found = getattr(self._library, symbol(self.target, name))
        except AttributeError:
            raise KeyError(name) from None
        return int(ctypes.cast(found, ctypes.c_void_p).value or 0)

    def shift_of(self, bits: int) -> int:
        """Inputs are signed bytes whatever the weights are."""
        return 0

    def run(self, steps: Any, threads: int) -> None:
        """Steps int64 [n, 4], contiguous: a kernel's address, its args' address, how many parts, how many parts a thread is worth."""
        self._run(steps.ctypes.data, len(steps), threads)
