"""What runs kernels: memory, launches, lists of launches. `launch.Gpu` is a GPU; `emulated.Emulated` runs the same sources on a CPU, slowly."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from .compile import Kernel, packed_args


@dataclass(frozen=True)
class Memory:
    """An array in the machine's memory, for as long as this value lives."""

    address: int
    shape: tuple[int, ...]
    dtype: Any
    owner: Any = field(default=None, repr=False, compare=False)  # frees it

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * int(np.dtype(self.dtype).itemsize)

    def columns(self, first: int) -> Memory:
        """The same rows from column `first` on; they keep their stride."""
        return Memory(self.address + first * int(np.dtype(self.dtype).itemsize), self.shape, self.dtype, self)


@dataclass(frozen=True)
class Launch:
    """A kernel on a grid of blocks. `args`: its struct; `keeps`: memory that it points to."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    args: bytes
    keeps: tuple[Memory, ...] = ()

    def patched(self, places: Mapping[int, int]) -> Launch:
        """The same with other addresses: byte of the struct → address."""
        args = bytearray(self.args)
        for at, address in places.items():
            struct.pack_into("P", args, at, address)
        return replace(self, args=bytes(args))


@dataclass(frozen=True)
class Copy:
    """As many bytes as `source` has, from one memory to another: the machine's own, or what it shares with the host."""

    to: Memory
    source: Memory


Work = Any
"""A `Launch` or a `Copy`."""


@dataclass(frozen=True)
class Shared:
    """Memory of the host that the machine reads and writes where it is: bytes as numpy sees them, and as the machine does."""

    array: Any
    memory: Memory


class Machine(Protocol):
    """Work is done in the order in which it is given. `put` and `get` wait for it, `run` and what `graph` gives do not; `wait` does."""

    name: str
    units: int
    """Multiprocessors, for how far work is divided."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Memory: ...
    def put(self, array: Any, into: Memory | None = None) -> Memory: ...
    def get(self, memory: Memory) -> Any: ...
    def shared(self, nbytes: int) -> Shared: ...
    def run(self, work: Sequence[Work]) -> None: ...
    def graph(self, work: Sequence[Work]) -> Callable[[], None]: ...
    def wait(self) -> None: ...
    def use(self) -> None: ...
    def close(self) -> None: ...


class Paper:
    """A machine that nothing runs on: what is asked of it says which kernels a program is made of, and how much memory it takes."""

    name, units = "paper", 16

    def __init__(self) -> None:
        self._next = 1 << 20

    def empty(self, shape: Sequence[int], dtype: Any) -> Memory:
        made = Memory(self._next, tuple(int(n) for n in shape), np.dtype(dtype))
        self._next += -(-max(made.nbytes, 1) // 256) * 256
        return made

    def put(self, array: Any, into: Memory | None = None) -> Memory:
        return into or self.empty(array.shape, array.dtype)

    def get(self, memory: Memory) -> Any:
        return np.zeros(memory.shape, memory.dtype)

    def shared(self, nbytes: int) -> Shared:
        return Shared(np.zeros(nbytes, np.uint8), self.empty((nbytes,), np.uint8))

    def run(self, work: Sequence[Work]) -> None:
        raise NotImplementedError("these kernels are for another machine")

    def graph(self, work: Sequence[Work]) -> Callable[[], None]:
        return lambda: self.run(work)

    def wait(self) -> None: ...

    def use(self) -> None: ...

    def close(self) -> None: ...


class Scratch:
    """Memory of launches that follow one another: sums that blocks share, and counters that are 0 before and after each of them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._sums: Memory | None = None
        self._counters: Memory | None = None

    def sums(self, count: int) -> Memory:
        """Room for so many float32."""
        if self._sums is None or self._sums.shape[0] < count:
            self._sums = self.machine.empty((count,), np.float32)
        return self._sums

    def counters(self, count: int) -> Memory:
        if self._counters is None or self._counters.shape[0] < count:
            self._counters = self.machine.put(np.zeros(count, np.int32))
        return self._counters


def launch(kernel: Kernel, grid: Sequence[int], values: Mapping[str, Any], shared_bytes: int = 0) -> Launch:
    """A launch whose struct has these values; a `Memory` stands for its address, None for 0. Raises `InputError` for a name that is no field."""
    plain = {n: v.address if isinstance(v, Memory) else 0 if v is None else v for n, v in values.items()}
    x, y, z = (*grid, 1, 1)[:3]
    kept = tuple(v for v in values.values() if isinstance(v, Memory))
    return Launch(kernel, (x, y, z), shared_bytes, packed_args(kernel.args, plain), kept)
