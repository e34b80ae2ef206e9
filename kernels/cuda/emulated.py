"""The kernels' own sources on this computer's CPU, a thread at a time: slow and true, for tests and for machines without a GPU.

`emulated.h` says what it finds. It needs a C++ compiler: `c++` on the path, or the ziglang package.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgesdk.cache import cache_dir
from edgesdk.errors import CheckFailed, MissingTool

from .compile import Kernel, headers
from .machine import Copy, Memory, Shared, Work


def compiler() -> list[str]:
    """The command of a C++ compiler. Raises `MissingTool`."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found:
        return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise MissingTool("kernels are emulated by a C++ compiler, and there is none", "install g++, or  pip install ziglang")


def library(kernels: Sequence[Kernel]) -> Any:
    """A shared library with these kernels, kept by content. Raises `MissingTool` and `CheckFailed`."""
    text = '#include "emulated.h"\n' + "".join(k.source for k in kernels)
    command = compiler()
    key = hashlib.sha256("\n".join((text, *headers().values(), *command)).encode()).hexdigest()[:40]
    path = cache_dir("kernels") / f"{key}.so"
    if not path.exists():
        folder = cache_dir("kernels") / f"{key}.source"
        folder.mkdir(exist_ok=True)
        for name, content in {**headers(), "kernels.cpp": text}.items():
            (folder / name).write_text(content)
        part = path.with_suffix(".part")
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-o", str(part), str(folder / "kernels.cpp")]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise CheckFailed(f"the kernels do not compile for this CPU: {first}", f"the command was {' '.join(command)}")
        part.replace(path)
        shutil.rmtree(folder, ignore_errors=True)
    return ctypes.CDLL(str(path))


class Emulated:
    """A `Machine` on this CPU. `seed`: 0 and 1 run threads in turn, others warp by warp in an order drawn from it; odd ones run blocks from the last
    to the first and copy early."""

    def __init__(self, kernels: Sequence[Kernel], seed: int = 0, units: int = 4) -> None:
        self.name, self.units, self.seed = "emulated", units, seed
        self._library = library(kernels)
        self._library.emulated_memory.restype = ctypes.c_void_p
        self._library.emulated_launch.restype = ctypes.c_char_p

    def empty(self, shape: Sequence[int], dtype: Any) -> Memory:
        """Memory full of NaNs (or -1), with an unreadable page behind it."""
        memory = Memory(0, tuple(int(n) for n in shape), np.dtype(dtype), None)
        address = self._library.emulated_memory(ctypes.c_size_t(memory.nbytes))
        ctypes.memset(address, 0xFF, -(-memory.nbytes // 16) * 16)
        return Memory(address, memory.shape, memory.dtype, self)

    def put(self, array: Any, into: Memory | None = None) -> Memory:
        array = np.ascontiguousarray(array)
        into = into or self.empty(array.shape, array.dtype)
        ctypes.memmove(into.address, array.ctypes.data, array.nbytes)
        return into

    def get(self, memory: Memory) -> Any:
        out = np.empty(memory.shape, memory.dtype)
        ctypes.memmove(out.ctypes.data, memory.address, out.nbytes)
        return out

    def shared(self, nbytes: int) -> Shared:
        memory = self.empty((nbytes,), np.uint8)
        return Shared(np.ctypeslib.as_array(ctypes.cast(memory.address, ctypes.POINTER(ctypes.c_uint8)), (nbytes,)), memory)

    def run(self, work: Sequence[Work]) -> None:
        """Raises `CheckFailed` where a kernel touches what is not its own, or its threads wait for ever."""
        for item in work:
            if isinstance(item, Copy):
                ctypes.memmove(item.to.address, item.source.address, item.source.nbytes)
                continue
            kernel = getattr(self._library, item.kernel.name)
            grid = (ctypes.c_int * 3)(*item.grid)
            sizes = (ctypes.c_int(item.kernel.threads), ctypes.c_size_t(item.shared_bytes), ctypes.c_uint(self.seed))
            wrong = self._library.emulated_launch(kernel, item.args, grid, *sizes)
            if wrong:
                raise CheckFailed(
                    f"{item.kernel.name}: {wrong.decode()}", "run it with another seed to see whether the order of threads matters"
                )

    def graph(self, work: Sequence[Work]) -> Callable[[], None]:
        kept = tuple(work)
        return lambda: self.run(kept)

    def wait(self) -> None:
        """Nothing is ever under way."""

    def use(self) -> None:
        """Any thread may."""

    def close(self) -> None:
        """Memory is kept until the process ends."""
